"""The causal convolution of the Triton backend, forward and backward."""

import torch
from torch import Tensor

from vim_kernels.dispatch.contract import CausalConv1d
from vim_kernels.triton_backend import plan
from vim_kernels.triton_backend.conv_backward import conv_backward_kernel
from vim_kernels.triton_backend.conv_forward import conv_forward_kernel
from vim_kernels.triton_backend.launch import cdiv, launch
from vim_kernels.triton_backend.plan import SUMMING_PROGRAMS, TILE, tokens_of
from vim_kernels.triton_backend.tensors import copy_like, flat


def causal_conv1d_forward(arguments: CausalConv1d) -> Tensor:
    """See `vim_kernels.dispatch.contract`."""
    x, weight, bias, cu_seqlens, activation, reverse = arguments
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    source, tokens, d = flat(x), tokens_of(x, cu_seqlens), x.shape[2]
    launch(conv_forward_kernel, (cdiv(tokens.rows, TILE["ROWS"]), cdiv(d, TILE["BLOCK"])),
        source, source.stride(0), weight.contiguous(), bias if bias is not None else source, out,
        tokens.segment(source), tokens.rows, tokens.length, d,
        SIGN=-1 if reverse else 1, SILU=activation == "silu", HAS_BIAS=bias is not None, PACKED=tokens.packed,
        WIDTH=weight.shape[1], **TILE,
    )  # fmt: skip
    return out


def causal_conv1d_backward(arguments: CausalConv1d, dy: Tensor) -> CausalConv1d:
    """See `vim_kernels.dispatch.contract`."""
    x, weight, bias, cu_seqlens, activation, reverse = arguments
    if x.numel() == 0:
        dbias = None if bias is None else torch.zeros_like(bias)
        return arguments._replace(x=torch.zeros_like(x), weight=torch.zeros_like(weight), bias=dbias)
    dx = x.new_empty(x.shape)
    biases = (bias.contiguous(),) if bias is not None else None
    dtaps = conv_backward(dy[None], x, (weight,), biases, dx, cu_seqlens, reverse=reverse, silu=activation == "silu")
    dtaps = dtaps[0].sum(0)
    dbias = None if bias is None else copy_like(dtaps[-1], bias)
    return arguments._replace(x=dx, weight=copy_like(dtaps[:-1].t(), weight), bias=dbias)


def conv_backward(
    du: Tensor,  # (q, rows, d) or (q, b, l, d), contiguous
    x: Tensor,  # (b, l, d)
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] | None,
    dx: Tensor,  # (b, l, d), filled
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    silu: bool,
) -> Tensor:
    """Gradient of x, of the sum of q convolutions, the second one in the other direction, into dx.

    Returns the gradients (q, programs, w + 1, d) float32 of the taps and, last, the bias, to be summed over programs.
    """
    q, d, tokens = du.shape[0], x.shape[2], tokens_of(x, cu_seqlens)
    source, target, sizes = flat(x), flat(dx), plan.CONVOLUTION_BACKWARD[plan.target(x.device)]
    weights = tuple(w.contiguous() for w in weights)
    width = weights[0].shape[1]
    programs = max(1, min(SUMMING_PROGRAMS, cdiv(tokens.rows, sizes.groups * sizes.steps)))
    partial = du.new_empty(q, programs, width + 1, d, dtype=torch.float32)
    launch(conv_backward_kernel, (programs, cdiv(d, sizes.block)),
        source, source.stride(0), weights[0], weights[-1], biases[0] if biases else du, biases[-1] if biases else du,
        du, target, target.stride(0), partial, tokens.segment(du), tokens.rows, tokens.length, d, tokens.rows * d,
        DIRECTIONS=q, SIGN=-1 if reverse else 1, SILU=silu, HAS_BIAS=biases is not None, PACKED=tokens.packed,
        WIDTH=width, GROUPS=sizes.groups, STEPS=sizes.steps, BLOCK=sizes.block,
        HARDWARE=plan.target(du.device) == "cuda", num_warps=sizes.warps,
    )  # fmt: skip
    return partial
