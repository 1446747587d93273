"""A part of a picture at the size of a view, by Pillow or by PyTorch's kernel for bytes."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Resizer = Literal["pillow", "torch"]
GAP = 3.0
"""Pillow's `reducing_gap`: where a side shrinks to a sixth or less, blocks of pixels are averaged first."""


def resized_part(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], by: Resizer
) -> Tensor:
    """A box of an RGB picture, bicubic with antialiasing.

    PyTorch's kernel takes a quarter of Pillow's time. It sees nothing outside of the box, which is moved to whole
    pixels; of such a box cut out first its values are Pillow's but for one level of 255 (tests/launch/test_resize.py).
    Where a side shrinks to a sixth or less, Pillow does it either way.

    Args:
        box: left, upper, right and lower edge in pixels, inside of the picture.
        size: height and width.
        by: whose kernel.

    Returns:
        (3, height, width) uint8.
    """
    height, width = size
    far = max((box[2] - box[0]) / width, (box[3] - box[1]) / height) >= 2 * GAP
    if by == "pillow" or far:
        # below that the gap changes nothing, and Pillow takes a third longer to see it
        made = image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=GAP if far else None)
        return torch.from_numpy(np.array(made)).permute(2, 0, 1)
    left, upper = (min(round(edge), full - 1) for edge, full in zip(box[:2], image.size, strict=True))
    right, lower = max(left + 1, round(box[2])), max(upper + 1, round(box[3]))
    pixels = torch.from_numpy(np.array(image.crop((left, upper, right, lower)))).permute(2, 0, 1)
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
