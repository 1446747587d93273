"""Lines of tokens, the rows or columns of pictures, as the pooled scan takes them: offsets, with nothing copied.

A position is a place in scan order among the tokens of all sequences, one sequence after the other. Shape letters: t
tokens of all sequences, n lines of all sequences, s sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vim_kernels.checks import check_same_device, check_shape


class Lines(NamedTuple):
    """Which positions make a line; hidden tokens have no position, and a line may be empty."""

    starts: Tensor
    """(n + 1,) int32: line i holds the positions from starts[i] to starts[i + 1]."""
    line_of: Tensor
    """(t,) int32: the line of every position, the same said the other way round."""
    weights: Tensor
    """(n,) float32: what the sum over a line is multiplied by, 1 / tokens of a whole line for the mean."""
    order: Tensor | None = None
    """(t,) int32: the token at every position, a row of the sequences one after the other; None where tokens lie in
    scan order."""
    cu_lines: Tensor | None = None
    """(s + 1,) int32: borders of packed sequences, in lines; None where every row of a batch has as many lines."""

    @property
    def total(self) -> int:
        """Lines of all sequences."""
        return self.starts.shape[0] - 1

    def cu_seqlens(self) -> Tensor | None:
        """(s + 1,) int32 borders of packed sequences in positions; None for a batch."""
        return None if self.cu_lines is None else self.starts[self.cu_lines]


def check_lines(lines: Lines, xz: Tensor) -> None:
    """Raise ValueError or TypeError where the lines do not fit tokens xz (batch, length, channels).

    The values are read only where that costs no wait for the device (CPU tensors) and outside of tracing.
    """
    b, l, _ = xz.shape
    starts, line_of, weights, order, cu_lines = lines
    for name, tensor in (("starts", starts), ("line_of", line_of), ("order", order), ("cu_lines", cu_lines)):
        if tensor is not None and tensor.dtype != torch.int32:
            raise TypeError(f"lines.{name} has dtype {tensor.dtype}, wanted int32")
    if weights.dtype != torch.float32:
        raise TypeError(f"lines.weights has dtype {weights.dtype}, wanted float32")
    check_shape("lines.starts", starts.shape, (None,))
    check_shape("lines.line_of", line_of.shape, (b * l,))
    check_shape("lines.weights", weights.shape, (lines.total,))
    if order is not None:
        check_shape("lines.order", order.shape, (b * l,))
    if cu_lines is not None:
        check_shape("lines.cu_lines", cu_lines.shape, (None,))
        if b != 1:
            raise ValueError(f"lines.cu_lines goes with packed rows of batch 1, got batch {b}")
    elif lines.total % max(b, 1):
        raise ValueError(f"there are {lines.total} lines, wanted as many for each of {b} sequences")
    check_same_device(xz, **{f"lines.{name}": tensor for name, tensor in lines._asdict().items()})
    if xz.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(lines, b, l)


def _check_values(lines: Lines, b: int, l: int) -> None:
    starts, line_of, _, order, cu_lines = lines
    sizes = starts.diff()
    if starts[0] != 0 or starts[-1] != b * l or (sizes < 0).any():
        raise ValueError(f"lines.starts must rise from 0 to {b * l}, the number of tokens, got {starts.tolist()}")
    if not torch.equal(line_of, torch.repeat_interleave(sizes).int()):
        raise ValueError("lines.line_of is not the line of every position that lines.starts says")
    if order is not None and b * l and (order.min() < 0 or order.max() >= b * l):
        raise ValueError(f"lines.order runs from {order.min()} to {order.max()}, wanted tokens from 0 to {b * l - 1}")
    if cu_lines is not None:
        if cu_lines[0] != 0 or cu_lines[-1] != lines.total or (cu_lines.diff() < 1).any():
            raise ValueError(f"lines.cu_lines must increase from 0 to {lines.total}, got {cu_lines.tolist()}")
    elif b and not torch.equal(starts[:: max(1, lines.total // b)], torch.arange(b + 1, dtype=torch.int32) * l):
        raise ValueError(f"lines of different sequences meet: lines.starts must hold every multiple of {l}, the length")
