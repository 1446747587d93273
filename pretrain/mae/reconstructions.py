"""The picture of what a masked autoencoder learned: input, what it saw, what it made of it."""

import numpy as np
import torch

from pretrain.patches import without_hidden
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
