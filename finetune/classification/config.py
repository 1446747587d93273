"""Fields of a classification run."""

from dataclasses import dataclass, field
from typing import Literal

from finetune.config import FinetuneConfig, LabelledData
from launch.data.cache import Cache
from launch.data.labelled import LabelledSource
from vim_backbone.errors import require


@dataclass(frozen=True, kw_only=True)
class ClassificationData(LabelledSource, LabelledData):
    """Pictures with one class each."""

    cache: Cache = "none"
    """device: pictures of one size, of up to 128 px a side, are decoded once and stay on the device as bytes; the crops
    of a batch are drawn and cut there, all at once and otherwise than by readers. Without auto_augment, color_jitter
    and erasing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.source), "data.source", self.source, "give a folder with train/CLASS/*, or hf:NAME")
        require(0 <= self.holdout < 1, "data.holdout", self.holdout, "it must lie in [0, 1)")
        require(self.shots is None or self.shots >= 1, "data.shots", self.shots, "it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """DeiT's augmentation, by timm."""

    min_scale: float = 0.08
    """Smallest share of a picture's area that a random crop takes; 1 resizes the whole picture."""
    flip: float = 0.5
    """Share of the crops that are mirrored left to right."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment as timm spells it; null for none."""
    color_jitter: float = 0.3
    """Brightness, contrast and saturation, where auto_augment is null."""
    erasing: float = 0.25
    """Share of the crops from which a rectangle is erased."""
    mixup: float = 0.8
    """Alpha of mixup; 0 for none."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0 for none."""
    smoothing: float = 0.1
    """Label smoothing."""
    crop_pct: float = 0.875
    """Evaluation cuts the middle of pictures resized to img_size / crop_pct."""

    def __post_init__(self) -> None:
        require(0 < self.min_scale <= 1, "augment.min_scale", self.min_scale, "it must lie in (0, 1]")
        require(0 < self.crop_pct <= 1, "augment.crop_pct", self.crop_pct, "it must lie in (0, 1]")
        require(0 <= self.smoothing < 1, "augment.smoothing", self.smoothing, "it must lie in [0, 1)")
        for name in ("mixup", "cutmix", "color_jitter"):
            require(getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), "it cannot be negative")
        for name in ("flip", "erasing"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "it must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Evaluation of frozen features."""

    neighbours: int = 20
    """Nearest neighbours that vote, weighted by exp(cosine / temperature)."""
    temperature: float = 0.07
    """Sharpness of the vote (DINO, arXiv 2104.14294)."""
    penalties: list[float] = field(default_factory=lambda: [10.0**k for k in range(-6, 1)])
    """Penalties on the linear probe's weights to choose from, by a tenth of the training pictures held out."""

    def __post_init__(self) -> None:
        require(self.neighbours >= 1, "probe.neighbours", self.neighbours, "it must be at least 1")
        require(self.temperature > 0, "probe.temperature", self.temperature, "it must be positive")
        require(bool(self.penalties), "probe.penalties", self.penalties, "give at least one")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(FinetuneConfig):
    """Classification. Without further fields: MAE's recipe for fine-tuning a Base, for 10 epochs."""

    name: str = "classification"
    """Name of the run; its folder is OUT/NAME."""
    mode: Literal["train", "evaluate", "linear", "knn"] = "train"
    """train: fine-tune; evaluate: score what is there; linear, knn: score the frozen features."""
    data: ClassificationData
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        augment = self.augment
        if self.data.cache == "device" and self.mode == "train":
            for left_out, names in (
                (augment.auto_augment is None, "augment.auto_augment null"),
                (augment.auto_augment is not None or augment.color_jitter == 0, "augment.color_jitter 0"),
                (augment.erasing == 0, "augment.erasing 0"),
            ):
                require(left_out, "data.cache", "device", f"it does not do all augmentation; set {names}")
