"""Classification as a task of the fine-tuning run, and its command."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, ImageOps
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from finetune.backbone import find_backbone, read_backbone, undecayed
from finetune.batches import Batch
from finetune.classification.config import AugmentConfig, ClassificationConfig
from finetune.classification.data import ClassSamples, open_labelled
from finetune.classification.evaluate import judge
from finetune.classification.probes import probe
from finetune.train import Observer, Report, Task, finetune
from launch.run.randomness import seeded
from vim_backbone import UserError, VimConfig, VisionMamba
from vim_backbone.folder import read_config


class Classifier(nn.Module):
    """A backbone with its head, and the loss as part of the forward pass."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.backbone = VisionMamba(config)

    def forward(self, images: Tensor, targets: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """(b, 3, h, w) -> logits (b, classes); with targets, classes (b,) or shares (b, classes), the mean loss."""
        logits = self.backbone(images)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that decay would harm."""
        return undecayed(self, self.backbone)


class ClassificationTask(Task):
    """Fine-tuning with DeiT's augmentation; top-1 and top-5."""

    name = "classification"

    def __init__(self, config: ClassificationConfig) -> None:
        self.config = config
        folder = find_backbone(config.backbone)
        had = read_config(folder).num_classes
        train, val = open_labelled(config.data, config.seed)
        self.classes = train.classes
        num_classes = 0 if config.mode in ("linear", "knn") else len(self.classes)
        if config.mode == "evaluate" and not config.resume and had != num_classes:
            raise UserError(
                f"{config.backbone} has a head of {had} classes and data.source {num_classes}: fine-tune it first "
                "(mode train), or evaluate a run with --resume"
            )
        self.pretrained = read_backbone(folder, config.model, config.seed, num_classes)
        size = self.pretrained.config.img_size
        judging = judging_transform(size, config.augment.crop_pct)
        training = judging if config.mode in ("linear", "knn") else training_transform(size, config.augment)
        self.train = ClassSamples(train, training, config.data.max_megapixels)
        self.val = ClassSamples(val, judging, config.data.max_megapixels)
        self.notes: list[str] = []
        augment = config.augment
        self.mixup = None
        if config.mode == "train" and (augment.mixup or augment.cutmix):
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=num_classes
            )

    def new_model(self) -> Classifier:
        """The classifier with fresh weights."""
        return Classifier(self.pretrained.config)

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, key: tuple[int, ...]) -> dict[str, Tensor]:
        """Cross-entropy with mixup, cutmix and smoothing."""
        images, targets = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.targets))
        smoothing = self.config.augment.smoothing
        if self.mixup is not None:
            if len(images) % 2:
                raise UserError(f"a forward pass has {len(images)} pictures: mixup needs an even number of them")
            with seeded(*key):
                images, targets = self.mixup(images, targets)
            smoothing = 0.0  # it is in the targets
        return {"cross_entropy": model(images, targets, smoothing)}

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Report:
        """Top-1 and top-5, or what a probe of the frozen features gets."""
        if self.config.mode in ("linear", "knn"):
            return probe(self, model, accelerator)
        return judge(self, model, accelerator)

    def description(self) -> dict[str, Any]:
        """Classes, architecture, and how pictures are cut."""
        return {
            "classes": self.classes,
            "backbone": self.pretrained.config.to_dict(),
            "crop_pct": self.config.augment.crop_pct,
        }


def training_transform(size: tuple[int, int], augment: AugmentConfig) -> Any:
    """Timm's augmentation of DeiT: an RGB picture -> (3, h, w) normalised."""
    transform: Any = create_transform(
        (3, *size),
        is_training=True,
        scale=(augment.min_scale, 1.0),
        hflip=augment.flip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation="bicubic",
        re_prob=augment.erasing,
        re_mode="pixel",
    )
    for step in transform.transforms:
        for op in [*getattr(step, "ops", []), *chain(*getattr(step, "policy", []))]:
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each value; timm asks for 0 at times, which Pillow 13 refuses: one stays then."""
    return ImageOps.posterize(image, max(1, bits)) if bits < 8 else image


def judging_transform(size: tuple[int, int], crop_pct: float) -> Any:
    """The middle of the picture: RGB -> (3, h, w) normalised."""
    return create_transform((3, *size), is_training=False, interpolation="bicubic", crop_pct=crop_pct)


def run(config: ClassificationConfig, observe: Observer | None = None) -> Path:
    """Train or judge; returns the run's folder."""
    return finetune(ClassificationTask(config), observe)
