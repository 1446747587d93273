"""Residual add and RMS norm; widths that are not whole vectors take the plain-PyTorch path."""

import torch
from torch import Tensor

from vim_kernels.cpu_backend.norm_backward import norm_backward
from vim_kernels.cpu_backend.norm_forward import norm_forward
from vim_kernels.cpu_backend.plan import thread_count
from vim_kernels.cpu_backend.records import NORM
from vim_kernels.cpu_backend.tensors import address, float_rows, kernel_dtype, record
from vim_kernels.cpu_backend.vector import LANES
from vim_kernels.dispatch.contract import AddRmsNorm, RmsNorm
from vim_kernels.torch_backend import norm as in_torch


def add_rms_norm_forward(arguments: AddRmsNorm) -> tuple[Tensor, Tensor]:
    """See `vim_kernels.dispatch.contract`."""
    x, residual, weight, eps = arguments
    channels = x.shape[-1]
    if channels % LANES or not x.numel():
        return in_torch.add_rms_norm_forward(arguments)
    dtype = kernel_dtype(x)
    rows = x.detach().to(dtype).contiguous()
    stream = None if residual is None else float_rows(residual)
    scale = float_rows(weight)
    total, normed = torch.empty(x.shape), torch.empty(x.shape, dtype=dtype)
    d = record(
        NORM, rows=x.numel() // channels, channels=channels, bf16=dtype == torch.bfloat16, x=address(rows),
        residual=address(stream), total=address(total), weight=address(scale), normed=address(normed), eps=eps,
    )  # fmt: skip
    norm_forward(d, thread_count())
    return normed.to(x.dtype), total


def add_rms_norm_backward(arguments: RmsNorm, dnormed: Tensor, dtotal: Tensor | None) -> RmsNorm:
    """See `vim_kernels.dispatch.contract`."""
    total, weight, eps = arguments
    channels = total.shape[-1]
    if channels % LANES or not total.numel():
        return in_torch.add_rms_norm_backward(arguments, dnormed, dtotal)
    dtype = kernel_dtype(dnormed)
    rows, stream, scale = dnormed.to(dtype), float_rows(total), float_rows(weight)
    dstream = None if dtotal is None else float_rows(dtotal)
    workers = thread_count()
    dsum, dweight = torch.empty(total.shape), torch.empty(workers, channels)
    d = record(
        NORM, rows=total.numel() // channels, channels=channels, bf16=dtype == torch.bfloat16,
        total=address(stream), weight=address(scale), dnormed=address(rows), dtotal=address(dstream),
        dsum=address(dsum), dweight=address(dweight), eps=eps,
    )  # fmt: skip
    norm_backward(d, workers)
    return RmsNorm(dsum, dweight.sum(0).to(weight.dtype), eps)
