"""The picture of what a masked autoencoder learned: input, what it saw, what it made of it."""

import numpy as np
import torch
from torch import Tensor

from pretrain.mae.model import patchify, unpatchify
from vim_backbone.preprocessing import Preprocessing, shown, to_pixels
from vim_backbone.vim import Images

COLUMNS = ("input", "what the encoder saw", "reconstruction")


def reconstruction_grid(
    pixels: Images, images: Images, masks: Images, patch_size: int, preprocessing: Preprocessing
) -> list[np.ndarray]:
    """(3 columns, h, w, 3) in [0, 1] for each rebuilt and given image (c, h, w), normalised, and its mask (l,).

    Of more than three bands the first three are drawn.
    """
    strips = []
    for guess, image, mask in zip(pixels, images, masks, strict=True):
        original, rebuilt = (shown(to_pixels(each, preprocessing)) for each in (image, guess))
        visible = without_hidden(original, mask, patch_size)
        strips.append(torch.stack([original, visible, rebuilt]).permute(0, 2, 3, 1).cpu().numpy())
    return strips


def without_hidden(pixels: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """An image (c, h, w) in [0, 1] whose hidden patches, by the mask (l,), are grey."""
    patches = patchify(pixels[None], patch_size)
    grid = (pixels.shape[1] // patch_size, pixels.shape[2] // patch_size)
    return unpatchify(torch.where(mask[None, :, None].to(patches.device), 0.35, patches), patch_size, grid)[0]
