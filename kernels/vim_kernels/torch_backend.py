"""The ops in plain PyTorch, as fast as that gets, forward and backward: for CPUs where Numba is not installed.

The exponentials of a tile of 64 tokens are one call each, the recurrence one in-place addcmul a token; the backward
recomputes the states of a tile from the state saved at its start. Shape letters as in `vim_kernels.reference`; in a
tile, states are (tokens, b, n, d).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels.lines import Lines
from vim_kernels.torch_scan import empty_tile_states, pieces, scan_gradients, scan_tiles
from vim_kernels.types import NormWeights, ScanWeights


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001 - one signature for all backends
    """Runs wherever PyTorch does."""
    return None


def selective_scan_saved(x: Tensor, A: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> list[Tensor]:
    """Empty [states at the start of every tile], float32: d n / 16 bytes per token."""
    del initial_state
    return [empty_tile_states(x, A, cu_seqlens)]


def selective_scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    *,
    dt_softplus: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `vim_kernels.interface.FastBackend`."""
    saved = selective_scan_saved(x, A, cu_seqlens, initial_state) if save else []
    u, raw, A, B, C = (t.float() for t in (x, dt, A, B, C))
    step = _step_size(raw, dt_bias, dt_softplus)
    y, final = scan_tiles(u, step, A, B, C, reverse, cu_seqlens, initial_state, saved[0] if save else None)
    if D is not None:
        y.addcmul_(D.float(), u)
    if z is not None:
        y *= F.silu(z.float())
    return y.to(x.dtype), final, saved


def selective_scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    *,
    dt_softplus: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    saved: list[Tensor],
) -> tuple[Tensor | None, ...]:
    """See `vim_kernels.interface.FastBackend`."""
    u, raw, dy = x.float(), dt.float(), dy.float()
    step = _step_size(raw, dt_bias, dt_softplus)
    dscan = dy if z is None else dy * F.silu(z.float())
    y, du, dstep, dA, dB, dC, dinitial = scan_gradients(
        dscan, dfinal_state, u, step, A.float(), B.float(), C.float(), reverse, cu_seqlens, saved[0]
    )
    dD = dz = None
    if D is not None:
        y.addcmul_(D.float(), u)
        du.addcmul_(D.float(), dscan)
        dD = (dscan * u).sum((0, 1))
    if z is not None:
        dz = dy * y * _silu_slope(z.float())
    ddt = dstep * torch.sigmoid(raw if dt_bias is None else raw + dt_bias) if dt_softplus else dstep
    found = (du, ddt, dA, dB, dC, dD, dz, ddt.sum((0, 1)), dinitial)
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(_like(gradient, tensor) for gradient, tensor in zip(found, given, strict=True))


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
    """See `vim_kernels.interface.FastBackend`."""
    del overwrite
    saved = bidirectional_scan_saved(x, z, forward, backward, cu_seqlens) if save else []
    total = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    for reverse, weights in enumerate((forward, backward)):
        u = F.silu(_pre_activation(x.float(), weights.conv_weight, weights.conv_bias, bool(reverse), cu_seqlens))
        _, B, C, raw = _project(u, weights)
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
    """See `vim_kernels.interface.FastBackend`."""
    dout = dout.float() / 2
    dscan = dout if z is None else dout * F.silu(z.float())
    total, dx, dweights = torch.zeros_like(dscan), torch.zeros_like(dscan), []
    for reverse, weights in enumerate((forward, backward)):
        u = F.silu(_pre_activation(x.float(), weights.conv_weight, weights.conv_bias, bool(reverse), cu_seqlens))
        low, B, C, raw = _project(u, weights)
        A = -torch.exp(weights.A_log.float())
        y, du, dstep, dA, dB, dC, _ = scan_gradients(
            dscan, None, u, F.softplus(raw), A, B, C, bool(reverse), cu_seqlens, saved[reverse]
        )
        total += y.addcmul_(weights.D.float(), u)
        du.addcmul_(weights.D.float(), dscan)
        found, through = _projection_gradients(weights, u, low, raw, dstep, dB, dC)
        du += through
        dpiece, dconv, dbias = _conv_gradients(
            du, x.float(), weights.conv_weight, weights.conv_bias, True, bool(reverse), cu_seqlens
        )
        dx += dpiece
        found |= {"conv_weight": dconv, "conv_bias": dbias, "A_log": dA * A, "D": (dscan * u).sum((0, 1))}
        dweights.append(ScanWeights(**{k: _like(found[k], w) for k, w in weights._asdict().items()}))  # pyright: ignore
    dz = None if z is None else (dout * total * _silu_slope(z.float())).to(x.dtype)
    return dx.to(x.dtype), dz, *dweights


def pooled_scan_saved(
    xz: Tensor, forward: ScanWeights, backward: ScanWeights, lines: Lines, norm: NormWeights | None
) -> list[Tensor]:
    """Empty tile states of both directions, float32, over the lines."""
    del norm
    like = xz.new_empty(xz.shape[0], lines.total // max(xz.shape[0], 1), 0)
    return [empty_tile_states(like, weights.A_log, lines.cu_lines) for weights in (forward, backward)]


def pooled_scan_forward(
    xz: Tensor,
    forward: ScanWeights,
    backward: ScanWeights,
    lines: Lines,
    norm: NormWeights | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    """See `vim_kernels.interface.FastBackend`."""
    saved = pooled_scan_saved(xz, forward, backward, lines, norm) if save else []
    x, z = xz.float().chunk(2, dim=-1)
    x, total = _in_order(x, lines), torch.zeros_like(x, memory_format=torch.contiguous_format)
    for reverse, weights in enumerate((forward, backward)):
        u = F.silu(_pre_activation(x, weights.conv_weight, weights.conv_bias, bool(reverse), lines.cu_seqlens()))
        pooled = _pool(u, lines)
        _, B, C, raw = _project(pooled, weights)
        A, states = -torch.exp(weights.A_log.float()), saved[reverse] if save else None
        y, _ = scan_tiles(pooled, F.softplus(raw), A, B, C, bool(reverse), lines.cu_lines, None, states)
        total += _spread(y, lines, x).addcmul_(weights.D.float(), u)
    total = _back_in_place(total / 2, lines)
    if norm is not None:
        total = F.layer_norm(total, total.shape[-1:], norm.weight.float(), norm.bias.float(), eps)
    return (total * F.silu(z)).to(xz.dtype), saved


def pooled_scan_backward(
    dout: Tensor,
    xz: Tensor,
    forward: ScanWeights,
    backward: ScanWeights,
    lines: Lines,
    norm: NormWeights | None,
    eps: float,
    saved: list[Tensor],
) -> tuple[Tensor, ScanWeights, ScanWeights, NormWeights | None]:
    """See `vim_kernels.interface.FastBackend`."""
    x, z = xz.float().chunk(2, dim=-1)
    x, cu_seqlens, dout = _in_order(x, lines), lines.cu_seqlens(), dout.float()
    # the forward again, then backwards from the gate
    total, kept = torch.zeros_like(x), []
    for reverse, weights in enumerate((forward, backward)):
        u = F.silu(_pre_activation(x, weights.conv_weight, weights.conv_bias, bool(reverse), cu_seqlens))
        pooled = _pool(u, lines)
        low, B, C, raw = _project(pooled, weights)
        A = -torch.exp(weights.A_log.float())
        y, _ = scan_tiles(pooled, F.softplus(raw), A, B, C, bool(reverse), lines.cu_lines, None, None)
        total += _spread(y, lines, x).addcmul_(weights.D.float(), u)
        kept.append((u, pooled, low, B, C, raw, A))
    total, dnorm = _back_in_place(total / 2, lines), None
    dtotal, normed = dout * F.silu(z), total
    if norm is not None:
        centred = total - total.mean(-1, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        unit = centred * rstd
        dnorm = NormWeights(
            torch.empty_like(norm.weight).copy_((dtotal * unit).sum((0, 1))),
            torch.empty_like(norm.bias).copy_(dtotal.sum((0, 1))),
        )
        normed = unit * norm.weight.float() + norm.bias.float()
        dtotal = dtotal * norm.weight.float()
        along = (dtotal * unit).mean(-1, keepdim=True)
        dtotal = rstd * (dtotal - dtotal.mean(-1, keepdim=True) - unit * along)
    dz = dout * normed * _silu_slope(z)
    dsum = _in_order(dtotal / 2, lines)
    dy = x.new_zeros(lines.total, x.shape[-1]).index_add_(0, lines.line_of, dsum.flatten(0, 1)).view(kept[0][1].shape)
    dx, dweights = torch.zeros_like(x), []
    for reverse, (weights, (u, pooled, low, B, C, raw, A)) in enumerate(zip((forward, backward), kept, strict=True)):
        _, dpooled, dstep, dA, dB, dC, _ = scan_gradients(
            dy, None, pooled, F.softplus(raw), A, B, C, bool(reverse), lines.cu_lines, saved[reverse]
        )
        found, through = _projection_gradients(weights, pooled, low, raw, dstep, dB, dC)
        du = _spread((dpooled + through) * _line_weights(lines, pooled), lines, x).addcmul_(weights.D.float(), dsum)
        dpiece, dconv, dbias = _conv_gradients(
            du, x, weights.conv_weight, weights.conv_bias, True, bool(reverse), cu_seqlens
        )
        dx += dpiece
        found |= {"conv_weight": dconv, "conv_bias": dbias, "A_log": dA * A, "D": (dsum * u).sum((0, 1))}
        dweights.append(ScanWeights(**{k: _like(found[k], w) for k, w in weights._asdict().items()}))  # pyright: ignore
    return torch.cat([_back_in_place(dx, lines), dz], dim=-1).to(xz.dtype), *dweights, dnorm


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


def causal_conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `vim_kernels.interface.FastBackend`."""
    pre = _pre_activation(x.float(), weight, bias, reverse, cu_seqlens)
    return (F.silu(pre) if activation == "silu" else pre).to(x.dtype)


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
    """See `vim_kernels.interface.FastBackend`."""
    found = _conv_gradients(dy.float(), x.float(), weight, bias, activation == "silu", reverse, cu_seqlens)
    dx, dweight, dbias = (_like(g, t) for g, t in zip(found, (x, weight, bias), strict=True))
    assert dx is not None
    assert dweight is not None
    return dx, dweight, dbias


def add_rms_norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `vim_kernels.interface.FastBackend`."""
    total = x.float().clone() if residual is None else x.float() + residual
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * rstd * weight.float()).to(x.dtype), total.contiguous()


def add_rms_norm_backward(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `vim_kernels.interface.FastBackend`."""
    dnormed = dnormed.float()
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    scaled = total * rstd
    pull = dnormed * weight.float()
    dsum = rstd * (pull - scaled * (pull * scaled).mean(-1, keepdim=True))
    if dtotal is not None:
        dsum += dtotal
    return dsum, (dnormed * scaled).flatten(0, -2).sum(0).to(weight.dtype)


def _step_size(raw: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    raw = raw if bias is None else raw + bias.float()
    return F.softplus(raw) if softplus else raw


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _like(gradient: Tensor | None, given: Tensor | None) -> Tensor | None:
    if gradient is None or given is None:
        return None
    return torch.empty(given.shape, dtype=given.dtype, device=given.device).copy_(gradient)


def _project(u: Tensor, weights: ScanWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dt's low rank, B, C and dt before softplus, of one direction; float32."""
    rank, states = weights.dt_proj.shape[1], weights.A_log.shape[1]
    low, B, C = F.linear(u, weights.x_proj.float()).split([rank, states, states], dim=-1)
    return low, B, C, F.linear(low, weights.dt_proj.float(), weights.dt_bias.float())


def _projection_gradients(
    weights: ScanWeights, u: Tensor, low: Tensor, raw: Tensor, dstep: Tensor, dB: Tensor, dC: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of x_proj, dt_proj and dt_bias by name, and the part of u's that comes through them."""
    draw = dstep * torch.sigmoid(raw)
    dprojection = torch.cat([draw @ weights.dt_proj.float(), dB, dC], dim=-1)
    found = {
        "x_proj": dprojection.flatten(0, 1).t() @ u.flatten(0, 1),
        "dt_proj": draw.flatten(0, 1).t() @ low.flatten(0, 1),
        "dt_bias": draw.sum((0, 1)),
    }
    return found, dprojection @ weights.x_proj.float()


def _pre_activation(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> Tensor:
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


def _conv_gradients(
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
        dy = dy * _silu_slope(_pre_activation(x, weight, bias, reverse, cu_seqlens))
    dx = torch.zeros_like(dy)
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    taps = weight.shape[1]
    for piece in pieces(x, cu_seqlens):
        for k in range(taps):
            to, source = _shifted(piece, taps - 1 - k, reverse)
            dx[:, source] += dy[:, to] * weight[:, k].float()
            dweight[:, k] += (dy[:, to] * x[:, source]).sum((0, 1))
    return dx, dweight, dy.sum((0, 1))
