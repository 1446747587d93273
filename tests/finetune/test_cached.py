"""Labelled pictures decoded once: an evaluation sees what the readers give, training resumes exactly."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.batches import training_batches
from finetune.classification.config import ClassificationConfig
from finetune.classification.task import ClassificationTask
from finetune.train import finetune
from launch.data.order import BatchPlan
from launch.run.cli import parse
from tests.finetune.test_batches import shares
from tests.rows import read_metrics
from vim_backbone import UserError
from vim_backbone.preprocessing import IMAGENET_STD

PLAIN = ["--augment.auto_augment=null", "--augment.mixup=0", "--augment.cutmix=0", "--augment.erasing=0",
         "--augment.color_jitter=0", "--augment.min_scale=0.5", "--model.drop_path_rate=0"]  # fmt: skip
LEVEL = 1 / 255 / min(IMAGENET_STD)


@pytest.fixture
def folder(tmp_path):
    """12 pictures of noise, 24 x 30 px, to train on, and 7 to evaluate on, in two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 7)):
        for number in range(count):
            path = tmp_path / "data" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def config(backbone, folder, tmp_path):
    def make(*argv):
        options = [
            f"--backbone={backbone}", f"--out={tmp_path}", f"--data.source={folder}", "--batch_size=6", "--log_every=1",
            "--data.workers=0", "--trackers=[]", "--data.cache=device", *PLAIN, *argv,
        ]  # fmt: skip
        return parse(ClassificationConfig, options, "finetune/main.py", "")

    return make


def prepared(config):
    task = ClassificationTask(config)
    task.prepare(torch.device("cpu"))
    return task


@pytest.mark.parametrize("options", [(), ("--augment.crop_pct=0.6",), ("--model.img_size=64",)])
@pytest.mark.parametrize("world", [1, 2])
def test_an_evaluation_sees_what_the_readers_give(config, options, world):
    kept, read = prepared(config(*options)), ClassificationTask(config(*options))
    both = [[batch for share in shares(samples, world, 4) for batch in share] for samples in (kept.val, read.val)]
    assert sum(sum(batch.counted) for batch in both[0]) == 7
    for ours, theirs in zip(*both, strict=True):
        assert (ours.numbers, ours.counted, ours.names) == (theirs.numbers, theirs.counted, theirs.names)
        assert torch.equal(ours.targets, theirs.targets)
        assert (ours.images - theirs.images).abs().max() < 2.01 * LEVEL


def test_training_crops(config):
    plan = BatchPlan(6, 1, 1, 0)
    task = prepared(config())
    whole = list(training_batches(task.train, 3, plan, 0, 20, 0))
    assert len(torch.cat([b.images for b in whole]).flatten(1).unique(dim=0)) == 120
    rest = list(training_batches(task.train, 3, plan, 17, 20, 0))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[17:], rest, strict=True))
    halves = [list(training_batches(task.train, 3, BatchPlan(6, 1, 2, rank), 0, 20, 0)) for rank in range(2)]
    assert torch.equal(torch.cat([half[4].images for half in halves]), whole[4].images)
    upright = prepared(config("--augment.flip=0"))
    turned = 0
    for a, b in zip(whole, training_batches(upright.train, 3, plan, 0, 20, 0), strict=True):
        for ours, theirs in zip(a.images, b.images, strict=True):
            assert torch.equal(ours, theirs) or torch.equal(ours, theirs.flip(-1))
            turned += not torch.equal(ours, theirs)
    assert 40 < turned < 80
    for b in whole:
        assert ["ab".index(name.split("/")[-2]) for name in b.names] == b.targets.tolist()


def test_a_run_resumes_exactly(config, tmp_path):
    def losses(folder):
        return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]

    whole = finetune(ClassificationTask(config("--steps=4", "--checkpoint_every=2", "--ema_decay=0.9")))
    cut = tmp_path / "cut/classification"
    shutil.copytree(whole, cut)
    for part in ("checkpoints/step-00000004", "model", "backbone", "evaluations"):
        shutil.rmtree(cut / part)
    options = ("--steps=4", "--checkpoint_every=2", "--ema_decay=0.9", f"--out={tmp_path}/cut", "--resume")
    finetune(ClassificationTask(config(*options)))
    assert losses(cut) == losses(whole)


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_probes_score_as_they_do_of_what_is_read(config, mode):
    scores = []
    for cache in ("none", "device"):
        options = (f"--mode={mode}", "--probe.neighbours=3", f"--data.cache={cache}", f"--name={cache}")
        (path,) = finetune(ClassificationTask(config(*options))).glob("evaluations/*/metrics.json")
        scores.append(json.loads(path.read_text()))
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=0.02)
    assert scores[0]["samples"] == scores[1]["samples"] == 7


def test_bad_pictures_are_named_and_not_counted(config, folder):
    (folder / "val/a/2.png").write_bytes(b"damaged")
    ((batch,),) = shares(prepared(config()).val, 1, 7)
    assert batch.counted.count(False) == 1
    assert [name.endswith("a/2.png") for name, _ in batch.bad] == [True]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--augment.auto_augment=rand-m9",), r"data\.cache is 'device': .* set augment\.auto_augment null"),
        (("--augment.color_jitter=0.3",), r"data\.cache is 'device': .* set augment\.color_jitter 0"),
        (("--augment.erasing=0.2",), r"data\.cache is 'device': .* set augment\.erasing 0"),
        (("--model.img_size=[32,64]",), r"model\.img_size is \[32, 64\]: data\.cache device is for squares"),
    ],
)
def test_what_is_not_done_is_one_line(config, argv, words):
    with pytest.raises(UserError, match=words):
        prepared(config(*argv))


def test_probes_need_no_augmentation(config):
    assert prepared(config("--mode=knn", "--augment.erasing=0.2")).train.centre
