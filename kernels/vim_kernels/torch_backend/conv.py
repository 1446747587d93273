"""The causal convolution in plain PyTorch, forward and backward: one multiplication a tap, for all tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels.dispatch.contract import CausalConv1d
from vim_kernels.torch_backend.recurrence import pieces
from vim_kernels.torch_backend.tensors import copy_like, silu_slope


def causal_conv1d_forward(arguments: CausalConv1d) -> Tensor:
    """See `vim_kernels.dispatch.contract`."""
    x, weight, bias, cu_seqlens, activation, reverse = arguments
    pre = pre_activation(x.float(), weight, bias, reverse, cu_seqlens)
    return (F.silu(pre) if activation == "silu" else pre).to(x.dtype)


def causal_conv1d_backward(arguments: CausalConv1d, dy: Tensor) -> CausalConv1d:
    """See `vim_kernels.dispatch.contract`."""
    x, weight, bias, cu_seqlens, activation, reverse = arguments
    dx, dweight, dbias = conv_gradients(dy.float(), x.float(), weight, bias, activation == "silu", reverse, cu_seqlens)
    return arguments._replace(x=copy_like(dx, x), weight=copy_like(dweight, weight), bias=copy_like(dbias, bias))


def pre_activation(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> Tensor:
    """The convolution before its activation, float32."""
    pre = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if bias is not None:
        pre += bias.float()
    taps = weight.shape[1]
    for piece in pieces(x, cu_seqlens):
        for k in range(taps):
            to, source = _shifted(piece, taps - 1 - k, reverse)
            pre[:, to] += x[:, source] * weight[:, k].float()
    return pre


def _shifted(piece: slice, back: int, reverse: bool) -> tuple[slice, slice]:
    """Tokens of the piece that see a token `back` steps earlier in scan order, and those that they see."""
    back = min(back, piece.stop - piece.start)
    late, early = slice(piece.start + back, piece.stop), slice(piece.start, piece.stop - back)
    return (early, late) if reverse else (late, early)


def conv_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    if silu:
        dy = dy * silu_slope(pre_activation(x, weight, bias, reverse, cu_seqlens))
    dx = torch.zeros_like(dy)
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    taps = weight.shape[1]
    for piece in pieces(x, cu_seqlens):
        for k in range(taps):
            to, source = _shifted(piece, taps - 1 - k, reverse)
            dx[:, source] += dy[:, to] * weight[:, k].float()
            dweight[:, k] += (dy[:, to] * x[:, source]).sum((0, 1))
    return dx, dweight, dy.sum((0, 1))
