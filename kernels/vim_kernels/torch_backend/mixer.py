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
    _, forward, backward, cu_seqlens, gaps, *_ = arguments
    x, z = arguments.halves()
    saved = bidirectional_scan_saved(arguments) if save else []
    total = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    for reverse, weights in enumerate((forward, backward)):
        u = convolve(x.float(), weights, bool(reverse), cu_seqlens)
        _, B, C, raw = project(u, weights)
        A, states = -torch.exp(weights.A_log.float()), saved[reverse] if save else None
        gap = 1.0 if gaps is None else gaps[reverse, :, :, None]
        y, _ = scan_tiles(u, F.softplus(raw) * gap, A, B, C, bool(reverse), cu_seqlens, None, states)
        total += y.addcmul_(weights.D.float(), u)
    if z is not None:
        total *= F.silu(z.float())
    return (total / 2).to(x.dtype), saved


def bidirectional_scan_backward(arguments: BidirectionalScan, dout: Tensor, saved: list[Tensor]) -> BidirectionalScan:
    """See `vim_kernels.dispatch.contract`."""
    _, forward, backward, cu_seqlens, gaps, *_ = arguments
    x, z = arguments.halves()
    dout = dout.float() / 2
    dscan = dout if z is None else dout * F.silu(z.float())
    total, dx, dweights = torch.zeros_like(dscan), torch.zeros_like(dscan), []
    for reverse, weights in enumerate((forward, backward)):
        u = convolve(x.float(), weights, bool(reverse), cu_seqlens)
        low, B, C, raw = project(u, weights)
        A, gap = -torch.exp(weights.A_log.float()), 1.0 if gaps is None else gaps[reverse, :, :, None]
        y, du, dstep, dA, dB, dC, _ = scan_gradients(
            dscan, None, u, F.softplus(raw) * gap, A, B, C, bool(reverse), cu_seqlens, saved[reverse]
        )
        total += y.addcmul_(weights.D.float(), u)
        du.addcmul_(weights.D.float(), dscan)
        gradients, through = projection_gradients(weights, u, low, raw, dstep * gap, dB, dC)
        du += through
        dpiece, dconv, dbias = conv_gradients(
            du, x.float(), weights.conv_weight, weights.conv_bias, True, bool(reverse), cu_seqlens
        )
        dx += dpiece
        gradients |= {"conv_weight": dconv, "conv_bias": dbias, "A_log": dA * A, "D": (dscan * u).sum((0, 1))}
        dweights.append(like_weights(gradients, weights))
    dxz = dx.to(x.dtype)
    if z is not None:
        dxz = torch.cat([dxz, (dout * total * silu_slope(z.float())).to(x.dtype)], dim=-1)
    return arguments._replace(xz=dxz, forward=dweights[0], backward=dweights[1])


def convolve(x: Tensor, weights: ScanWeights, reverse: bool, cu_seqlens: Tensor | None) -> Tensor:
    """U of one direction, float32."""
    return F.silu(pre_activation(x, weights.conv_weight, weights.conv_bias, reverse, cu_seqlens))


def project(u: Tensor, weights: ScanWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dt's low rank, B, C and dt before softplus, of one direction; float32."""
    rank, states = weights.dt_proj.shape[1], weights.A_log.shape[1]
    low, B, C = F.linear(u, weights.x_proj.float()).split([rank, states, states], dim=-1)
    return low, B, C, F.linear(low, weights.dt_proj.float(), weights.dt_bias.float())


def projection_gradients(
    weights: ScanWeights, u: Tensor, low: Tensor, raw: Tensor, dstep: Tensor, dB: Tensor, dC: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of x_proj, dt_proj and dt_bias by name, and the part of u's that comes through them."""
    draw = dstep * torch.sigmoid(raw)
    dprojection = torch.cat([draw @ weights.dt_proj.float(), dB, dC], dim=-1)
    gradients = {
        "x_proj": dprojection.flatten(0, 1).t() @ u.flatten(0, 1),
        "dt_proj": draw.flatten(0, 1).t() @ low.flatten(0, 1),
        "dt_bias": draw.sum((0, 1)),
    }
    return gradients, dprojection @ weights.x_proj.float()


def like_weights(gradients: dict[str, Tensor], weights: ScanWeights) -> ScanWeights:
    """By name, in the shapes and dtypes of the weights; None for a None."""
    return ScanWeights(**{name: copy_like(gradients[name], w) for name, w in weights._asdict().items()})  # pyright: ignore
