"""The core of a Vim mixer in plain PyTorch, convolutions to gate, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels.dispatch.contract import BidirectionalScan, ScanWeights
from vim_kernels.torch_backend.conv import conv_gradients, pre_activation
from vim_kernels.torch_backend.recurrence import empty_tile_states, scan_gradients, scan_tiles
from vim_kernels.torch_backend.tensors import copy_like, silu_slope


def bidirectional_scan_saved(arguments: BidirectionalScan) -> list[Tensor]:
    """Empty tile states of both directions, float32: d n / 8 bytes per token."""
    x, _ = arguments.halves()
    two = (arguments.forward, arguments.backward)
    return [empty_tile_states(x, weights.A_log, arguments.cu_seqlens) for weights in two]


def bidirectional_scan_forward(
    arguments: BidirectionalScan, save: bool, overwrite: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """See `vim_kernels.dispatch.contract`."""
    del overwrite
    _, forward, backward, cu_seqlens, *_ = arguments
    x, z = arguments.halves()
    saved = bidirectional_scan_saved(arguments) if save else []
    total = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    for reverse, weights in enumerate((forward, backward)):
        u, low, B, C, raw = _project(x, weights, bool(reverse), cu_seqlens)
        del low
        A, states = -torch.exp(weights.A_log.float()), saved[reverse] if save else None
        y, _ = scan_tiles(u, F.softplus(raw), A, B, C, bool(reverse), cu_seqlens, None, states)
        total += y.addcmul_(weights.D.float(), u)
    if z is not None:
        total *= F.silu(z.float())
    return (total / 2).to(x.dtype), saved


def bidirectional_scan_backward(arguments: BidirectionalScan, dout: Tensor, saved: list[Tensor]) -> BidirectionalScan:
    """See `vim_kernels.dispatch.contract`."""
    _, forward, backward, cu_seqlens, *_ = arguments
    x, z = arguments.halves()
    dout = dout.float() / 2
    dscan = dout if z is None else dout * F.silu(z.float())
    total, dx, dweights = torch.zeros_like(dscan), torch.zeros_like(dscan), []
    for reverse, weights in enumerate((forward, backward)):
        u, low, B, C, raw = _project(x, weights, bool(reverse), cu_seqlens)
        A = -torch.exp(weights.A_log.float())
        y, du, dstep, dA, dB, dC, _ = scan_gradients(
            dscan, None, u, F.softplus(raw), A, B, C, bool(reverse), cu_seqlens, saved[reverse]
        )
        total += y.addcmul_(weights.D.float(), u)
        du.addcmul_(weights.D.float(), dscan)
        draw = dstep * torch.sigmoid(raw)
        dprojection = torch.cat([draw @ weights.dt_proj.float(), dB, dC], dim=-1)
        du += dprojection @ weights.x_proj.float()
        dpiece, dconv, dbias = conv_gradients(
            du, x.float(), weights.conv_weight, weights.conv_bias, True, bool(reverse), cu_seqlens
        )
        dx += dpiece
        gradients = ScanWeights(
            conv_weight=dconv,
            conv_bias=dbias,
            x_proj=dprojection.flatten(0, 1).t() @ u.flatten(0, 1),
            dt_proj=draw.flatten(0, 1).t() @ low.flatten(0, 1),
            dt_bias=draw.sum((0, 1)),
            A_log=dA * A,
            D=(dscan * u).sum((0, 1)),
        )
        dweights.append(ScanWeights(*(copy_like(g, w) for g, w in zip(gradients, weights, strict=True))))  # pyright: ignore
    dxz = dx.to(x.dtype)
    if z is not None:
        dxz = torch.cat([dxz, (dout * total * silu_slope(z.float())).to(x.dtype)], dim=-1)
    return arguments._replace(xz=dxz, forward=dweights[0], backward=dweights[1])


def _project(
    x: Tensor, weights: ScanWeights, reverse: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """U, dt's low rank, B, C and dt before softplus, of one direction; float32."""
    u = F.silu(pre_activation(x.float(), weights.conv_weight, weights.conv_bias, reverse, cu_seqlens))
    rank, states = weights.dt_proj.shape[1], weights.A_log.shape[1]
    low, B, C = F.linear(u, weights.x_proj.float()).split([rank, states, states], dim=-1)
    return u, low, B, C, F.linear(low, weights.dt_proj.float(), weights.dt_bias.float())
