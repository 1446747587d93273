"""The three tasks start from a published backbone with the pooled scan, train it, and keep its scan and share."""

import math

import pytest
import torch

from finetune.classification.config import ClassificationConfig
from finetune.classification.task import ClassificationTask
from finetune.detection.config import DetectionConfig
from finetune.detection.task import DetectionTask
from finetune.segmentation.config import SegmentationConfig
from finetune.segmentation.task import SegmentationTask
from finetune.train import finetune
from launch.run.cli import parse
from tests.finetune import test_classification, test_detection, test_segmentation
from tests.finetune.conftest import ARCHITECTURE
from tests.rows import read_metrics
from vim_backbone import VimConfig, VisionMamba

TASKS = {
    "classification": (ClassificationConfig, ClassificationTask, test_classification.SMALL),
    "segmentation": (SegmentationConfig, SegmentationTask, test_segmentation.SMALL),
    "detection": (DetectionConfig, DetectionTask, test_detection.SMALL),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_trains_a_pooled_backbone(name, sample_data, tmp_path):
    torch.manual_seed(0)
    pooled = {"scan": "pooled", "class_token": "none", "global_pool": "avg", "mixer_norm": True, "visible_share": 0.25}
    published = VisionMamba(VimConfig.from_dict(ARCHITECTURE | pooled)).save_pretrained(tmp_path / "published")
    settings, task, options = TASKS[name]
    argv = [*options, f"--backbone={published}", f"--out={tmp_path}", f"--data.source={sample_data(name)}", "--steps=2"]
    folder = finetune(task(parse(settings, argv, "finetune/main.py", "")))
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    texts = [path.read_text() for path in folder.rglob("config.json")]
    assert texts
    assert all('"scan": "pooled"' in text and '"visible_share": 0.25' in text for text in texts)
