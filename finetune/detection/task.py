"""Detection as a task: Mask R-CNN or Cascade Mask R-CNN; COCO's AP."""

from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.backbone import read_backbone, read_preprocessing_of
from finetune.detection.config import DetectionConfig
from finetune.detection.data import TrainPictures, WholePictures, open_coco
from finetune.detection.evaluate import METRICS, evaluate
from finetune.detection.model import Detector
from finetune.detection.predict import DetectionPredictor
from finetune.detection.tta import tta_of
from finetune.task import EvaluationResult, LabelledBatch, Task
from launch.data.first_look import look_at_first
from vim_backbone import UserError
from vim_backbone.hub import find_backbone
from vim_backbone.preprocessing import to_model


class DetectionTask(Task[DetectionConfig]):
    """Mask R-CNN or Cascade Mask R-CNN; COCO's AP."""

    name = "detection"
    summary = "Boxes and masks of objects: Mask R-CNN, Cascade; COCO's AP."
    config_class = DetectionConfig
    metrics = METRICS
    predictor = DetectionPredictor

    def __init__(self, config: DetectionConfig) -> None:
        self.config = config
        config.require_trained()
        folder = find_backbone(config.backbone)
        preprocessing = read_preprocessing_of(folder, config.data)
        train = open_coco(config.data, config.data.train_split, config.head.masks, preprocessing)
        self.classes = [category["name"] for category in train.categories]
        self.split = open_coco(config.data, config.data.val_split, config.head.masks, preprocessing, self.classes)
        ours, theirs = ([(c["id"], c["name"]) for c in split.categories] for split in (train, self.split))
        if ours != theirs:
            raise UserError(
                f"the splits of {config.data.source} have other category ids or names: {ours[:9]} to train on, "
                f"{theirs[:9]} to evaluate on"
            )
        look_at_first(train.source, preprocessing, config.data.max_megapixels)
        self.pretrained = read_backbone(folder, config.model, config.seed, 0, preprocessing)
        size = self.pretrained.config.img_size
        self.train = TrainPictures(train, size, config.jitter, config.head.masks)
        self.tta = tta_of(self.pretrained.config, config.test, config.head.detections, preprocessing)
        self.val = WholePictures(self.split, self.tta)
        self.notes = [*train.notes, *self.split.notes]
        if config.data.one_for_all:
            self.notes.append("the splits are the same file: the scores are of pictures that are trained on")

    def prepare(self, device: torch.device) -> None:
        """Decode the training pictures and hold them, where `data.cache` asks for it."""
        del device
        if self.config.data.cache == "memory" and not self.evaluates_only:
            assert isinstance(self.train, TrainPictures)
            self.train.fill_cache(self.config.data.workers)

    def new_model(self) -> Detector:
        """The detector with fresh weights."""
        return Detector(self.pretrained.config, self.config.head, len(self.classes))

    def losses(
        self, model: nn.Module, batch: LabelledBatch, device: torch.device, key: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Of proposals, boxes and masks."""
        del key  # which proposals are sampled is drawn from the generator of the step
        targets = [
            {name: value.to(device, non_blocking=True) for name, value in target.items()} for target in batch.targets
        ]
        return model(to_model(batch.images, device, self.pretrained.preprocessing), targets)

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> EvaluationResult:
        """COCO's AP."""
        return evaluate(self, self.split, self.tta, model, accelerator)

    def description(self) -> dict[str, Any]:
        """Classes, architecture, heads."""
        ids = {"category_ids": [category["id"] for category in self.split.categories]}
        rest = {"head": asdict(self.config.head), "test": asdict(self.config.test)}
        return {"classes": self.classes} | ids | super().description() | rest
