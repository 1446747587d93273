"""The core of a Vim mixer in plain PyTorch, convolutions to gate, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels.arguments import ScanWeights
from vim_kernels.torch_backend.conv import conv_gradients, pre_activation
from vim_kernels.torch_backend.recurrence import empty_tile_states, scan_gradients, scan_tiles
from vim_kernels.torch_backend.tensors import copy_like, silu_slope


def bidirectional_scan_saved(
    x: Tensor, z: Tensor | None, forward: ScanWeights, backward: ScanWeights, cu_seqlens: Tensor | None
) -> list[Tensor]:
    """Empty tile states of both directions, float32: d n / 8 bytes per token."""
    del z
    return [empty_tile_states(x, weights.A_log, cu_seqlens) for weights in (forward, backward)]


def bidirectional_scan_forward(
    x: Tensor,
    z: Tensor | None,
    forward: ScanWeights,
    backward: ScanWeights,
    cu_seqlens: Tensor | None,
    save: bool,
    overwrite: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """See `vim_kernels.dispatch.contract.FastBackend`."""
    del overwrite
    saved = bidirectional_scan_saved(x, z, forward, backward, cu_seqlens) if save else []
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


def bidirectional_scan_backward(
    dout: Tensor,
    x: Tensor,
    z: Tensor | None,
    forward: ScanWeights,
    backward: ScanWeights,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
) -> tuple[Tensor, Tensor | None, ScanWeights, ScanWeights]:
    """See `vim_kernels.dispatch.contract.FastBackend`."""
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
        found = ScanWeights(
            conv_weight=dconv,
            conv_bias=dbias,
            x_proj=dprojection.flatten(0, 1).t() @ u.flatten(0, 1),
            dt_proj=draw.flatten(0, 1).t() @ low.flatten(0, 1),
            dt_bias=draw.sum((0, 1)),
            A_log=dA * A,
            D=(dscan * u).sum((0, 1)),
        )
        dweights.append(ScanWeights(*(copy_like(g, w) for g, w in zip(found, weights, strict=True))))  # pyright: ignore
    dz = None if z is None else (dout * total * silu_slope(z.float())).to(x.dtype)
    return dx.to(x.dtype), dz, *dweights


def _project(
    x: Tensor, weights: ScanWeights, reverse: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """U, dt's low rank, B, C and dt before softplus, of one direction; float32."""
    u = F.silu(pre_activation(x.float(), weights.conv_weight, weights.conv_bias, reverse, cu_seqlens))
    rank, states = weights.dt_proj.shape[1], weights.A_log.shape[1]
    low, B, C = F.linear(u, weights.x_proj.float()).split([rank, states, states], dim=-1)
    return u, low, B, C, F.linear(low, weights.dt_proj.float(), weights.dt_bias.float())
