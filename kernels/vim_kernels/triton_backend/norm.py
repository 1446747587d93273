"""Residual add and RMS norm of the Triton backend, forward and backward."""

import torch
from torch import Tensor

from vim_kernels.dispatch.contract import AddRmsNorm, RmsNorm
from vim_kernels.triton_backend.launch import cdiv, launch, power_of_two
from vim_kernels.triton_backend.norm_backward import add_rms_norm_backward_kernel
from vim_kernels.triton_backend.norm_forward import add_rms_norm_forward_kernel
from vim_kernels.triton_backend.plan import SUMMING_PROGRAMS

NORM_ELEMENTS = 4096


def add_rms_norm_forward(arguments: AddRmsNorm) -> tuple[Tensor, Tensor]:
    """See `vim_kernels.dispatch.contract`."""
    x, residual, weight, eps = arguments
    x = x.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // max(channels, 1)
    normed, total = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    if rows == 0:
        return normed, total
    tile = _norm_tile(channels)
    launch(add_rms_norm_forward_kernel, (cdiv(rows, tile["ROWS"]),),
        x, residual.contiguous() if residual is not None else x, weight.contiguous(), normed, total,
        rows, channels, eps,
        HAS_RESIDUAL=residual is not None, **tile,
    )  # fmt: skip
    return normed, total


def add_rms_norm_backward(arguments: RmsNorm, dnormed: Tensor, dtotal: Tensor | None) -> RmsNorm:
    """See `vim_kernels.dispatch.contract`."""
    total, weight, eps = arguments
    channels = total.shape[-1]
    rows = total.numel() // max(channels, 1)
    if rows == 0:
        return RmsNorm(torch.zeros_like(total), torch.zeros_like(weight), eps)
    tile = _norm_tile(channels)
    blocks = cdiv(rows, tile["ROWS"])
    programs = max(1, min(SUMMING_PROGRAMS, blocks))
    partial = total.new_empty(programs, channels)
    dsum = torch.empty_like(total)
    launch(add_rms_norm_backward_kernel, (programs,),
        dnormed, dtotal if dtotal is not None else dnormed, total, weight.contiguous(), dsum, partial, rows, channels,
        eps, cdiv(blocks, programs), HAS_DTOTAL=dtotal is not None, **tile,
    )  # fmt: skip
    return RmsNorm(dsum, partial.sum(0).to(weight.dtype), eps)


def _norm_tile(channels: int) -> dict[str, int]:
    block = power_of_two(channels)
    return {"ROWS": max(1, NORM_ELEMENTS // block), "BLOCK": block}
