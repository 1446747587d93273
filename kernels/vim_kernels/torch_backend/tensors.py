"""What the rooms of this backend share: the derivative of SiLU, and gradients in memory of their own."""

import torch
from torch import Tensor


def silu_slope(x: Tensor) -> Tensor:
    """Derivative of SiLU."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def copy_like(gradient: Tensor | None, given: Tensor | None) -> Tensor | None:
    """The gradient in the shape and dtype of what was given, in memory of its own; None if either is."""
    if gradient is None or given is None:
        return None
    return torch.empty(given.shape, dtype=given.dtype, device=given.device).copy_(gradient)
