"""Pictures to input of a classifier, by timm: augmented for training, the middle for evaluation."""

from itertools import chain
from typing import Any

from PIL import Image, ImageOps
from timm.data.transforms_factory import create_transform

from finetune.classification.config import AugmentConfig


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
    mend_posterize(transform)
    return transform


def mend_posterize(transform: Any) -> None:
    """Have timm's augmentation ask Pillow for no less than it gives."""
    for step in transform.transforms:
        for op in [*getattr(step, "ops", []), *chain(*getattr(step, "policy", []))]:
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each value; timm asks for 0 at times, which Pillow 13 refuses: one stays then."""
    return ImageOps.posterize(image, max(1, bits)) if bits < 8 else image


def evaluation_transform(size: tuple[int, int], crop_pct: float) -> Any:
    """The middle of the picture: RGB -> (3, h, w) normalised."""
    return create_transform((3, *size), is_training=False, interpolation="bicubic", crop_pct=crop_pct)
