"""The core of a pooled Vim mixer in plain PyTorch, convolutions to gate, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels.dispatch.contract import Lines, NormWeights, PooledScan
from vim_kernels.torch_backend.conv import conv_gradients
from vim_kernels.torch_backend.mixer import convolve, like_weights, project, projection_gradients
from vim_kernels.torch_backend.recurrence import empty_tile_states, scan_gradients, scan_tiles
from vim_kernels.torch_backend.tensors import copy_like, silu_slope


def pooled_scan_saved(arguments: PooledScan) -> list[Tensor]:
    """Empty tile states of both directions, float32, over the lines."""
    two = (arguments.forward, arguments.backward)
    return [empty_tile_states(arguments.like_lines(), weights.A_log, arguments.lines.cu_lines) for weights in two]


def pooled_scan_forward(arguments: PooledScan, save: bool) -> tuple[Tensor, list[Tensor]]:
    """See `vim_kernels.dispatch.contract`."""
    xz, forward, backward, lines, norm, eps = arguments
    saved = pooled_scan_saved(arguments) if save else []
    x, z = xz.float().chunk(2, dim=-1)
    x, total = _in_order(x, lines), torch.zeros_like(x, memory_format=torch.contiguous_format)
    for reverse, weights in enumerate((forward, backward)):
        u = convolve(x, weights, bool(reverse), lines.cu_seqlens())
        pooled = _pool(u, lines)
        _, B, C, raw = project(pooled, weights)
        A, states = -torch.exp(weights.A_log.float()), saved[reverse] if save else None
        y, _ = scan_tiles(pooled, F.softplus(raw), A, B, C, bool(reverse), lines.cu_lines, None, states)
        total += _spread(y, lines, x).addcmul_(weights.D.float(), u)
    total = _back_in_place(total / 2, lines)
    if norm is not None:
        total = F.layer_norm(total, total.shape[-1:], norm.weight.float(), norm.bias.float(), eps)
    return (total * F.silu(z)).to(xz.dtype), saved


def pooled_scan_backward(arguments: PooledScan, dout: Tensor, saved: list[Tensor]) -> PooledScan:
    """See `vim_kernels.dispatch.contract`."""
    xz, forward, backward, lines, norm, eps = arguments
    x, z = xz.float().chunk(2, dim=-1)
    x, cu_seqlens, dout = _in_order(x, lines), lines.cu_seqlens(), dout.float()
    # the forward again, then backwards from the gate
    total, parts = torch.zeros_like(x), []
    for reverse, weights in enumerate((forward, backward)):
        u = convolve(x, weights, bool(reverse), cu_seqlens)
        pooled = _pool(u, lines)
        low, B, C, raw = project(pooled, weights)
        A = -torch.exp(weights.A_log.float())
        y, _ = scan_tiles(pooled, F.softplus(raw), A, B, C, bool(reverse), lines.cu_lines, None, None)
        total += _spread(y, lines, x).addcmul_(weights.D.float(), u)
        parts.append((u, pooled, low, B, C, raw, A))
    total, dnorm = _back_in_place(total / 2, lines), None
    dtotal, normed = dout * F.silu(z), total
    if norm is not None:
        centred = total - total.mean(-1, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        unit = centred * rstd
        sums = (dtotal * unit).sum((0, 1)), dtotal.sum((0, 1))
        dnorm = NormWeights(*(copy_like(g, w) for g, w in zip(sums, norm, strict=True)))  # pyright: ignore[reportArgumentType]
        normed = unit * norm.weight.float() + norm.bias.float()
        dtotal = dtotal * norm.weight.float()
        along = (dtotal * unit).mean(-1, keepdim=True)
        dtotal = rstd * (dtotal - dtotal.mean(-1, keepdim=True) - unit * along)
    dz = dout * normed * silu_slope(z)
    dsum = _in_order(dtotal / 2, lines)
    dy = x.new_zeros(lines.total, x.shape[-1]).index_add_(0, lines.line_of, dsum.flatten(0, 1)).view(parts[0][1].shape)
    dx, dweights = torch.zeros_like(x), []
    for reverse, (weights, (u, pooled, low, B, C, raw, A)) in enumerate(zip((forward, backward), parts, strict=True)):
        _, dpooled, dstep, dA, dB, dC, _ = scan_gradients(
            dy, None, pooled, F.softplus(raw), A, B, C, bool(reverse), lines.cu_lines, saved[reverse]
        )
        gradients, through = projection_gradients(weights, pooled, low, raw, dstep, dB, dC)
        du = _spread((dpooled + through) * _line_weights(lines, pooled), lines, x).addcmul_(weights.D.float(), dsum)
        dpiece, dconv, dbias = conv_gradients(
            du, x, weights.conv_weight, weights.conv_bias, True, bool(reverse), cu_seqlens
        )
        dx += dpiece
        gradients |= {"conv_weight": dconv, "conv_bias": dbias, "A_log": dA * A, "D": (dsum * u).sum((0, 1))}
        dweights.append(like_weights(gradients, weights))
    dxz = torch.cat([_back_in_place(dx, lines), dz], dim=-1).to(xz.dtype)
    return arguments._replace(xz=dxz, forward=dweights[0], backward=dweights[1], norm=dnorm)


def _in_order(x: Tensor, lines: Lines) -> Tensor:
    return x if lines.order is None else x.flatten(0, 1).index_select(0, lines.order).view(x.shape)


def _back_in_place(x: Tensor, lines: Lines) -> Tensor:
    if lines.order is None:
        return x
    return torch.empty_like(x.flatten(0, 1)).index_copy_(0, lines.order.long(), x.flatten(0, 1)).view(x.shape)


def _pool(u: Tensor, lines: Lines) -> Tensor:
    """(b, l, d) in scan order -> the weighted sums of lines (b, lines of a row, d)."""
    b, _, d = u.shape
    sums = u.new_zeros(lines.total, d).index_add_(0, lines.line_of, u.flatten(0, 1))
    return (sums * lines.weights[:, None]).view(b, lines.total // max(b, 1), d)


def _spread(y: Tensor, lines: Lines, like: Tensor) -> Tensor:
    """(b, lines of a row, d) -> (b, l, d): every token gets what its line has."""
    return y.flatten(0, 1).index_select(0, lines.line_of).view(like.shape)


def _line_weights(lines: Lines, pooled: Tensor) -> Tensor:
    return lines.weights.view(*pooled.shape[:2], 1)
