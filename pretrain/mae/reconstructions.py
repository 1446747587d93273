"""The picture of what a masked autoencoder learned: input, what it saw, what it made of it."""

import numpy as np
import torch

from pretrain.mae.model import Reconstruction
from pretrain.patches import without_hidden
from vim_backbone.preprocessing import Preprocessing, as_rgb, to_pixels
from vim_backbone.vim import Images

COLUMNS = ("input", "what the encoder saw", "prediction", "prediction with\ntrue mean and contrast")


def reconstruction_grid(
    reconstruction: Reconstruction, images: Images, masks: Images, patch_size: int, preprocessing: Preprocessing
) -> list[np.ndarray]:
    """(4 columns, h, w, 3) in [0, 1] for each image (c, h, w), normalised, what was made of it, and its mask (l,).

    Of more than three bands the first three are drawn.
    """
    strips = []
    for plain, pixels, image, mask in zip(reconstruction.plain, reconstruction.pixels, images, masks, strict=True):
        original, predicted, rebuilt = (as_rgb(to_pixels(each, preprocessing)) for each in (image, plain, pixels))
        visible = without_hidden(original, mask, patch_size)
        strips.append(torch.stack([original, visible, predicted, rebuilt]).permute(0, 2, 3, 1).cpu().numpy())
    return strips
