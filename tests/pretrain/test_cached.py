"""Pictures decoded once: views the same whatever the processes or restarts; each source works or is refused."""

import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from launch.data import cache
from launch.data.cache import decoded
from launch.data.order import BatchPlan
from launch.data.reading import read_pixels
from launch.data.sources import WeightedSource
from launch.run.cli import parse
from launch.run.randomness import generator
from pretrain.ar.objective import AR
from pretrain.cached import cached_batches
from pretrain.config import PretrainConfig
from pretrain.data import DataConfig, View
from pretrain.mae.objective import MAE
from pretrain.masking import MaskConfig, draw_mask, draw_masks
from pretrain.nepa.objective import NEPA
from pretrain.stages import Stage
from pretrain.train import pretrain
from tests.rows import read_metrics
from vim_backbone import UserError

CPU = torch.device("cpu")


@pytest.fixture
def small(tmp_path):
    """A folder of 10 pictures of 24 x 32 px, noise."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "small"
    folder.mkdir()
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


def decode(data, max_megapixels=1.0, workers=0):
    source = data.open()
    return decoded(source, data.preprocessing, max_megapixels, workers, CPU)


def batches(data, *, start=0, steps=4, batch=6, accumulation=1, world=1, rank=0, objective=None, sizes=((16, 16),)):
    objective = objective or MAE()
    pictures = decode(data)
    each = steps // len(sizes)
    plan = BatchPlan(batch, accumulation, world, rank)
    stages = [
        Stage(range(i * each, (i + 1) * each), size, plan, i + 1, i * each * batch) for i, size in enumerate(sizes)
    ]
    view = View((16, 16), (4, 4), data, objective.draw)
    return list(cached_batches(pictures, view, objective.draw_batch, 3, stages, start))


def options(folder, **more):
    return DataConfig(source=str(folder), cache="device", **more)


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.extras, b.extras) and a.names == b.names


def test_restarts_and_processes_change_nothing(small):
    whole = batches(options(small))
    assert [b.images.shape for b in whole] == [(6, 3, 16, 16)] * 4
    assert all(same(a, b) for a, b in zip(whole[2:], batches(options(small), start=2), strict=True))
    parts = [batches(options(small), accumulation=3, world=2, rank=rank) for rank in range(2)]
    pieces = [parts[rank][part] for part in range(12) for rank in range(2)]
    assert torch.equal(torch.cat([p.images for p in pieces]), torch.cat([b.images for b in whole]))
    assert torch.equal(torch.cat([p.extras for p in pieces]), torch.cat([b.extras for b in whole]))


def test_every_view_is_its_own(small):
    whole = batches(options(small), steps=10)
    views = torch.cat([b.images for b in whole]).flatten(1)
    masks = torch.cat([b.extras for b in whole])
    assert len(views.unique(dim=0)) == len(views) == 60
    assert len(masks.unique(dim=0)) > 50
    assert set(masks.sum(1).tolist()) == {12}


def test_whole_pictures_are_what_the_readers_give(small):
    data = options(small, min_scale=1.0, flip=False)
    source = data.open()
    pictures = decode(data, workers=2)
    for index in range(10):
        with source.open(index) as picture:
            assert torch.equal(pictures.pixels[index], read_pixels(picture, data.preprocessing, 1.0))


def test_objectives_stages_and_several_sources(small):
    clusters = batches(options(small), objective=AR())
    assert torch.equal(clusters[0].extras[1], AR().draw((4, 4), generator(0)))
    assert not batches(options(small), objective=NEPA())[0].extras.any()
    both = batches(options(small), sizes=((8, 8), (16, 16)))
    assert [b.images.shape[-1] for b in both] == [8, 8, 16, 16]
    sources = [WeightedSource(source=str(small), weight=2.0), WeightedSource(source=f"{small}/../small", weight=1.0)]
    mixed = batches(DataConfig(sources=sources, cache="device"))
    names = [name for b in mixed for name in b.names]
    assert sum(name.startswith(f"{small}:") for name in names) == 16


@pytest.mark.parametrize("mask", [MaskConfig(), MaskConfig(kind="block", unit=2), MaskConfig(ratio=0.3)])
def test_masks_of_a_batch_hide_as_many_and_every_patch_alike(mask):
    masks = draw_masks((5, 7), mask, np.arange(4000, dtype=np.uint64))
    assert set(masks.sum(1).tolist()) == {draw_mask((5, 7), mask, generator(0)).sum().item()}
    one_by_one = torch.stack([draw_mask((5, 7), mask, generator(i)) for i in range(4000)])
    assert (masks.float().mean(0) - one_by_one.float().mean(0)).abs().max() < 0.05


def test_bad_pictures_are_replaced_and_named(small):
    (small / "3.png").write_bytes(b"damaged")
    whole = batches(options(small), steps=5)
    bad = [name for b in whole for name, _ in b.bad]
    names = [name for b in whole for name in b.names]
    assert bad == ["3.png"] * 3  # once in each of three passes
    assert names.count("3.png") == 0
    assert names.count("4.png") == 6


def test_a_second_run_finds_what_is_decoded(small):
    first = decode(options(small))
    again = decode(options(small))
    assert again.pixels is first.pixels
    Image.new("RGB", (32, 24)).save(small / "0.png")
    assert not decode(options(small)).pixels[0].any()


def test_a_data_set_that_is_opened_again_is_found(small, tmp_path):
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(small.iterdir())]
    rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(tmp_path / "rows.parquet")
    first = decode(options(tmp_path / "rows.parquet"))
    assert decode(options(tmp_path / "rows.parquet")).pixels is first.pixels
    assert torch.equal(first.pixels, decode(options(small)).pixels)


def test_memory_is_bounded(small, monkeypatch):
    monkeypatch.setattr(cache, "_MEMORY", {})
    monkeypatch.setattr(cache, "MOST_GIGABYTES", 2.5 * 10 * 3 * 24 * 32 / 1e9)
    for max_megapixels in (1.0, 2.0, 3.0):
        decode(options(small), max_megapixels)
    assert [key[2] for key in cache._MEMORY] == [2.0, 3.0]
    monkeypatch.setattr(cache, "MOST_GIGABYTES", 1e-6)
    with pytest.raises(UserError, match=r"10 pictures as 0.png take 0.0 GB, and it may take 0.0; set data.cache none"):
        decode(options(small), 4.0)


@pytest.mark.parametrize(
    ("size", "mode", "line"),
    [
        ((32, 25), "RGB", "takes pictures of one size, 9.png has 25 x 32 px of 3 bands, others 24 x 32 px of 3 bands"),
        ((129, 10), "RGB", "takes pictures of up to 128 px a side, 9.png has 10 x 129"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_does_not_fit_is_named(small, size, mode, line, workers):
    Image.new(mode, size).save(small / "9.png")
    with pytest.raises(UserError, match=f"^data.cache is 'device': it {line}; set data.cache none$"):
        decode(options(small), workers=workers)


@pytest.mark.parametrize(
    "wrong", [{"streaming": True}, {"sizes": "native"}, {"crop_megapixels": 1.0}, {"resize": "torch"}]
)
def test_what_cannot_be_kept_is_refused(wrong):
    with pytest.raises(UserError, match=r"^data\.cache is 'device': "):
        DataConfig(cache="device", **wrong)


def test_a_run_resumes_exactly(small, tmp_path):
    def run(folder, *more):
        words = [
            "--model.img_size=16", "--model.patch_size=4", "--model.depth=1", "--decoder.width=32", "--decoder.depth=1",
            "--batch_size=4", "--log_every=1", "--trackers=[]", "--steps=4", "--checkpoint_every=2", "--eval.share=0.3",
            f"--data.source={small}", "--data.cache=device", "--data.workers=0", f"--out={folder}", *more,
        ]  # fmt: skip
        return pretrain(parse(PretrainConfig, words, "pretrain/main.py", ""))

    def losses(folder):
        return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]

    whole = run(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "cut/pretrain")
    shutil.rmtree(tmp_path / "cut/pretrain/checkpoints/step-00000004")
    assert losses(run(tmp_path / "cut", "--resume")) == losses(whole)
    assert len(set(losses(whole))) == 4
