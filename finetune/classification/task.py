"""Classification as a task: fine-tuning with DeiT's augmentation, and probes of frozen features."""

from typing import Any

import torch
from accelerate import Accelerator
from timm.data.mixup import Mixup
from torch import Tensor, nn

from finetune.backbone import read_backbone, read_preprocessing_of
from finetune.classification.cached import CachedSamples
from finetune.classification.config import ClassificationConfig
from finetune.classification.data import ClassSamples
from finetune.classification.evaluate import METRICS, evaluate
from finetune.classification.model import Classifier
from finetune.classification.predict import ClassificationPredictor
from finetune.classification.probes import probe
from finetune.classification.transforms import evaluation_transform, training_transform
from finetune.pixels import on_device
from finetune.task import BatchedSamples, EvaluationResult, LabelledBatch, Samples, Task
from launch.data.cache import decoded
from launch.data.first_look import look_at_first
from launch.data.labelled import missing_classes, open_labelled
from launch.run.randomness import seeded
from vim_backbone import UserError
from vim_backbone.errors import require
from vim_backbone.folder import read_config
from vim_backbone.hub import find_backbone


class ClassificationTask(Task[ClassificationConfig]):
    """Fine-tuning with DeiT's augmentation; top-1 and top-5."""

    name = "classification"
    summary = "One class a picture: fine-tune, linear probe, kNN."
    config_class = ClassificationConfig
    metrics = METRICS
    predictor = ClassificationPredictor

    def __init__(self, config: ClassificationConfig) -> None:
        self.config = config
        folder = find_backbone(config.backbone)
        head_classes = read_config(folder).num_classes
        train, val = open_labelled(config.data, config.seed)
        self.classes = train.classes
        num_classes = 0 if config.mode in ("linear", "knn") else len(self.classes)
        if config.mode == "evaluate" and not config.resume and head_classes != num_classes:
            raise UserError(
                f"{config.backbone} has a head of {head_classes} classes and data.source {num_classes}: fine-tune it "
                "first (mode train), or evaluate a run with --resume"
            )
        preprocessing = read_preprocessing_of(folder, config.data)
        self.pretrained = read_backbone(folder, config.model, config.seed, num_classes, preprocessing)
        look_at_first(train.source, preprocessing, config.data.max_megapixels)
        size = self.pretrained.config.img_size
        centre = evaluation_transform(size, config.augment.crop_pct, preprocessing)
        frozen = config.mode in ("linear", "knn")
        augmented = centre if frozen else training_transform(size, config.augment, preprocessing)
        self.train = ClassSamples(train, augmented, preprocessing, config.data.max_megapixels)
        self.val = ClassSamples(val, centre, preprocessing, config.data.max_megapixels)
        absent = missing_classes(val)
        self.notes = [f"{len(absent)} classes have no picture to evaluate on, {absent[0]!r} first"] if absent else []
        if preprocessing.bands is not None and not frozen:
            self.notes.append("pictures of bands are cropped, mirrored and erased; auto_augment is for RGB")
        augment = config.augment
        self.mixup = None
        mixed = config.mode == "train" and (augment.mixup or augment.cutmix)
        if mixed and preprocessing.channel_sets is not None:
            self.notes.append("pictures hold different bands and are not mixed: no mixup, no cutmix")
        elif mixed:
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=num_classes
            )

    def prepare(self, device: torch.device) -> None:
        """Decode the pictures and keep them there, where `data.cache` asks for it."""
        if self.config.data.cache == "none":
            return
        self.val = self._kept(self.val, device, centre=True)
        if self.config.mode != "evaluate":
            self.train = self._kept(self.train, device, centre=self.config.mode != "train")

    def _kept(self, samples: Samples | BatchedSamples, device: torch.device, *, centre: bool) -> CachedSamples:
        assert isinstance(samples, ClassSamples)
        data, preprocessing = self.config.data, self.pretrained.preprocessing
        size = self.pretrained.config.img_size
        require(size[0] == size[1], "model.img_size", list(size), "data.cache device is for squares; set it none")
        sets = preprocessing.channel_sets
        require(sets is None, "data.cache", data.cache, "its pictures have the same bands; set data.cache none")
        pictures = decoded(samples.data.source, preprocessing, data.max_megapixels, data.workers, device)
        return CachedSamples(pictures, samples.data.labels, size[0], self.config.augment, preprocessing, centre=centre)

    def new_model(self) -> Classifier:
        """The classifier with fresh weights."""
        return Classifier(self.pretrained.config)

    def losses(
        self, model: nn.Module, batch: LabelledBatch, device: torch.device, key: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Cross-entropy with mixup, cutmix and smoothing."""
        images, targets = on_device(batch.images, device), batch.targets.to(device, non_blocking=True)
        smoothing = self.config.augment.smoothing
        if self.mixup is not None:
            assert isinstance(images, Tensor)
            if len(images) % 2:
                raise UserError(f"a forward pass has {len(images)} pictures: mixup needs an even number of them")
            with seeded(*key):
                images, targets = self.mixup(images, targets)
            smoothing = 0.0  # it is in the targets
        return {"cross_entropy": model(images, targets, smoothing)}

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> EvaluationResult:
        """Top-1 and top-5, or what a probe of the frozen features gets."""
        if self.config.mode in ("linear", "knn"):
            return probe(self, model, accelerator)
        return evaluate(self, model, accelerator)

    def description(self) -> dict[str, Any]:
        """Classes, architecture, and how pictures are cut."""
        return super().description() | {"crop_pct": self.config.augment.crop_pct}
