"""Held-out pictures, probes and RankMe of whole runs, beside what is computed apart; and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from launch.data.labelled import read_class_folders
from launch.data.reading import read_pixels
from launch.data.sources import WeightedSource, open_source, open_sources
from launch.run.randomness import generator
from pretrain.bands import main as statistics
from pretrain.data import View
from pretrain.train import build_model, pretrain
from pretrain.watching.evaluate import PENALTY, middle, patch_features, rank_me, usable
from pretrain.watching.maps import draw_maps
from pretrain.watching.sets import EvalSets, hold_out, key_of
from pretrain.watching.watch import interval
from tests.band_files import bands_of, write, write_scenes
from tests.launch.real import ROOT
from tests.launch.real import run as run_command
from tests.pretrain.test_train import config, weights
from tests.rows import read_metrics
from vim_backbone import UserError, from_pretrained
from vim_backbone.embedding.features import Selection, compute
from vim_backbone.preprocessing import RGB, to_model

MEASURED = ("held_out_loss", "rank_me", "knn", "linear")


@pytest.fixture
def labelled(tmp_path, photo):
    """Two classes of six pictures to learn from and four to score."""
    for split, count in (("train", 6), ("val", 4)):
        for number in range(count):
            for kind, side in (("tall", (60, 40)), ("wide", (40, 60))):
                folder = tmp_path / "labelled" / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                photo(*side, shift=number + 5 * (split == "val")).save(folder / f"{number}.png")
    return tmp_path / "labelled"


def options(labelled, *argv):
    return (f"--data.source={labelled}/train", "--eval.share=0.3", f"--eval.source={labelled}",
            "--model.patch_size=8", *argv)  # fmt: skip


def evaluations(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: {name: row[name] for name in MEASURED} for row in rows if "held_out_loss" in row}


def test_rank_me_is_the_entropy_of_singular_values():
    rng = np.random.default_rng(0)
    for shape in ((50, 8), (5, 40)):
        features = rng.standard_normal(shape) @ np.diag(1.0 / np.arange(1, shape[1] + 1))
        shares = np.linalg.svd(features, compute_uv=False)
        shares = shares / shares.sum() + 1e-7
        assert rank_me(torch.tensor(features)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert rank_me(torch.eye(9)[:, :6].float()) == pytest.approx(6, rel=1e-4)
    assert rank_me(torch.ones(30, 6)) == pytest.approx(1, abs=1e-4)
    assert rank_me(torch.zeros(30, 6)) == pytest.approx(1, abs=1e-4)
    assert not usable(torch.tensor([[1.0, torch.nan]]))


def test_which_pictures_are_held_out_depends_on_seed_and_name_alone(tmp_path, photo):
    (tmp_path / "all").mkdir()
    for number in range(60):
        photo(8, 8).save(tmp_path / f"all/{number}.png")

    def held(seed=0, share=0.3):
        source = open_source(str(tmp_path / "all"), split="train", column=None, streaming=False)
        train, apart = hold_out(source, share, seed)
        names = [{each.name(i) for i in range(len(each))} for each in (train, apart)]
        assert not names[0] & names[1]
        assert names[0] | names[1] == {path.name for path in (tmp_path / "all").iterdir()}
        return names[1]

    before = held()
    assert 8 <= len(before) <= 28
    assert before < held(share=0.5)
    assert before != held(seed=1)
    photo(8, 8).save(tmp_path / "all/00.png")  # comes first, and moves every index
    (tmp_path / "all/59.png").unlink()
    assert held() - {"00.png"} == before - {"59.png"}


def test_of_several_sources_each_keeps_its_weight_and_its_share(tmp_path, photo):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(40):
            photo(8, 8).save(tmp_path / name / f"{number}.png")
    entries = [WeightedSource(source=str(tmp_path / name), weight=weight) for name, weight in (("a", 3), ("b", 1))]
    train, apart = hold_out(open_sources(entries, split="train", column=None, streaming=False), 0.25, 0)
    assert train.weights == [3, 1]
    alone = [hold_out(open_source(e.source, split="train", column=None, streaming=False), 0.25, 0) for e in entries]
    assert [len(part) for part in train.parts] == [len(kept) for kept, _ in alone]
    wanted = [
        f"{e.title}: {held.name(i)}" for e, (_, held) in zip(entries, alone, strict=True) for i in range(len(held))
    ]
    assert [apart.name(i) for i in range(len(apart))] == wanted
    trained = {train.name(index) for index in range(len(train))}
    assert not trained & set(wanted)
    assert len(trained) + len(wanted) == 80


@pytest.mark.parametrize("sizes", ["fixed", "native"])
def test_an_evaluation_is_what_one_picture_after_the_other_gives(tmp_path, labelled, sizes):
    """Of the last weights: the loss of each held-out picture, and scikit-learn's probes of the published backbone."""
    argv = options(
        labelled, "--steps=3", "--eval.every=2", f"--data.sizes={sizes}", "--ema_decay=0.5", "--eval.share=0.7"
    )
    settings = config(tmp_path, *argv)
    folder = pretrain(settings)
    assert list(evaluations(folder)) == [0, 2, 3]
    got = evaluations(folder)[3]
    source = open_source(f"{labelled}/train", split="train", column=None, streaming=False)
    held = [name for i in range(len(source)) if key_of(name := source.name(i), 0) < 0.7 * 2**64]
    model = build_model(settings)
    model.load_state_dict(weights(folder, 3, "ema"))
    view = View((32, 32), (4, 4), settings.data, settings.method.draw)
    each, features = [], []
    for name in held:
        with source.open(next(i for i in range(len(source)) if source.name(i) == name)) as picture:
            image, mask = view.draw(picture, generator(0, key_of(name, 0)))
        images = to_model(image[None], torch.device("cpu"))
        inputs = settings.method.inputs(mask[None], torch.device("cpu"))
        with torch.no_grad():
            each.append(model.eval()(images, *inputs.arguments).item())
            features.append(model.encoder(images)[0].numpy())
    assert len(each) > 4
    assert len(each) % 4  # batches of four and of fewer
    assert got["held_out_loss"] == pytest.approx(np.mean(each), rel=1e-5)
    shares = np.linalg.svd(np.array(features, np.float64), compute_uv=False)
    shares = shares / shares.sum() + 1e-7
    assert got["rank_me"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)

    backbone, halves = from_pretrained(folder / "backbone").eval(), []
    for split in ("train", "val"):
        data, images = read_class_folders(labelled / split, None), []
        for index in range(len(data.labels)):
            with data.source.open(index) as picture:
                images.append(read_pixels(picture, RGB, 1.0, middle(picture.size, (32, 32)), (32, 32)))
        with torch.no_grad():
            halves.append((backbone(to_model(torch.stack(images), torch.device("cpu"))).double().numpy(), data.labels))
    (bank, labels), (queries, targets) = halves
    peer = KNeighborsClassifier(len(bank), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    assert got["knn"] == pytest.approx(peer.fit(bank, labels).score(queries, targets))
    mean, deviation = bank.mean(0), bank.std(0, ddof=1) + 1e-6
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    peer = LogisticRegression(C=1 / (PENALTY * len(bank)), tol=1e-8, max_iter=5000).fit(bank, labels)
    assert got["linear"] == pytest.approx(peer.score(queries, targets))


def test_held_out_pictures_are_not_trained_on_and_evaluating_changes_nothing(tmp_path, labelled, monkeypatch):
    seen = []
    monkeypatch.setattr("pretrain.train.checked", lambda run, batch: (seen.extend(batch.names), batch.images)[1])
    watched = options(labelled, "--steps=4", "--model.drop_path_rate=0.5")
    once = pretrain(config(tmp_path / "once", *watched))
    often = pretrain(config(tmp_path / "often", *watched, "--eval.every=1"))
    assert losses_of_training(often) == losses_of_training(once)
    source = open_source(f"{labelled}/train", split="train", column=None, streaming=False)
    _, apart = hold_out(source, 0.3, 0)
    assert seen
    assert not set(seen) & {apart.name(index) for index in range(len(apart))}
    assert list(evaluations(often)) == list(range(5))
    assert list(evaluations(once)) == [0, 4]


def losses_of_training(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def test_a_resumed_run_in_stages_has_the_same_evaluations(tmp_path, labelled):
    argv = options(
        labelled, "--steps=4", "--eval.every=1", "--checkpoint_every=1", "--stages=[{until: 0.5, img_size: 16}, {}]"
    )
    whole = pretrain(config(tmp_path / "whole", *argv))
    cut = tmp_path / "cut/pretrain"
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("backbone", "step-00000003", "step-00000004"))
    pretrain(config(cut.parent, "--resume", *argv))
    assert evaluations(cut) == evaluations(whole)
    assert list(evaluations(cut)) == [0, 1, 2, 3, 4]
    rows = [row for row in read_metrics(whole / "metrics.jsonl") if "held_out_loss" in row]
    assert [row["height"] for row in rows] == [16, 16, 16, 32, 32]
    for change in ("--eval.share=0.2", "--seed=1"):
        with pytest.raises(UserError, match=f"was trained with {change.split('=')[0][2:]} = "):
            pretrain(config(cut.parent, "--resume", *argv, change))


def test_what_cannot_be_read_is_not_counted_and_named(tmp_path, labelled, capsys):
    argv = options(labelled, "--steps=1", "--eval.share=0.6")
    whole = evaluations(pretrain(config(tmp_path / "whole", *argv)))[0]
    source = open_source(f"{labelled}/train", split="train", column=None, streaming=False)
    _, apart = hold_out(source, 0.6, 0)
    names = [apart.name(index) for index in range(len(apart))]
    (labelled / "train" / names[0]).write_bytes(b"broken")
    broken = evaluations(pretrain(config(tmp_path / "broken", *argv)))[0]
    assert broken["held_out_loss"] != whole["held_out_loss"]
    (labelled / "train" / names[0]).unlink()
    assert evaluations(pretrain(config(tmp_path / "gone", *argv)))[0] == broken  # as if it were not there
    printed = " ".join(capsys.readouterr().err.split())
    assert f"2 pictures cannot be evaluated and are not counted, such as {names[0]}: no picture format" in printed
    assert printed.count("cannot be evaluated") == 1  # of two evaluations


@pytest.mark.parametrize(("argv", "line"), [
    (["--eval.share=0.3", "--data.source={0}/none.parquet", "--data.streaming=true"], "a stream's pictures cannot be"),
    (["--eval.share=0.0001"], "eval.share is 0.0001: it holds out none of 12 pictures, raise it or leave it out"),
    (["--eval.share=0.9999"], "eval.share is 0.9999: it holds out all 12 pictures, lower it"),
    (["--eval.source=nowhere"], "eval.source nowhere does not exist: give a folder with train/CLASS"),
    (["--eval.source={0}/labelled/train"], r"has no 'val' to evaluate on: set eval.val_split, or eval.holdout 0.1"),
    (["--eval.source={0}/one"], r"eval.source: .*train has one class, 'tall': a classifier needs two or more folders"),
    (["--eval.source={0}/broken"], r"eval.source .*broken: none of 4 pictures can be read, train/a/0.png: no picture"),
    (["--eval.share=1"], r"eval.share is 1.0: it must lie in \[0, 1\)"),
    (["--eval.every=0"], "eval.every is 0: it must be at least 1"),
])  # fmt: skip
def test_before_a_run_what_cannot_be_evaluated_is_one_line(tmp_path, labelled, argv, line):
    shutil.copytree(labelled, tmp_path / "one", ignore=shutil.ignore_patterns("wide"))
    for split in ("train", "val"):
        for number in range(4):
            path = tmp_path / f"broken/{split}/{'ab'[number % 2]}/{number // 2}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"broken")
    if "streaming" in argv[-1]:
        import datasets

        cell = {"bytes": (labelled / "val/tall/0.png").read_bytes(), "path": None}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": [cell]}, features=features).to_parquet(tmp_path / "none.parquet")
    argv = [f"--data.source={labelled}/train", "--steps=1", *(each.format(tmp_path) for each in argv)]
    with pytest.raises(UserError, match=line) as error:
        pretrain(config(tmp_path / "runs", *argv))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_pictures_with_bands_are_watched_and_others_refused(tmp_path, labelled):
    scenes = write_scenes(tmp_path / "scenes", count=12)
    statistics([str(scenes), "--out", str(tmp_path / "s.json"), "--sets", "3=2,0,1", "5=0,1,2,3,4"])
    for split in ("train", "val"):
        for number in range(4):
            path = tmp_path / f"classes/{split}/{'ab'[number % 2]}/{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, bands_of(number)[: 3 if number > 1 else 5])
    argv = [f"--data.source={scenes}", f"--data.statistics={tmp_path}/s.json", "--model.channels=tokens", "--steps=1",
            "--eval.share=0.4", "--data.sizes=native"]  # fmt: skip
    rows = evaluations(pretrain(config(tmp_path, *argv, f"--eval.source={tmp_path}/classes")))
    assert all(0.2 < row["held_out_loss"] < 3 and 0 <= row["knn"] <= 1 for row in rows.values())
    with pytest.raises(UserError, match=r"eval\.source .*labelled: 8 of 8 pictures cannot be what is meant, such as"):
        pretrain(config(tmp_path / "runs", *argv, f"--eval.source={labelled}"))


def test_the_interval_reads_one_picture_for_a_hundred_that_are_trained_on(tmp_path):
    assert interval(config(tmp_path), 0) == 0
    assert interval(config(tmp_path), 10) == 250  # of 4 pictures a step
    assert interval(config(tmp_path, "--stages=[{until: 0.5}, {batch_size: 2}]"), 9) == 300
    assert interval(config(tmp_path, "--eval.every=7"), 10) == 7
    assert EvalSets(None, None, None).pictures == 0


def test_features_of_patches_become_colours(tmp_path, labelled):
    folder = pretrain(config(tmp_path, *options(labelled, "--steps=1", "--data.sizes=native")))
    with Image.open(folder / "features/step-00000001.png") as image:
        assert image.width > 600
        assert len(set(np.asarray(image.convert("RGB")).reshape(-1, 3).max(1).tolist())) > 50


@pytest.mark.parametrize("channels", ["mixed", "tokens"])
def test_features_of_patches_are_those_of_the_published_backbone(tmp_path, channels):
    settings = config(tmp_path, f"--model.channels={channels}", "--model.num_registers=1", "--model.patch_size=8")
    encoder = build_model(settings).encoder.eval()
    images = [torch.randn(3, 16, 32, generator=generator(k)) for k in range(2)] + [torch.randn(3, 32, 8)]
    with torch.no_grad():
        got = patch_features(encoder, images)
    for ours, theirs in zip(got, compute(encoder, images, Selection(("patches",))), strict=True):
        torch.testing.assert_close(ours, theirs["patches"], rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(encoder)


def test_a_resumed_run_holds_out_the_same_pictures(tmp_path, labelled):
    argv = options(labelled, "--steps=1", "--eval.pictures=4")
    pretrain(config(tmp_path, *argv))
    again = ("--resume", "--steps=2", "--eval.pictures=4")
    with pytest.raises(UserError, match="other pictures are held out than when the run began"):
        pretrain(config(tmp_path, *options(labelled, *again)[1:], f"--data.source={labelled}"))
    pretrain(config(tmp_path, *options(labelled, *again)))


def test_a_probe_of_more_classes_than_pictures_is_refused(tmp_path, labelled):
    for split in ("train", "val"):
        (labelled / split / "third").mkdir()
        shutil.copy(labelled / split / "tall/1.png", labelled / split / "third")
    line = r"eval\.pictures is 2: it must be as many as eval\.source has classes, 3"
    with pytest.raises(UserError, match=line):
        pretrain(config(tmp_path, *options(labelled, "--eval.pictures=2")))


def test_features_that_are_no_numbers_are_drawn(tmp_path):
    maps = [torch.full((2, 3, 8), torch.nan), torch.randn(2, 3, 8)]
    draw_maps(torch.zeros(2, 3, 16, 24), maps, RGB, tmp_path / "features/step-1.png")
    with Image.open(tmp_path / "features/step-1.png") as page:
        assert page.width > page.height


AS_ON_A_GPU = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/kernels"]
from launch.run.cli import leave, run
from pretrain.main import main
from vim_backbone.vim import PatchEmbed
PatchEmbed.project = PatchEmbed.as_product  # the projection's weights without its module
if __name__ == "__main__":
    leave(run(main))
"""


@pytest.mark.slow
def test_zero_3_shows_and_evaluates_with_the_products_of_a_gpu(tmp_path, labelled):
    (tmp_path / "main.py").write_text(AS_ON_A_GPU.format(root=str(ROOT)))
    argv = options(labelled, "--steps=2", "--picture_every=1", "--eval.every=1")
    folder = run_command(tmp_path / "zero3", "zero3", *argv, script=tmp_path / "main.py")
    assert list(evaluations(folder)) == [0, 1, 2]
    assert len(list((folder / "features").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "sizes"), [("ddp", "fixed"), ("zero3", "native")])
def test_two_processes_measure_what_one_does(tmp_path, labelled, strategy, sizes):
    """Shares of one picture more and less, and one that cannot be read."""
    (labelled / "val/tall/0.png").write_bytes(b"broken")
    argv = options(labelled, "--steps=2", "--eval.every=1", "--eval.share=0.5", f"--data.sizes={sizes}")
    folder, alone = (run_command(tmp_path / name, name, *argv) for name in (strategy, "one"))
    for step, row in evaluations(alone).items():
        assert evaluations(folder)[step] == pytest.approx(row, rel=1e-4)
    drawn = [np.asarray(Image.open(run / "features/step-00000002.png").convert("L"), float) for run in (folder, alone)]
    assert np.abs(drawn[0] - drawn[1]).mean() < 1
