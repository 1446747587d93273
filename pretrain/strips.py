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
    samples = len(strips)
    rows = -(-samples // 2)
    height, width = (max(sample.shape[axis] for sample in strips) for axis in (1, 2))
    figure = Figure(figsize=(13, 0.9 + rows * (2.15 * height / width)), dpi=100, layout="constrained")
    axes = figure.subplots(rows, 6 if samples > 1 else 3, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, sample in enumerate(strips):
        for column, (image, label) in enumerate(zip(sample, columns, strict=True)):
            axis = axes[index // 2][(index % 2) * 3 + column]
            axis.imshow(image, interpolation="nearest")
            if index < 2:
                axis.set_title(label, fontsize=11)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
