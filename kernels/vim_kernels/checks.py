"""Checks at the public border of the ops: every message names the argument, what came and what was wanted."""

import itertools

import torch
from torch import Tensor

from vim_kernels.dispatch.contract import Lines

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor has one of the dtypes of the ops."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {tensor.dtype}, wanted one of {[str(t)[6:] for t in FLOATS]}")


def check_float32(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor is float32."""
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {tensor.dtype}, wanted float32")


def check_floats(**tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor given has one of the dtypes of the ops."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            check_float(name, tensor)


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless the shape matches; None stands for any size."""
    if shape == expected:
        return
    actual = tuple(shape)
    if len(actual) != len(expected) or any(w is not None and g != w for g, w in zip(actual, expected, strict=True)):
        sizes = ", ".join("any" if w is None else str(w) for w in expected) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name} has shape {actual}, wanted ({sizes})")


def check_same_device(anchor: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor given is on the device of `anchor`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != anchor.device:
            raise ValueError(f"{name} is on {tensor.device}, wanted {anchor.device} like the tokens")


def check_cu_seqlens(cu_seqlens: Tensor | None, x: Tensor) -> int:
    """Number of sequences in x (batch, length, channels). Raises ValueError or TypeError for borders that do not fit.

    The values are read only where that costs no wait for the device (CPU tensors) and outside of tracing.
    """
    if cu_seqlens is None:
        return x.shape[0]
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens goes with packed rows of batch 1, got batch {x.shape[0]}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}, wanted int32")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, wanted (images + 1,)")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != x.shape[1]:
            raise ValueError(
                f"cu_seqlens runs from {borders[0]} to {borders[-1]}, wanted 0 to {x.shape[1]} (the length)"
            )
        if any(a >= b for a, b in itertools.pairwise(borders)):
            raise ValueError(f"cu_seqlens must increase, got {borders}")
    return len(cu_seqlens) - 1


def check_lines(lines: Lines, xz: Tensor) -> None:
    """Raise ValueError or TypeError where the lines do not fit tokens xz (batch, length, channels).

    The values are read only where that costs no wait for the device (CPU tensors) and outside of tracing.
    """
    b, l, _ = xz.shape
    starts, line_of, weights, order, cu_lines = lines
    for name, tensor in (("starts", starts), ("line_of", line_of), ("order", order), ("cu_lines", cu_lines)):
        if tensor is not None and tensor.dtype != torch.int32:
            raise TypeError(f"lines.{name} has dtype {tensor.dtype}, wanted int32")
    check_float32("lines.weights", weights)
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
