"""Detection as a task of the fine-tuning run, and its command."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.backbone import find_backbone, read_backbone
from finetune.batches import Batch
from finetune.detection.config import DetectionConfig, TestConfig
from finetune.detection.data import TrainPictures, WholePictures, open_coco
from finetune.detection.evaluate import judge
from finetune.detection.model import Detector
from finetune.detection.tta import Views
from finetune.train import Observer, Report, Task, finetune
from vim_backbone import UserError, VimConfig
from vim_backbone.preprocessing import to_model


class DetectionTask(Task):
    """Mask R-CNN or Cascade Mask R-CNN; COCO's AP."""

    name = "detection"

    def __init__(self, config: DetectionConfig) -> None:
        self.config = config
        if config.mode == "evaluate" and not config.resume:
            raise UserError("mode evaluate needs a trained run: add --resume and the run's --name")
        train = open_coco(config.data, config.data.train_split, config.head.masks)
        self.split = open_coco(config.data, config.data.val_split, config.head.masks)
        self.classes = [category["name"] for category in train.categories]
        ours, theirs = ([c["id"] for c in split.categories] for split in (train, self.split))
        if ours != theirs:
            raise UserError(
                f"the splits of {config.data.source} have other category ids: {ours[:9]} to train on, {theirs[:9]} "
                "to evaluate on"
            )
        self.pretrained = read_backbone(find_backbone(config.backbone), config.model, config.seed, 0)
        size = self.pretrained.config.img_size
        self.train = TrainPictures(train, size, config.jitter, config.head.masks)
        self.views = views_of(self.pretrained.config, config.test, config.head.detections)
        self.val = WholePictures(self.split, self.views)
        self.notes = [*train.notes, *self.split.notes]

    def new_model(self) -> Detector:
        """The detector with fresh weights."""
        return Detector(self.pretrained.config, self.config.head, len(self.classes))

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, key: tuple[int, ...]) -> dict[str, Tensor]:
        """Of proposals, boxes and masks."""
        del key  # which proposals are sampled is drawn from the generator of the step
        targets = [{name: value.to(device) for name, value in target.items()} for target in batch.targets]
        return model(to_model(batch.images, device), targets)

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Report:
        """COCO's AP."""
        return judge(self, self.split, self.views, model, accelerator)

    def description(self) -> dict[str, Any]:
        """Classes, architecture, heads."""
        return {
            "classes": self.classes,
            "category_ids": [category["id"] for category in self.split.categories],
            "backbone": self.pretrained.config.to_dict(),
            "head": asdict(self.config.head),
            "test": asdict(self.config.test),
        }


def views_of(config: VimConfig, test: TestConfig, most: int) -> Views:
    """How the config says that pictures are judged."""
    stride = config.stride

    def side(length: int, scale: float) -> int:
        return max(config.patch_size, round(scale * length / stride) * stride)

    height, width = config.img_size
    squares = [(side(height, scale), side(width, scale)) for scale in test.scales]
    return Views(squares, test.flip, most)


def run(config: DetectionConfig, observe: Observer | None = None) -> Path:
    """Train or judge; returns the run's folder."""
    return finetune(DetectionTask(config), observe)
