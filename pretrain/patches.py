"""Pixels by patches: what objectives that rebuild pixels compare, and how it becomes a picture again.

Shape letters: b batch, c channels, l patches, p pixels of a patch (side * side * channels).
"""

import torch
from torch import Tensor

from vim_backbone.vim import Images


def patchify(images: Images, side: int) -> Tensor:
    """(b, c, h, w) -> (b, l, p): patches row by row; within a patch row, column, channel. A list gives one row."""
    if not isinstance(images, Tensor):
        return torch.cat([patchify(image[None], side) for image in images], dim=1)
    b, c, h, w = images.shape
    grid = images.reshape(b, c, h // side, side, w // side, side)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // side) * (w // side), side * side * c)


def unpatchify(patches: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`."""
    b, (rows, columns) = len(patches), grid
    image = patches.reshape(b, rows, columns, side, side, -1).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(b, -1, rows * side, columns * side)


def normalise(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each patch with mean 0 and deviation 1 (b, l, p), and that mean and deviation (b, l, 1)."""
    patches = patches.float()
    mean = patches.mean(-1, keepdim=True)
    deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation


def without_hidden(pixels: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """An image (c, h, w) in [0, 1] whose hidden patches, by the mask (l,), are grey."""
    patches = patchify(pixels[None], patch_size)
    grid = (pixels.shape[1] // patch_size, pixels.shape[2] // patch_size)
    return unpatchify(torch.where(mask[None, :, None].to(patches.device), 0.35, patches), patch_size, grid)[0]
