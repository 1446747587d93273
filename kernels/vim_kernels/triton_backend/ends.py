"""The ends of a part of a sequence, whose convolution sees a halo: the same kernels make these few rows again.

Shapes: b batch, l tokens of the part, d channels, k = w - 1 tokens of the halo at either end. Ends are a batch
(2 b, 2 k, d): halo and first tokens of every row, then its last tokens and halo. Direction 0 sees the first halo,
direction 1 the second; l is k at least.
"""

import torch
from torch import Tensor


def ends_of(x: Tensor, halo: Tensor) -> Tensor:
    """X (b, l, d) and halo (b, 2 k, d) -> ends."""
    before, behind = halo.chunk(2, dim=1)
    k = before.shape[1]
    return torch.cat([torch.cat([before, x[:, :k]], dim=1), torch.cat([x[:, -k:], behind], dim=1)])


def write_ends(whole: list[Tensor], ends: list[Tensor], length: int, k: int) -> None:
    """Rows that see a halo, of all that is made of x, each (2, b l, c), from what is made of ends, (2, 2 b 2 k, c)."""
    pairs = [_by_end(*each, length, k) for each in zip(whole, ends, strict=True)]
    rows, of_rows = ([row for pair in pairs for row in pair[i]] for i in range(2))
    torch._foreach_copy_(rows, of_rows)  # pyright: ignore[reportPrivateImportUsage] - one call for all


def take_ends(du: Tensor, length: int, k: int) -> Tensor:
    """Gradients du (2, b l, d) -> those of ends (2, 2 b 2 k, d): they have the rows that see a halo, du has 0 there."""
    of_ends = du.new_zeros(2, du.shape[1] // length * 4 * k, du.shape[2])
    rows, of_rows = _by_end(du, of_ends, length, k)
    for row, of_row in zip(rows, of_rows, strict=True):
        of_row.copy_(row)
        row.zero_()
    return of_ends


def add_ends(dx: Tensor, dends: Tensor) -> Tensor:
    """Add to dx (b, l, d) the part of dends (2 b, 2 k, d) that is of x; returns that of the halo (b, 2 k, d)."""
    k = dends.shape[1] // 2
    first, last = dends.chunk(2)
    dx[:, :k] += first[:, k:]
    dx[:, -k:] += last[:, :k]
    return torch.cat([first[:, :k], last[:, k:]], dim=1)


def _by_end(whole: Tensor, ends: Tensor, length: int, k: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Views (b, k, c) of the rows that see a halo, of either direction."""
    whole = whole.view(2, -1, length, whole.shape[2])
    ends = ends.view(2, 2, -1, 2 * k, ends.shape[2])
    return (whole[0, :, :k], whole[1, :, -k:]), (ends[0, 0, :, k:], ends[1, 1, :, :k])
