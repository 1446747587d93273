"""Layouts of PyTorch tensors that the kernels can read, and results in memory of their own."""

import torch
from torch import Tensor


def flat(x: Tensor) -> Tensor:
    """(b, l, d) -> (b l, d) with any row stride, copied only where the rows are not evenly spaced."""
    b, l, d = x.shape
    even = x.stride(2) == 1 and (b == 1 or x.stride(0) == l * x.stride(1))
    return x.as_strided((b * l, d), (x.stride(1), 1)) if even else x.reshape(b * l, d)


def copy_like(part: Tensor, like: Tensor) -> Tensor:
    """A part of a tensor in memory of its own, shaped and typed like `like`: ops may not return views of one buffer."""
    return torch.empty_like(like, memory_format=torch.contiguous_format).copy_(part.reshape(like.shape))
