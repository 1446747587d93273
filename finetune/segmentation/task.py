"""Segmentation as a task of the fine-tuning run, and its command."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.backbone import find_backbone, read_backbone
from finetune.batches import Batch
from finetune.segmentation.config import SegmentationConfig, TestConfig
from finetune.segmentation.data import TrainCrops, WholePictures, class_names, open_pairs
from finetune.segmentation.evaluate import judge
from finetune.segmentation.model import Segmenter, Windows, feature_layers
from finetune.train import Observer, Report, Task, finetune
from vim_backbone import UserError, VimConfig
from vim_backbone.preprocessing import to_model


class SegmentationTask(Task):
    """UperNet, trained on crops, judged on whole pictures."""

    name = "segmentation"

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config
        if config.mode == "evaluate" and not config.resume:
            raise UserError("mode evaluate needs a trained run: add --resume and the run's --name")
        self.classes = class_names(config.data)
        train, notes = open_pairs(config.data, config.data.train_split, len(self.classes))
        val, more = open_pairs(config.data, config.data.val_split, len(self.classes))
        self.notes = [*notes, *more]
        self.pretrained = read_backbone(find_backbone(config.backbone), config.model, config.seed, 0)
        feature_layers(config.head.layers, self.pretrained.config.depth)
        size = self.pretrained.config.img_size
        self.train = TrainCrops(train, size, config.crop)
        self.val = WholePictures(val, size)

    def new_model(self) -> Segmenter:
        """The segmenter with fresh weights."""
        return Segmenter(self.pretrained.config, self.config.head, len(self.classes))

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, key: tuple[int, ...]) -> dict[str, Tensor]:
        """Cross-entropy of both heads."""
        del key  # dropout draws from the generator of the step
        return model(to_model(batch.images, device), batch.targets.to(device).long())

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Report:
        """MIoU, mAcc, aAcc."""
        return judge(self, model, accelerator, windows_of(self.pretrained.config, self.config.test))

    def description(self) -> dict[str, Any]:
        """Classes, architecture, and how pictures are segmented."""
        return {
            "classes": self.classes,
            "backbone": self.pretrained.config.to_dict(),
            "head": asdict(self.config.head),
            "test": asdict(self.config.test),
            "zero_is_ignored": self.config.data.zero_is_ignored,
        }


def windows_of(config: VimConfig, test: TestConfig) -> Windows:
    """How the config says that pictures are segmented."""
    height, width = config.img_size
    step = (max(1, int(height * test.stride)), max(1, int(width * test.stride))) if test.mode == "slide" else (0, 0)
    return Windows((height, width), step, config.stride, config.patch_size, test.flip)


def run(config: SegmentationConfig, observe: Observer | None = None) -> Path:
    """Train or judge; returns the run's folder."""
    return finetune(SegmentationTask(config), observe)
