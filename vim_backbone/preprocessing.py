"""How pictures become input of a backbone: the normalisation, and preprocessor_config.json that says which."""

from functools import cache
from typing import Any, overload

import torch
from torch import Tensor

from vim_backbone.config import VimConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessor(config: VimConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """preprocessor_config.json, in the keys that transformers reads."""
    height, width = config.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


@overload
def to_model(images: Tensor, device: torch.device) -> Tensor: ...
@overload
def to_model(images: list[Tensor], device: torch.device) -> list[Tensor]: ...
@overload
def to_model(images: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]: ...


def to_model(images: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """(b, 3, h, w) uint8, or a list -> float on the device, normalised with ImageNet's mean and deviation."""
    if isinstance(images, list):
        return [to_model(image, device) for image in images]
    images = images.to(device, non_blocking=True).float().div_(255)
    mean, std = _mean_and_deviation(device)
    return (images - mean) / std


def to_pixels(images: Tensor) -> Tensor:
    """The inverse of `to_model`, in [0, 1]."""
    mean, std = _mean_and_deviation(images.device)
    return (images * std + mean).clamp(0, 1)


@cache
def _mean_and_deviation(device: torch.device) -> list[Tensor]:
    """ImageNet's, (3, 1, 1) each. Kept: to send them to a GPU anew for every picture would make it wait each time."""
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)]
