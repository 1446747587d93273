"""The page of an objective's pictures: of each sample a few panes side by side, as one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

WIDTH, HEADER, GAP, DPI = 1300, 100, 8, 100
"""Of the page with two strips abreast, of its title and names, and between pictures, in pixels; pixels an inch."""


def by_patch(values: Tensor, side: int) -> Tensor:
    """A value for each patch (rows, columns) -> a picture (rows * side, columns * side)."""
    return values.repeat_interleave(side, 0).repeat_interleave(side, 1)


def draw_strips(strips: list[np.ndarray], columns: Sequence[str], title: str, path: Path) -> None:
    """Write strips (columns, h, w, 3) in [0, 1] as a PNG, two a row, with a title and the names of their columns.

    The pixels are put in place by hand, because axes of Matplotlib for each of them take ten times as long.
    """
    panes, abreast, rows = len(columns), min(len(strips), 2), -(-len(strips) // 2)
    height, width = (max(strip.shape[axis] for strip in strips) for axis in (1, 2))
    across = WIDTH // (2 * panes)
    wide, tall = across - GAP, round((across - GAP) * height / width)
    page = np.ones((HEADER + rows * (tall + GAP), abreast * panes * across, 3), np.float32)
    figure = Figure(figsize=(page.shape[1] / DPI, page.shape[0] / DPI), dpi=DPI)
    for index, strip in enumerate(strips):
        scale = min(tall / strip.shape[1], wide / strip.shape[2])
        y, x = (
            np.minimum(np.arange(max(1, round(size * scale))) / scale, size - 1).astype(int)
            for size in strip.shape[1:3]
        )
        top = HEADER + index // 2 * (tall + GAP) + (tall - len(y)) // 2
        for column, (image, label) in enumerate(zip(strip, columns, strict=True)):
            middle = (index % 2 * panes + column) * across + across // 2
            left = middle - len(x) // 2
            page[top : top + len(y), left : left + len(x)] = image[y][:, x]
            if index < 2:
                where = middle / page.shape[1], 1 - (HEADER - GAP) / page.shape[0]
                figure.text(*where, label, ha="center", va="bottom", fontsize=11 if panes < 4 else 9.5)
    figure.figimage(page)
    figure.text(0.5, 1 - GAP / page.shape[0], title, ha="center", va="top", fontsize=12)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
