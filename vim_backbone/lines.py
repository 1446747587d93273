"""Rows and columns of pictures as the `Lines` of the pooled scan: whole or masked, a batch or packed.

Shape letters: b batch, l patches, v visible patches, n lines, t tokens of a place. Patches are counted row by row;
packed, through all pictures. Where each channel of a patch is a token, those of one place lie in the same two lines,
and patches are counted as tokens. The lines are made anew for every forward pass, without waiting for the device, and
serve all blocks.
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
    batch: int,
    grid: Grid,
    device: torch.device,
    *,
    visible: Tensor | None = None,
    share: float = 1.0,
    tokens: int = 1,
) -> GridLines:
    """Of `batch` pictures of one grid.

    Args:
        visible: (b, v) patches that have tokens, in the order of the tokens: ascending. None: all.
        share: the mean over a whole line is multiplied by this share.
        tokens: those of a place, which `visible` then counts.
    """
    (rows, columns), width = grid, grid[1] * tokens
    if visible is None:  # nothing is sorted: an exported program takes this way
        row_line = torch.arange(batch * rows * width, device=device)
        order = row_line.view(batch, rows, columns, tokens).transpose(1, 2).flatten()
        row_line, column_line = row_line // width, row_line // (rows * tokens)
    else:
        # flat before anything is computed: PyTorch 2.11 compiles no search in a view
        pictures = torch.arange(visible.numel(), device=device) // visible.shape[1]
        patches = visible.flatten()
        row, within = patches // width, patches % width
        key = ((pictures * columns + within // tokens) * rows + row) * tokens + within % tokens
        order = key.argsort()
        row_line, column_line = pictures * rows + row, key[order] // (rows * tokens)
    weights = [
        torch.full((batch * n,), share / size, dtype=torch.float32, device=device)
        for n, size in ((rows, width), (columns, rows * tokens))
    ]
    return GridLines(_lines(row_line, weights[0]), _lines(column_line, weights[1], order))


def packed_lines(
    grids: Sequence[Grid],
    device: torch.device,
    *,
    visible: Tensor | None = None,
    share: float = 1.0,
    tokens: Sequence[int] | None = None,
) -> GridLines:
    """Of pictures packed into one row; `visible` (1, v) patches counted through all of them, else as `batch_lines`.

    `tokens`: those of a place of each picture; None for one.
    """
    tokens = tokens or [1] * len(grids)
    place, row_line, column_line = [], [], []
    tallest = max(rows * t for (rows, _), t in zip(grids, tokens, strict=True))
    cu_rows = [0, *accumulate(rows for rows, _ in grids)]
    cu_columns = [0, *accumulate(columns for _, columns in grids)]
    for (rows, columns), t, row_before, column_before in zip(grids, tokens, cu_rows, cu_columns, strict=False):
        patches = torch.arange(rows * columns * t)
        row, within = patches // (columns * t), patches % (columns * t)
        place.append(row * t + within % t)
        row_line.append(row_before + row)
        column_line.append(column_before + within // t)
    tables = torch.stack([torch.cat(part) for part in (place, row_line, column_line)]).to(device)
    place_in_column, line, key = tables if visible is None else tables[:, visible[0]]
    key = key * tallest + place_in_column
    order = key.argsort()
    sizes = [(rows, columns, t) for (rows, columns), t in zip(grids, tokens, strict=True)]
    of_rows = torch.tensor([share / (columns * t) for rows, columns, t in sizes for _ in range(rows)], device=device)
    of_columns = torch.tensor([share / (rows * t) for rows, columns, t in sizes for _ in range(columns)], device=device)
    borders = [torch.tensor(cu, dtype=torch.int32, device=device) for cu in (cu_rows, cu_columns)]
    return GridLines(
        _lines(line, of_rows)._replace(cu_lines=borders[0]),
        _lines(key[order] // tallest, of_columns, order)._replace(cu_lines=borders[1]),
    )


def _lines(line_of: Tensor, weights: Tensor, order: Tensor | None = None) -> Lines:
    """From the line of every position, ascending."""
    every = torch.arange(weights.shape[0] + 1, device=line_of.device)
    starts = torch.searchsorted(line_of, every, out_int32=True)
    return Lines(starts, line_of.int(), weights, None if order is None else order.int())
