"""The page of an objective's pictures: of each sample a few panes side by side, as one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor


def by_patch(values: Tensor, side: int) -> Tensor:
    """A value for each patch (rows, columns) -> a picture (rows * side, columns * side)."""
    return values.repeat_interleave(side, 0).repeat_interleave(side, 1)


def draw_strips(strips: list[np.ndarray], columns: Sequence[str], title: str, path: Path) -> None:
    """Write strips (columns, h, w, 3) in [0, 1] as a PNG, two a row, with a title and the names of their columns."""
    samples, panes = len(strips), len(columns)
    rows = -(-samples // 2)
    height, width = (max(sample.shape[axis] for sample in strips) for axis in (1, 2))
    inches = 13 / (2 * panes) * height / width
    figure = Figure(figsize=(13, 1.0 + rows * inches), dpi=100, layout="constrained")
    axes = figure.subplots(rows, panes * min(samples, 2), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, sample in enumerate(strips):
        for column, (image, label) in enumerate(zip(sample, columns, strict=True)):
            axis = axes[index // 2][(index % 2) * panes + column]
            axis.imshow(image, interpolation="nearest")
            if index < 2:
                axis.set_title(label, fontsize=11 if panes < 4 else 9.5)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
