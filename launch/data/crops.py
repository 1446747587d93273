"""Boxes of RandomResizedCrop: one at a time from a generator, or of a whole batch from uniform numbers."""

import numpy as np
import torch

from launch.data.pictures import Box

TRIES = 10
"""Boxes that are drawn before the largest centred one is taken, as torchvision does."""
NUMBERS = 4 * TRIES
"""Uniform numbers that a crop is made of: area, aspect, and place across and down, of each try."""
LOW, HIGH = np.log(3 / 4), np.log(4 / 3)
"""Logarithm of the aspect."""


def random_crop(width: int, height: int, min_scale: float, rng: torch.Generator, most: float = np.inf) -> Box:
    """Box (left, upper, right, lower) of RandomResizedCrop: area in [min_scale, 1], aspect in [3/4, 4/3], log-uniform.

    Of a picture of more than `most` pixels the area is a share of these. Falls back to the largest centred box of a
    legal aspect after ten misses, as torchvision does.
    """
    for _ in range(TRIES):
        u = torch.rand(4, generator=rng).tolist()
        area = min(width * height, most) * (min_scale + (1 - min_scale) * u[0])
        aspect = np.exp(LOW + (HIGH - LOW) * u[1])
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1))
            return left, upper, left + w, upper + h
    return centred_box(width, height, most)


def centred_box(width: int, height: int, most: float = np.inf) -> Box:
    """The largest box in the middle whose aspect is in [3/4, 4/3], of no more than `most` pixels."""
    aspect = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * aspect) or 1), min(height, round(width / aspect) or 1)
    shrink = min(1.0, (most / (w * h)) ** 0.5)
    w, h = max(1, int(w * shrink)), max(1, int(h * shrink))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def random_crops(uniforms: np.ndarray, width: int, height: int, min_scale: float) -> np.ndarray:
    """As `random_crop`, of a batch of pictures of one size: uniform numbers (b, NUMBERS) -> boxes (b, 4) int64."""
    u = uniforms.reshape(len(uniforms), TRIES, 4).astype(np.float64)
    area = width * height * (min_scale + (1 - min_scale) * u[..., 0])
    aspect = np.exp(LOW + (HIGH - LOW) * u[..., 1])
    w, h = np.rint((area * aspect) ** 0.5), np.rint((area / aspect) ** 0.5)
    left, upper = np.floor(u[..., 2] * (width - w + 1)), np.floor(u[..., 3] * (height - h + 1))
    boxes = np.stack([left, upper, left + w, upper + h], -1).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = boxes[np.arange(len(u)), fits.argmax(1)]
    return np.where(fits.any(1)[:, None], first, np.array(centred_box(width, height), np.int64))
