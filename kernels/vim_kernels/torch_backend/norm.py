"""Residual add and RMS norm in plain PyTorch, forward and backward."""

import torch
from torch import Tensor

from vim_kernels.dispatch.contract import AddRmsNorm, RmsNorm


def add_rms_norm_forward(arguments: AddRmsNorm) -> tuple[Tensor, Tensor]:
    """See `vim_kernels.dispatch.contract`."""
    x, residual, weight, eps = arguments
    total = x.float().clone() if residual is None else x.float() + residual
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * rstd * weight.float()).to(x.dtype), total.contiguous()


def add_rms_norm_backward(arguments: RmsNorm, dnormed: Tensor, dtotal: Tensor | None) -> RmsNorm:
    """See `vim_kernels.dispatch.contract`."""
    total, weight, eps = arguments
    dnormed = dnormed.float()
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    scaled = total * rstd
    pull = dnormed * weight.float()
    dsum = rstd * (pull - scaled * (pull * scaled).mean(-1, keepdim=True))
    if dtotal is not None:
        dsum += dtotal
    return RmsNorm(dsum, (dnormed * scaled).flatten(0, -2).sum(0).to(weight.dtype), eps)
