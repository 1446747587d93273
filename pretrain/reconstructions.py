"""The picture of what a masked autoencoder learned: input, what it saw, what it made of it."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pretrain.data import to_pixels
from pretrain.mae import patchify, unpatchify

COLUMNS = ("input", "what the encoder saw", "reconstruction")


def reconstruction_grid(pixels: Tensor, images: Tensor, masks: Tensor, patch_size: int) -> np.ndarray:
    """(n, 3 columns, h, w, 3) in [0, 1] for rebuilt and given images (n, 3, h, w), normalised, and masks (n, l)."""
    original, rebuilt = to_pixels(images), to_pixels(pixels)
    patches = patchify(original, patch_size)
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    seen = unpatchify(torch.where(masks[..., None], 0.35, patches), patch_size, grid)
    return torch.stack([original, seen, rebuilt], dim=1).permute(0, 1, 3, 4, 2).cpu().numpy()


def draw_reconstructions(grid: np.ndarray, title: str, path: Path) -> None:
    """Write the grid as a PNG, two samples a row, with a title and column names."""
    samples = len(grid)
    rows = -(-samples // 2)
    height, width = grid.shape[2:4]
    figure = Figure(figsize=(13, 0.9 + rows * (2.15 * height / width)), dpi=100, layout="constrained")
    axes = figure.subplots(rows, 6 if samples > 1 else 3, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, sample in enumerate(grid):
        for column, (image, label) in enumerate(zip(sample, COLUMNS, strict=True)):
            axis = axes[index // 2][(index % 2) * 3 + column]
            axis.imshow(image, interpolation="nearest")
            if index < 2:
                axis.set_title(label, fontsize=11)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
