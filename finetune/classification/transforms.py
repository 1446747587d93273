"""Pictures to input of a classifier, by timm: augmented for training, the middle for evaluation."""

import math
from functools import partial
from itertools import chain
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import v2

from finetune.classification.config import AugmentConfig
from finetune.pixels import to_image
from vim_backbone.preprocessing import RGB, Preprocessing, to_model


def training_transform(size: tuple[int, int], augment: AugmentConfig, preprocessing: Preprocessing = RGB) -> Any:
    """Timm's augmentation of DeiT: pixels (c, h, w) -> (c, h, w) normalised; of bands, without that of colours."""
    if preprocessing.bands is not None:
        return v2.Compose([
            v2.RandomResizedCrop(size, (augment.min_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(augment.flip),
            v2.Lambda(partial(to_model, device=torch.device("cpu"), preprocessing=preprocessing)),
            RandomErasing(augment.erasing, mode="pixel", device="cpu"),
        ])  # fmt: skip
    transform = by_timm(
        size,
        preprocessing,
        is_training=True,
        scale=(augment.min_scale, 1.0),
        hflip=augment.flip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        re_prob=augment.erasing,
        re_mode="pixel",
    )
    mend_posterize(transform)
    return v2.Compose([v2.Lambda(to_image), transform])


def mend_posterize(transform: Any) -> None:
    """Have timm's augmentation ask Pillow for no less than it gives."""
    for step in transform.transforms:
        for op in [*getattr(step, "ops", []), *chain(*getattr(step, "policy", []))]:
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each value; timm asks for 0 at times, which Pillow 13 refuses: one stays then."""
    return ImageOps.posterize(image, max(1, bits)) if bits < 8 else image


def evaluation_transform(size: tuple[int, int], crop_pct: float, preprocessing: Preprocessing = RGB) -> Any:
    """The middle of the picture: pixels (c, h, w) -> (c, h, w) normalised."""
    if preprocessing.bands is not None:
        larger = (math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct))
        return v2.Compose([
            v2.Lambda(partial(resize_over, size=larger)),
            v2.CenterCrop(size),
            v2.Lambda(partial(to_model, device=torch.device("cpu"), preprocessing=preprocessing)),
        ])  # fmt: skip
    transform = by_timm(size, preprocessing, is_training=False, crop_pct=crop_pct)
    return v2.Compose([v2.Lambda(to_image), transform])


def by_timm(size: tuple[int, int], preprocessing: Preprocessing, **options: Any) -> Any:
    """Timm's transform of an RGB picture of Pillow's, normalised as the backbone's pictures are."""
    mean, std = preprocessing.mean, preprocessing.std
    return create_transform((3, *size), mean=mean, std=std, interpolation="bicubic", **options)


def resize_over(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels (c, h, w) in their shape, as small as covers this height and width."""
    factor = max(side / full for side, full in zip(size, pixels.shape[1:], strict=True))
    shape = [max(side, round(full * factor)) for side, full in zip(size, pixels.shape[1:], strict=True)]
    return v2.functional.resize(pixels, shape, v2.InterpolationMode.BICUBIC)
