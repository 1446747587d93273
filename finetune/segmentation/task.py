"""Segmentation as a task: UperNet, trained on crops, evaluated on whole pictures."""

from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.backbone import read_backbone, read_preprocessing_of
from finetune.segmentation.config import SegmentationConfig
from finetune.segmentation.data import TrainCrops, WholePictures, class_names, open_pairs
from finetune.segmentation.evaluate import METRICS, evaluate
from finetune.segmentation.model import Segmenter, feature_layers
from finetune.segmentation.predict import SegmentationPredictor
from finetune.segmentation.windows import windows_of
from finetune.task import EvaluationResult, LabelledBatch, Task
from launch.data.first_look import look_at_first
from vim_backbone.hub import find_backbone
from vim_backbone.preprocessing import to_model


class SegmentationTask(Task[SegmentationConfig]):
    """UperNet; mIoU."""

    name = "segmentation"
    summary = "A class for each pixel: UperNet; mIoU."
    config_class = SegmentationConfig
    metrics = METRICS
    predictor = SegmentationPredictor

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config
        config.require_trained()
        self.classes = class_names(config.data)
        folder = find_backbone(config.backbone)
        preprocessing = read_preprocessing_of(folder, config.data)
        train, notes = open_pairs(config.data, config.data.train_split, self.classes, preprocessing)
        val, more = open_pairs(config.data, config.data.val_split, self.classes, preprocessing)
        look_at_first(train.source, preprocessing, config.data.max_megapixels)
        self.notes = [*notes, *more]
        if config.data.train_split == config.data.val_split:
            self.notes.append("the splits are the same folder: the scores are of pictures that are trained on")
        self.pretrained = read_backbone(folder, config.model, config.seed, 0, preprocessing)
        feature_layers(config.head.layers, self.pretrained.config.depth)
        size = self.pretrained.config.img_size
        self.train = TrainCrops(train, size, config.crop)
        self.val = WholePictures(val, size)

    def prepare(self, device: torch.device) -> None:
        """Decode the training pictures and hold them, where `data.cache` asks for it."""
        del device
        if self.config.data.cache == "memory" and not self.evaluates_only:
            assert isinstance(self.train, TrainCrops)
            self.train.fill_cache()

    def new_model(self) -> Segmenter:
        """The segmenter with fresh weights."""
        return Segmenter(self.pretrained.config, self.config.head, len(self.classes))

    def losses(
        self, model: nn.Module, batch: LabelledBatch, device: torch.device, key: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Cross-entropy of both heads."""
        del key  # dropout draws from the generator of the step
        images = to_model(batch.images, device, self.pretrained.preprocessing)
        return model(images, batch.targets.to(device, non_blocking=True).long())

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> EvaluationResult:
        """MIoU, mAcc, aAcc."""
        return evaluate(self, model, accelerator, windows_of(self.pretrained.config, self.config.test))

    def description(self) -> dict[str, Any]:
        """Classes, architecture, and how pictures are segmented."""
        return super().description() | {
            "head": asdict(self.config.head),
            "test": asdict(self.config.test),
            "zero_is_ignored": self.config.data.zero_is_ignored,
            "values": self.config.data.values,
        }
