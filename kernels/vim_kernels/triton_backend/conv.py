"""Convolution and fused add + RMS norm of the Triton backend, forward and backward, and what the scans share."""

import torch
from torch import Tensor

from vim_kernels.triton_backend import plan
from vim_kernels.triton_backend.conv_backward import (
    add_rms_norm_backward_kernel,
    add_rms_norm_kernel,
    conv_backward_kernel,
    conv_kernel,
    gate_backward_kernel,
    softplus_kernel,
)
from vim_kernels.triton_backend.launch import cdiv, launch, power_of_two
from vim_kernels.triton_backend.plan import tokens_of

TILE = {"ROWS": 32, "BLOCK": 64}
SUMMING_PROGRAMS = 256
"""Programs that share the rows when a sum over all rows is taken: fixed, so that the sum is the same everywhere."""
NORM_ELEMENTS = 4096


def flat(x: Tensor) -> Tensor:
    """(b, l, d) -> (b l, d) with any row stride, copied only where the rows are not evenly spaced."""
    b, l, d = x.shape
    even = x.stride(2) == 1 and (b == 1 or x.stride(0) == l * x.stride(1))
    return x.as_strided((b * l, d), (x.stride(1), 1)) if even else x.reshape(b * l, d)


def own(part: Tensor, like: Tensor) -> Tensor:
    """A part of a tensor in memory of its own, shaped and typed like `like`: ops may not return views of one buffer."""
    return torch.empty_like(like, memory_format=torch.contiguous_format).copy_(part.reshape(like.shape))


def causal_conv1d_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None, reverse: bool, cu_seqlens: Tensor | None
) -> Tensor:
    """(b, l, d) like x."""
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    source, tokens, d = flat(x), tokens_of(x, cu_seqlens), x.shape[2]
    launch(conv_kernel, (cdiv(tokens.rows, TILE["ROWS"]), cdiv(d, TILE["BLOCK"])),
        source, source.stride(0), weight.contiguous(), bias if bias is not None else source, out,
        tokens.segment(source), tokens.rows, tokens.length, d,
        SIGN=-1 if reverse else 1, SILU=activation == "silu", HAS_BIAS=bias is not None, PACKED=tokens.packed,
        WIDTH=weight.shape[1], **TILE,
    )  # fmt: skip
    return out


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
    """Gradients of x, weight, bias."""
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    dx = x.new_empty(x.shape)
    biases = (bias.contiguous(),) if bias is not None else None
    dtaps = conv_backward(dy[None], x, (weight,), biases, dx, cu_seqlens, reverse=reverse, silu=activation == "silu")
    dtaps = dtaps[0].sum(0)
    return dx, own(dtaps[:-1].t(), weight), None if bias is None else own(dtaps[-1], bias)


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


def softplus(dt: Tensor, bias: Tensor | None, *, apply: bool) -> Tensor:
    """In float32, softplus of dt + bias, or only their sum where not `apply`. dt is (rows, d), any row stride."""
    rows, d = dt.shape
    out = dt.new_empty(rows, d, dtype=torch.float32)
    launch(softplus_kernel, (cdiv(rows, TILE["ROWS"]), cdiv(d, TILE["BLOCK"])),
        dt, bias if bias is not None else dt, out, rows, d, dt.stride(0),
        HAS_BIAS=bias is not None, SOFTPLUS=apply, **TILE,
    )  # fmt: skip
    return out


def gate_backward(dout: Tensor, z: Tensor | None, ungated: Tensor | None, dz: Tensor | None, *, scale: float) -> Tensor:
    """Gradient (rows, d) of the sum before the gate; fills dz (rows, d), any row stride, where z is given."""
    rows, d = dout.shape
    dy = torch.empty_like(dout)
    launch(gate_backward_kernel, (cdiv(rows, TILE["ROWS"]), cdiv(d, TILE["BLOCK"])),
        dout, z if z is not None else dout, ungated if ungated is not None else dout, dy, dz if dz is not None else dy,
        rows, d, z.stride(0) if z is not None else d, dz.stride(0) if dz is not None else d,
        GATE=z is not None, SCALE=scale, **TILE,
    )  # fmt: skip
    return dy


def add_rms_norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normed like x; residual + x, float32."""
    x = x.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // max(channels, 1)
    normed, total = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    if rows == 0:
        return normed, total
    tile = _norm_tile(channels)
    launch(add_rms_norm_kernel, (cdiv(rows, tile["ROWS"]),),
        x, residual.contiguous() if residual is not None else x, weight.contiguous(), normed, total,
        rows, channels, eps,
        HAS_RESIDUAL=residual is not None, **tile,
    )  # fmt: skip
    return normed, total


def add_rms_norm_backward(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum (float32; of x and of residual alike) and of weight."""
    channels = total.shape[-1]
    rows = total.numel() // max(channels, 1)
    if rows == 0:
        return torch.zeros_like(total), torch.zeros_like(weight)
    tile = _norm_tile(channels)
    blocks = cdiv(rows, tile["ROWS"])
    programs = max(1, min(SUMMING_PROGRAMS, blocks))
    partial = total.new_empty(programs, channels)
    dsum = torch.empty_like(total)
    launch(add_rms_norm_backward_kernel, (programs,),
        dnormed, dtotal if dtotal is not None else dnormed, total, weight.contiguous(), dsum, partial, rows, channels,
        eps, cdiv(blocks, programs), HAS_DTOTAL=dtotal is not None, **tile,
    )  # fmt: skip
    return dsum, partial.sum(0).to(weight.dtype)


def _norm_tile(channels: int) -> dict[str, int]:
    block = power_of_two(channels)
    return {"ROWS": max(1, NORM_ELEMENTS // block), "BLOCK": block}
