"""Features of patches to look at: their principal components as colours."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from launch.embedding.pages import draw_components, thumbnail
from vim_backbone.preprocessing import Preprocessing
from vim_backbone.vim import Images

FEATURES = "features"
"""Folder of the run that takes the pictures."""
LARGEST = 64
"""Rows and columns of features of a picture, above which they are averaged."""


def draw_maps(
    images: Images, maps: Sequence[Tensor], names: list[str], preprocessing: Preprocessing, path: Path
) -> None:
    """Draw each picture over the features of its patches (rows, columns, d) as colours, as a PNG."""
    path.parent.mkdir(exist_ok=True)
    small = []
    for patches in maps:
        sides = min(patches.shape[0], LARGEST), min(patches.shape[1], LARGEST)
        small.append(adaptive_avg_pool2d(patches.cpu().permute(2, 0, 1), sides).permute(1, 2, 0))
    draw_components(path, [thumbnail(image[None], preprocessing) for image in images], small, names)
