"""Residual add and RMS norm in plain PyTorch, forward and backward."""

import torch
from torch import Tensor


def add_rms_norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `vim_kernels.dispatch.contract.FastBackend`."""
    total = x.float().clone() if residual is None else x.float() + residual
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * rstd * weight.float()).to(x.dtype), total.contiguous()


def add_rms_norm_backward(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `vim_kernels.dispatch.contract.FastBackend`."""
    dnormed = dnormed.float()
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    scaled = total * rstd
    pull = dnormed * weight.float()
    dsum = rstd * (pull - scaled * (pull * scaled).mean(-1, keepdim=True))
    if dtotal is not None:
        dsum += dtotal
    return dsum, (dnormed * scaled).flatten(0, -2).sum(0).to(weight.dtype)
