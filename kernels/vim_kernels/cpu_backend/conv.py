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


def _laid_out(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = token_rows(x, kernel_dtype(x))
    return rows, padded(float_rows(weight.t())), vector_or_zeros(bias, rows)


def _record(rows: Tensor, taps: Tensor, bias: Tensor, activation: str | None, reverse: bool, **more: int) -> np.ndarray:
    return record(
        CONV, channels=rows.shape[-1], taps=len(taps), reverse=reverse, silu=activation == "silu",
        bf16=rows.dtype == torch.bfloat16, x=address(rows), x_stride=rows.stride(1), weight=address(taps),
        bias=address(bias), **more,
    )  # fmt: skip


def causal_conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `vim_kernels.dispatch.contract.FastBackend`."""
    rows, taps, offset = _laid_out(x, weight, bias)
    plan = plan_for(rows, cu_seqlens)
    out = torch.empty(rows.shape, dtype=rows.dtype)
    d = _record(rows, taps, offset, activation, reverse, out=address(out), out_stride=rows.shape[-1])
    conv_forward(d, plan.borders, plan.pieces, plan.piece_starts)
    return out[..., : x.shape[-1]].to(x.dtype).contiguous()


def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `vim_kernels.dispatch.contract.FastBackend`."""
    rows, taps, offset = _laid_out(x, weight, bias)
    plan = plan_for(rows, cu_seqlens)
    dout = token_rows(dy, rows.dtype)
    is_bf16 = rows.dtype == torch.bfloat16
    dx = torch.empty(rows.shape, dtype=rows.dtype)
    dweights = torch.empty(plan.sequences, len(taps) + 1, rows.shape[-1])
    d = _record(
        rows, taps, offset, activation, reverse, dout=address(dout), dout_stride=dout.stride(1), dout_bf16=is_bf16,
        dx=address(dx), dx_stride=rows.shape[-1], dx_bf16=is_bf16, dweights=address(dweights),
    )  # fmt: skip
    conv_backward(d, plan.borders, plan.tasks, plan.task_starts, plan.scratch(conv_backward_vectors(len(taps))))
    total = dweights.sum(0)
    dx, dweight, dbias = fresh(dx, x), fresh(total[:-1].t(), weight), fresh(total[-1], bias)
    assert dx is not None
    assert dweight is not None
    return dx, dweight, dbias
