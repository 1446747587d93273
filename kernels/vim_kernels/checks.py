"""Checks at the public border of the ops: every message names the argument, what came and what was wanted."""

import itertools

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor has one of the dtypes of the ops."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {tensor.dtype}, wanted one of {[str(t)[6:] for t in FLOATS]}")


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless the shape matches; None stands for any size."""
    if shape == expected:
        return
    got = tuple(shape)
    if len(got) != len(expected) or any(w is not None and g != w for g, w in zip(got, expected, strict=True)):
        sizes = ", ".join("any" if w is None else str(w) for w in expected) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name} has shape {got}, wanted ({sizes})")


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
