"""Pictures that are decoded once are those that are read each time, and are read no more."""

import shutil

import numpy as np
import psutil
import pytest
import torch

from finetune.batches import training_batches
from finetune.detection.config import DetectionConfig, DetectionData, JitterConfig
from finetune.detection.data import TrainPictures, open_coco
from finetune.detection.task import DetectionTask
from finetune.memory_cache import TensorCache
from finetune.segmentation.config import CropConfig, SegmentationConfig, SegmentationData
from finetune.segmentation.data import TrainCrops, class_names, open_pairs
from finetune.segmentation.task import SegmentationTask
from finetune.train import finetune
from launch.data.images import BadPictureError
from launch.data.order import BatchPlan
from launch.run.cli import parse
from tests.rows import read_metrics
from vim_backbone import UserError


def crops_of(folder):
    data = SegmentationData(source=str(folder))
    return TrainCrops(open_pairs(data, "training", class_names(data))[0], (24, 40), CropConfig())


def batches_of(samples, workers):
    plan = BatchPlan(batch_size=6, accumulation=1, world=1, rank=0)
    return list(training_batches(samples, 5, plan, 0, 6, workers))


def test_tensors_of_any_shape_and_type_come_back():
    samples = [(torch.rand(3, 5), torch.arange(7, dtype=torch.uint8)[1:6]), (torch.full((0, 2), 1.5),), ()]
    cache = TensorCache(samples.__getitem__, 3, workers=2)
    for index, tensors in enumerate(samples):
        assert len(cache[index]) == len(tensors)
        for back, tensor in zip(cache[index], tensors, strict=True):
            assert (back.dtype, back.tolist()) == (tensor.dtype, tensor.tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_are_the_same_and_files_are_not_read_again(workers, sample_data, tmp_path):
    folder = shutil.copytree(sample_data("segmentation"), tmp_path / "data")
    expected = batches_of(crops_of(folder), 0)
    crops = crops_of(folder)
    crops.fill_cache()
    shutil.rmtree(folder)
    batches = batches_of(crops, workers)
    assert len(batches) == len(expected) == 6  # 24 pictures: into the second epoch
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.targets, other.targets)
        assert batch.names == other.names


def test_pictures_of_a_detector_are_the_same(sample_data):
    split = open_coco(DetectionData(source=str(sample_data("detection"))), "train", masks=True)
    read, cached = (TrainPictures(split, (40, 40), JitterConfig(), masks=True) for _ in range(2))
    cached.fill_cache(workers=1)
    for batch, other in zip(batches_of(cached, 0), batches_of(read, 0), strict=True):
        assert torch.equal(batch.images, other.images)
        for target, expected in zip(batch.targets, other.targets, strict=True):
            assert {name: value.tolist() for name, value in target.items()} == {
                name: value.tolist() for name, value in expected.items()
            }


def test_a_bad_picture_is_passed_over_as_ever(sample_data, tmp_path):
    folder = shutil.copytree(sample_data("segmentation"), tmp_path / "data")
    first = min((folder / "images/training").iterdir())
    crops = crops_of(folder)
    first.write_bytes(first.read_bytes()[:300])
    expected = [(batch.names, batch.bad) for batch in batches_of(crops, 0)]
    crops.fill_cache()
    assert [(batch.names, batch.bad) for batch in batches_of(crops, 0)] == expected
    assert any(first.name in name for _, bad in expected for name, _ in bad)
    with pytest.raises(BadPictureError):
        crops.pair(0)


def test_what_does_not_fit_the_memory_is_one_line(monkeypatch):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=8000))
    TensorCache(lambda index: (torch.zeros(500),), 2, workers=1)
    with pytest.raises(UserError, match=r"data\.cache is 'memory': 3 of 100 samples take 0\.0 GB, and each .* none"):
        TensorCache(lambda index: (torch.zeros(500),), 100, workers=1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 of 2 samples"):
        TensorCache(lambda index: (torch.zeros(500),), 2, workers=1)


@pytest.mark.parametrize(
    ("task", "config", "more"),
    [
        (SegmentationTask, SegmentationConfig, ["--head.channels=16", "--head.auxiliary_channels=16"]),
        (DetectionTask, DetectionConfig, ["--head.channels=16", "--head.proposals=20"]),
    ],
)
def test_a_run_has_the_same_losses(task, config, more, backbone, sample_data, tmp_path):
    words = ["--batch_size=4", "--steps=2", "--log_every=1", "--trackers=[]", "--pictures=1", *more,
             f"--backbone={backbone}", f"--data.source={sample_data(task.name)}", f"--out={tmp_path}",
             "--model.drop_path_rate=0"]  # fmt: skip
    losses = {}
    for cache, workers in (("none", 0), ("memory", 2)):
        own = [f"--name={cache}", f"--data.cache={cache}", f"--data.workers={workers}"]
        folder = finetune(task(parse(config, [*words, *own], "finetune/main.py", "")))
        losses[cache] = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert losses["memory"] == losses["none"]
    assert len(losses["none"]) == 2
    assert np.isfinite(losses["none"]).all()
