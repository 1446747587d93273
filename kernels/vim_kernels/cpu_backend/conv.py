"""Depthwise causal convolution and SiLU."""

import numpy as np
import torch
from torch import Tensor

from vim_kernels.cpu_backend.conv_backward import conv_backward, conv_backward_vectors
from vim_kernels.cpu_backend.conv_forward import conv_forward
from vim_kernels.cpu_backend.plan import plan_for
from vim_kernels.cpu_backend.records import CONV
from vim_kernels.cpu_backend.tensors import (
    address,
    float_rows,
    fresh,
    kernel_dtype,
    padded,
    record,
    token_rows,
    vector_or_zeros,
)
from vim_kernels.dispatch.contract import CausalConv1d


def _laid_out(arguments: CausalConv1d) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, taps (taps, channels) and bias as the kernels read them."""
    rows = token_rows(arguments.x, kernel_dtype(arguments.x))
    return rows, padded(float_rows(arguments.weight.t())), vector_or_zeros(arguments.bias, rows)


def _record(arguments: CausalConv1d, rows: Tensor, taps: Tensor, bias: Tensor, **more: int) -> np.ndarray:
    return record(
        CONV, channels=rows.shape[-1], taps=len(taps), reverse=arguments.reverse, silu=arguments.activation == "silu",
        bf16=rows.dtype == torch.bfloat16, x=address(rows), x_stride=rows.stride(1), weight=address(taps),
        bias=address(bias), **more,
    )  # fmt: skip


def causal_conv1d_forward(arguments: CausalConv1d) -> Tensor:
    """See `vim_kernels.dispatch.contract`."""
    x = arguments.x
    rows, taps, offset = _laid_out(arguments)
    plan = plan_for(rows, arguments.cu_seqlens)
    out = torch.empty(rows.shape, dtype=rows.dtype)
    d = _record(arguments, rows, taps, offset, out=address(out), out_stride=rows.shape[-1])
    conv_forward(d, plan.borders, plan.pieces, plan.piece_starts)
    return out[..., : x.shape[-1]].to(x.dtype).contiguous()


def causal_conv1d_backward(arguments: CausalConv1d, dy: Tensor) -> CausalConv1d:
    """See `vim_kernels.dispatch.contract`."""
    x, weight, bias, cu_seqlens, _, _ = arguments
    rows, taps, offset = _laid_out(arguments)
    plan = plan_for(rows, cu_seqlens)
    dout = token_rows(dy, rows.dtype)
    is_bf16 = rows.dtype == torch.bfloat16
    dx = torch.empty(rows.shape, dtype=rows.dtype)
    dweights = torch.empty(plan.sequences, len(taps) + 1, rows.shape[-1])
    d = _record(
        arguments, rows, taps, offset, dout=address(dout), dout_stride=dout.stride(1), dout_bf16=is_bf16,
        dx=address(dx), dx_stride=rows.shape[-1], dx_bf16=is_bf16, dweights=address(dweights),
    )  # fmt: skip
    conv_backward(d, plan.borders, plan.tasks, plan.task_starts, plan.scratch(conv_backward_vectors(len(taps))))
    total = dweights.sum(0)
    return arguments._replace(x=fresh(dx, x), weight=fresh(total[:-1].t(), weight), bias=fresh(total[-1], bias))
