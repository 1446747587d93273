"""Features of patches to look at: their principal components as colours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from launch.embedding.pages import principal_colours, thumbnail
from vim_backbone.files import write_atomically
from vim_backbone.preprocessing import Preprocessing
from vim_backbone.vim import Images

FEATURES = "features"
"""Folder of the run that takes the pictures."""
LARGEST = 64
"""Rows and columns of features of a picture, above which they are averaged."""
HEIGHT, GAP = 160, 4
"""Of a picture that is drawn, and around it, in pixels."""


def draw_maps(images: Images, maps: Sequence[Tensor], preprocessing: Preprocessing, path: Path) -> None:
    """Draw each picture above the features of its patches (rows, columns, d) as colours, as a PNG.

    `images`: (n, c, h, w), or a list of (c, h, w), as the model takes them. Features that are no numbers count as 0.

    Red, green and blue are the first three principal components of all patches together. By hand, because a figure of
    Matplotlib takes ten times as long.
    """
    small = []
    for patches in maps:
        sides = min(patches.shape[0], LARGEST), min(patches.shape[1], LARGEST)
        small.append(adaptive_avg_pool2d(patches.nan_to_num(0, 0, 0).cpu().permute(2, 0, 1), sides).permute(1, 2, 0))
    columns = []
    for image, colours in zip(images, principal_colours(small), strict=True):
        picture = thumbnail(image[None], preprocessing).permute(1, 2, 0)
        size = (max(1, round(HEIGHT * picture.shape[1] / picture.shape[0])), HEIGHT)
        rows = (_scaled(picture, size, Image.Resampling.BILINEAR), _scaled(colours, size, Image.Resampling.NEAREST))
        columns.append(np.concatenate([np.pad(row, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for row in rows]))
    path.parent.mkdir(exist_ok=True)
    page = Image.fromarray(np.concatenate(columns, axis=1)[:-GAP, :-GAP])
    write_atomically(path, lambda aside: page.save(aside, format="PNG"))


def _scaled(pixels: Tensor, size: tuple[int, int], by: Image.Resampling) -> np.ndarray:
    """(h, w, 3) in [0, 1] -> bytes of this width and height."""
    return np.asarray(Image.fromarray((pixels * 255).round().to(torch.uint8).numpy()).resize(size, by))
