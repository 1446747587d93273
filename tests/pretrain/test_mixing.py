"""Several sources in one run: each has its share, its names and its own stand-ins, and resume is exact."""

import json
import shutil
from collections import Counter

import datasets
import pytest
import torch
import yaml

from launch.data.order import BatchPlan
from launch.data.sources import WeightedSource, open_source, open_sources
from launch.run.cli import parse
from pretrain.bands import main as bands
from pretrain.config import PretrainConfig
from pretrain.data import DataConfig, View, build_loader
from pretrain.look import main as look
from pretrain.mae.objective import MAE
from pretrain.stages import Stage
from pretrain.train import pretrain
from tests.rows import read_metrics
from vim_backbone import UserError

SMALL = ["--model.img_size=32", "--model.depth=1", "--decoder.depth=1", "--batch_size=6", "--log_every=1",
         "--trackers=[]", "--data.workers=0", "--optim.warmup_steps=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pause_at_the_end_of_a_stream(monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def folders(tmp_path, photo, monkeypatch):
    """Folders a of three pictures and b of five, of other shades, the last of a damaged."""
    monkeypatch.chdir(tmp_path)
    for name, count, shift in (("a", 3, 0), ("b", 5, 9)):
        (tmp_path / name).mkdir()
        for i in range(count):
            photo(40, 60, shift=shift + i).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a/2.png").write_bytes(b"broken")
    return tmp_path


@pytest.fixture
def shards(folders):
    """The same in parquet files a.parquet and b.parquet."""
    for name in "ab":
        cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted((folders / name).iterdir())]
        data = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
        data.to_parquet(folders / f"{name}.parquet")
    return folders


def opened(*sources, streaming=False):
    entries = [WeightedSource(source=source, weight=weight) for source, weight in sources]
    return open_sources(entries, split="train", column=None, streaming=streaming)


def draw(source, *, workers=0, start=0, stop=4, world=1, rank=0, known_bad=()):
    view = View((32, 48), (4, 6), DataConfig(workers=workers), MAE().draw)
    stage = Stage(range(stop), (32, 48), BatchPlan(6, 1, world, rank))
    loader = build_loader(source, view, 3, [stage], start, known_bad)
    return [batch for _, batch in zip(range(stop), loader, strict=False) if batch is not None]


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.extras, b.extras) and (a.names, a.bad) == (b.names, b.bad)


def counted(batches):
    return Counter(name.split(":")[0].split()[-1] for batch in batches for name in batch.names)


def test_each_batch_has_its_share_and_bad_pictures_stay_in_their_source(folders):
    source = opened(("a", 1), ("b", 2))
    whole = draw(source)
    assert [counted([batch]) for batch in whole] == [{"a": 2, "b": 4}] * 4
    assert {name for batch in whole for name in batch.names} == {f"a: {i}.png" for i in range(2)} | {
        f"b: {i}.png" for i in range(5)
    }
    assert {name for batch in whole for name, _ in batch.bad} == {"a: 2.png"}
    assert all(same(a, b) for a, b in zip(whole[2:], draw(source, workers=2, start=2), strict=True))
    halves = [draw(source, world=2, rank=rank) for rank in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert batch.names == first.names + second.names


def test_one_listed_source_is_as_if_it_were_alone(folders):
    alone = open_source("b", split="train", column=None, streaming=False)
    assert all(same(a, b) for a, b in zip(draw(alone), draw(opened(("b", 7.0))), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_mixed_with_streams(shards, workers):
    source = opened(("a.parquet", 1), ("b.parquet", 2), streaming=True)
    whole = draw(source, workers=workers, stop=6)
    assert [counted([batch])["b.parquet"] for batch in whole] == [4] * 6
    assert whole[0].names[0].startswith("rank 0 worker 0 b.parquet: epoch 0 row ")
    bad = [name for batch in whole for name, _ in batch.bad]
    assert {"a.parquet: epoch" in name for name in bad} == {True}
    known = [name for batch in whole[:4] for name, _ in batch.bad]
    resumed = draw(source, workers=workers, start=4, stop=6, known_bad=known)
    assert all(same(a, b) for a, b in zip(whole[4:], resumed, strict=True))


@pytest.mark.parametrize(
    ("sources", "streaming", "words"),
    [
        ([("a", 1), ("a", 2)], False, "data.sources has a twice: list it once, with the sum of the weights"),
        ([("a.parquet", 1), ("b", 1)], True, "mixes the stream a.parquet with b, which cannot be streamed: set"),
        ([("a", 1), ("nowhere", 1)], False, "data.source nowhere does not exist"),
        ([("a", 0)], False, "weight of a in data.sources is 0: it must be positive"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(shards, sources, streaming, words):
    with pytest.raises(UserError, match=words):
        opened(*sources, streaming=streaming)


def test_fields_that_exclude_each_other():
    with pytest.raises(UserError, match=r"data.sources is \[\]: list one or more"):
        DataConfig(sources=[])
    with pytest.raises(UserError, match=r"data.source is 'a': give it or data.sources, not both"):
        DataConfig(source="a", sources=[WeightedSource(source="b")])
    with pytest.raises(
        UserError, match=r"data.sources is .*: it must be \[\{source: text, weight: a number, split: text or null, colu"
    ):
        parse(PretrainConfig, ["--data.sources=[{weight: 2}]"], "test", "")


def test_a_run_of_two_sources_resumes_exactly(folders, capsys):
    listed = "--data.sources=[{source: a, weight: 1}, {source: b, weight: 2}]"

    def run(out, *argv):
        folder = pretrain(parse(PretrainConfig, [*SMALL, listed, f"--out={out}", *argv], "test", ""))
        return [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]

    whole = run("whole", "--steps=3", "--checkpoint_every=2")
    assert "on 8 pictures of 'a x 1, b x 2'" in " ".join(capsys.readouterr().err.split())
    assert "a: 2.png\t" in (folders / "whole/pretrain/bad_pictures.txt").read_text()
    recorded = yaml.safe_load((folders / "whole/pretrain/config.yaml").read_text())["data"]["sources"]
    assert [(entry["source"], entry["weight"]) for entry in recorded] == [("a", 1.0), ("b", 2.0)]
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/pretrain/checkpoints/step-00000003")
    assert run("cut", "--steps=3", "--resume") == whole


def test_other_commands_take_the_same_list(folders, capsys):
    listed = "[{source: a, weight: 1}, {source: b, weight: 3}]"
    bands([listed, "--out", "both.json", "--pictures", "8"])
    assert (
        json.loads((folders / "both.json").read_text())["pictures"] == 8 - 1
    )  # of a two of three, one damaged; b again
    assert "1 pictures cannot be read, such as a: 2.png" in capsys.readouterr().err
    look([listed, "--model.img_size=32", "--pictures=8", "--page=both.png"])
    assert "a: 2.png: " in capsys.readouterr().err
    assert (folders / "both.png").stat().st_size > 10_000
