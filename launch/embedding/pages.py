"""Features to look at: principal components of patches as colours, and the nearest neighbours of samples."""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from vim_backbone.files import write_atomically
from vim_backbone.preprocessing import Preprocessing, as_rgb, to_pixels

SIDE = 256
"""Longer side of a picture that is drawn, in pixels."""
CELL = 2.0
"""Side of a picture on the page, in inches."""
NEIGHBOURS = 5
NAME = 28
"""Last characters of a picture's name that are written."""
Look = Callable[[int], Tensor]
"""Index of a picture -> the picture (3, h, w) in [0, 1], small."""


def thumbnail(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The model's input (1, c, h, w) -> (3, h, w) in [0, 1], at most SIDE."""
    pixels = as_rgb(to_pixels(image.cpu(), preprocessing))
    scale = min(1.0, SIDE / max(pixels.shape[-2:]))
    size = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def principal_colours(maps: list[Tensor]) -> list[Tensor]:
    """Patches (rows, columns, d) of some pictures -> (rows, columns, 3) in [0, 1]: their first principal components.

    The components are those of all patches together, each from its lowest to its highest hundredth.
    """
    patches = torch.cat([patch.flatten(0, 1) for patch in maps]).double()
    centred = patches - patches.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.T.flip(0)[:3]  # d x d, however many patches there are
    signs = torch.sign(
        axes.gather(1, axes.abs().argmax(1, keepdim=True))
    )  # an axis has no direction: the same each time
    values = centred @ (axes * signs).T
    low, high = values.quantile(0.01, 0), values.quantile(0.99, 0)
    colours = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = F.pad(colours, (0, 3 - colours.shape[1]))
    pieces = colours.split([patch.shape[0] * patch.shape[1] for patch in maps])
    return [piece.unflatten(0, patch.shape[:2]) for piece, patch in zip(pieces, maps, strict=True)]


def nearest_neighbours(features: Tensor, rows: list[int], count: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Rows of features (n, d) most like the chosen ones by cosine, without themselves -> cosines, rows (k, count)."""
    unit = F.normalize(features.double(), dim=1)
    cosines = unit[rows] @ unit.T
    cosines[torch.arange(len(rows)), rows] = -torch.inf
    nearest = cosines.topk(min(count, len(features) - 1), dim=1)
    return nearest.values, nearest.indices


def draw_components(path: Path, pictures: list[Tensor], maps: list[Tensor], names: list[str]) -> None:
    """Each picture over the colours of its patches."""
    figure = Figure(figsize=(CELL * len(pictures), 2 * CELL + 0.4), layout="constrained")
    axes = figure.subplots(2, len(pictures), squeeze=False)
    for column, (picture, colours, name) in enumerate(zip(pictures, principal_colours(maps), names, strict=True)):
        _show(axes[0, column], picture, name)
        _show(axes[1, column], colours.permute(2, 0, 1), "")
    figure.suptitle("The first three principal components of the patches' features as red, green and blue")
    _save(figure, path)


def draw_neighbours(
    path: Path, samples: list[int], cosines: Tensor, nearest: Tensor, look: Look, name: Callable[[int], str]
) -> None:
    """Each sample, and beside it the pictures whose features are most like its; all by their index in the source."""
    figure = Figure(figsize=(CELL * (1 + nearest.shape[1]), (CELL + 0.25) * len(samples)), layout="constrained")
    axes = figure.subplots(len(samples), 1 + nearest.shape[1], squeeze=False)
    for row, sample in enumerate(samples):
        _show(axes[row, 0], look(sample), name(sample))
        for place, (cosine, index) in enumerate(
            zip(cosines[row].tolist(), nearest[row].tolist(), strict=True), start=1
        ):
            _show(axes[row, place], look(index), f"{cosine:.3f}  {name(index)[-NAME + 7 :]}")
    figure.suptitle("Samples, and the pictures whose pooled features are most like theirs (cosine)")
    _save(figure, path)


def _show(axis: mpl.axes.Axes, picture: Tensor, title: str) -> None:  # pyright: ignore[reportAttributeAccessIssue]
    axis.imshow(picture.permute(1, 2, 0).float().numpy(), interpolation="nearest")
    axis.set_title(title[-NAME:], fontsize=7, parse_math=False)
    axis.axis("off")


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda aside: figure.savefig(aside, dpi=100, format="png"))
