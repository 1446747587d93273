"""Rows and columns of pictures as the `Lines` of the pooled scan: whole or masked, a batch or packed.

Shape letters: b batch, l patches, v visible patches, n lines. Patches are counted row by row; packed, through all
pictures. The lines are made anew for every forward pass, without waiting for the device, and serve all blocks.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from vim_kernels import Lines

Grid = tuple[int, int]
"""Rows and columns of patches."""


class GridLines(NamedTuple):
    """What the blocks scan: `lines[i % 2]` belongs to block i."""

    rows: Lines
    columns: Lines


def batch_lines(
    batch: int, grid: Grid, device: torch.device, *, visible: Tensor | None = None, share: float = 1.0
) -> GridLines:
    """Of `batch` pictures of one grid.

    Args:
        visible: (b, v) patches that have tokens, in the order of the tokens: ascending. None: all.
        share: the mean over a whole line is multiplied by this share.
    """
    rows, columns = grid
    if visible is None:
        visible = torch.arange(rows * columns, device=device).expand(batch, -1)
    # flat before anything is computed: PyTorch 2.11 compiles no search in a view
    pictures = torch.arange(visible.numel(), device=device) // visible.shape[1]
    patches = visible.flatten()
    row, column = patches // columns, patches % columns
    key = (pictures * columns + column) * rows + row
    order = key.argsort()
    return GridLines(
        _lines(pictures * rows + row, key.new_full((batch * rows,), share / columns, dtype=torch.float32)),
        _lines(key[order] // rows, key.new_full((batch * columns,), share / rows, dtype=torch.float32), order),
    )


def packed_lines(
    grids: Sequence[Grid], device: torch.device, *, visible: Tensor | None = None, share: float = 1.0
) -> GridLines:
    """Of pictures packed into one row; `visible` (1, v) patches counted through all of them, else as `batch_lines`."""
    row, row_line, column_line, tallest = [], [], [], max(rows for rows, _ in grids)
    cu_rows = [0, *accumulate(rows for rows, _ in grids)]
    cu_columns = [0, *accumulate(columns for _, columns in grids)]
    for (rows, columns), row_before, column_before in zip(grids, cu_rows, cu_columns, strict=False):
        patches = torch.arange(rows * columns)
        row.append(patches // columns)
        row_line.append(row_before + patches // columns)
        column_line.append(column_before + patches % columns)
    tables = torch.stack([torch.cat(t) for t in (row, row_line, column_line)]).to(device)
    row_in_picture, line, key = tables if visible is None else tables[:, visible[0]]
    key = key * tallest + row_in_picture
    order = key.argsort()
    of_rows = torch.tensor([share / columns for rows, columns in grids for _ in range(rows)], device=device)
    of_columns = torch.tensor([share / rows for rows, columns in grids for _ in range(columns)], device=device)
    borders = [torch.tensor(cu, dtype=torch.int32, device=device) for cu in (cu_rows, cu_columns)]
    return GridLines(
        _lines(line, of_rows)._replace(cu_lines=borders[0]),
        _lines(key[order] // tallest, of_columns, order)._replace(cu_lines=borders[1]),
    )


def _lines(line_of: Tensor, weights: Tensor, order: Tensor | None = None) -> Lines:
    """From the line of every position, ascending."""
    every = torch.arange(len(weights) + 1, device=line_of.device)
    starts = torch.searchsorted(line_of, every, out_int32=True)
    return Lines(starts, line_of.int(), weights, None if order is None else order.int())
