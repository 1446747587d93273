"""Between PyTorch tensors and the kernels' records: layouts, dtypes, addresses."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels.cpu_backend.vector import LANES


def records(dtype: np.dtype, *rows: dict[str, Any]) -> np.ndarray:
    """An array of a record for each dict; fields not named are 0."""
    assert dtype.names is not None
    absent = dict.fromkeys(dtype.names, 0)
    values = [tuple((absent | row).values()) for row in rows]
    return np.array(values, dtype)  # refuses a row that names an unknown field: it is too long


def record(dtype: np.dtype, **fields: int | float) -> np.ndarray:
    """An array of one record."""
    return records(dtype, fields)


def address(tensor: Tensor | None) -> int:
    """Where the tensor starts; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def kernel_dtype(*tokens: Tensor | None) -> torch.dtype:
    """The dtype that the kernels read the tokens in: bfloat16 if all are, else float32."""
    return torch.bfloat16 if all(t is None or t.dtype == torch.bfloat16 for t in tokens) else torch.float32


def whole(size: int) -> int:
    """The size filled up to whole vectors."""
    return (size + LANES - 1) // LANES * LANES


def padded(tensor: Tensor, dim: int = -1) -> Tensor:
    """The tensor with `dim` filled up with zeros to whole vectors; Vim's widths need no filling."""
    padding = -tensor.shape[dim] % LANES
    if not padding:
        return tensor
    return F.pad(tensor, [0, 0] * (-dim - 1) + [0, padding])


def token_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, l, d) as rows a constant stride apart, in `dtype`, d filled up to whole vectors."""
    tensor = padded(tensor.to(dtype))
    b, l, d = tensor.shape
    is_rows = tensor.stride(2) == 1 and (b == 1 or tensor.stride(0) == l * tensor.stride(1))
    return (tensor if is_rows or d == 0 else tensor.contiguous()).detach()


def float_rows(tensor: Tensor) -> Tensor:
    """Contiguous float32."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():  # a call of PyTorch costs a microsecond
        return tensor
    return tensor.detach().float().contiguous()


def vector_or_zeros(vector: Tensor | None, like: Tensor) -> Tensor:
    """(channels,) float32, filled up to whole vectors; zeros for None."""
    if vector is None:
        return like.new_zeros(like.shape[-1], dtype=torch.float32)
    return padded(float_rows(vector))


def blocked(states: Tensor) -> Tensor:
    """(..., channels, n) -> (..., channels / 16, n, 16) float32: sixteen channels side by side for each state."""
    states = padded(states.detach().float(), dim=-2)
    return states.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()


def unblocked(states: Tensor, channels: int) -> Tensor:
    """The inverse of `blocked`, without the filling."""
    return states.transpose(-1, -2).flatten(-3, -2)[..., :channels, :].contiguous()


def fresh(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient without its filling, in the shape and dtype of `like`, in memory of its own."""
    if gradient is None or like is None:
        return None
    inside = gradient[tuple(slice(size) for size in like.shape)]
    return torch.empty(like.shape, dtype=like.dtype).copy_(inside)
