"""What the rooms of this backend share: the derivative of SiLU, and gradients in memory of their own."""

import torch
from torch import Tensor


def silu_slope(x: Tensor) -> Tensor:
    """Derivative of SiLU."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def copy_like(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient in the shape and dtype of `like`, in memory of its own; None if either is."""
    if gradient is None or like is None:
        return None
    return torch.empty(like.shape, dtype=like.dtype, device=like.device).copy_(gradient)
