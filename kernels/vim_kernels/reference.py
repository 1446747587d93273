"""The definition of every op, in plain PyTorch: what each fast backend must equal, forward and gradient.

Shape letters: b batch, l tokens, d inner channels, n states, r dt rank, w conv taps, s sequences (b, or the images of a
packed row). Everything is computed in float32 (float64 for float64 inputs) and rounded once, on the way out.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels.dispatch.contract import Lines, NormWeights, ScanWeights


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001 - one signature for all backends
    """The reference runs wherever PyTorch does."""
    return None


def selective_scan(
    x: Tensor,  # (b, l, d)
    dt: Tensor,  # (b, l, d)
    A: Tensor,  # (d, n)
    B: Tensor,  # (b, l, n)
    C: Tensor,  # (b, l, n)
    D: Tensor | None,  # (d,)
    z: Tensor | None,  # (b, l, d)
    dt_bias: Tensor | None,  # (d,)
    *,
    dt_softplus: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,  # (s + 1,)
    initial_state: Tensor | None,  # (s, d, n)
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t; y_t = <C_t, h_t> + D x_t, times silu(z_t). Returns y, final state."""
    work = _work_dtype(x)
    u, dt, A, B, C = (t.to(work) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(work)
    if dt_softplus:
        dt = F.softplus(dt)
    pieces, final_states = [], []
    for index, (start, stop) in enumerate(sequences(u, cu_seqlens)):
        here = slice(None) if cu_seqlens is None else slice(index, index + 1)
        h = u.new_zeros(len(u), *A.shape) if initial_state is None else initial_state[here].to(work)
        decay_l = torch.exp(dt[:, start:stop, :, None] * A).unbind(1)  # l x (b, d, n)
        drive_l = ((dt * u)[:, start:stop, :, None] * B[:, start:stop, None, :]).unbind(1)
        states: list[Tensor] = []
        for t in range(stop - start - 1, -1, -1) if reverse else range(stop - start):
            h = torch.addcmul(drive_l[t], decay_l[t], h)
            states.append(h)
        final_states.append(h)
        if states:
            states_bldn = torch.stack(states[::-1] if reverse else states, dim=1)
            pieces.append(torch.einsum("bldn,bln->bld", states_bldn, C[:, start:stop]))
    y = torch.cat(pieces, dim=1) if pieces else torch.zeros_like(u)
    if D is not None:
        y = y + D.to(work) * u
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(x.dtype), torch.cat(final_states)


def causal_conv1d(
    x: Tensor,  # (b, l, d)
    weight: Tensor,  # (d, w), the last tap meets the token itself
    bias: Tensor | None,  # (d,)
    *,
    activation: str | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Depthwise convolution that looks back w - 1 tokens of its own sequence (ahead, when reverse), then SiLU."""
    if x.shape[1] == 0:
        return x.clone()
    work = _work_dtype(x)
    channels, taps = weight.shape
    kernel = weight.to(work)[:, None]
    pad = (0, taps - 1) if reverse else (taps - 1, 0)
    if reverse:
        kernel = kernel.flip(-1)
    pieces = []
    for start, stop in sequences(x, cu_seqlens):
        if start == stop:
            continue
        padded = F.pad(x[:, start:stop].to(work).transpose(1, 2), pad)
        y = F.conv1d(padded, kernel, None if bias is None else bias.to(work), groups=channels)
        pieces.append(y.transpose(1, 2))
    y = torch.cat(pieces, dim=1)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def bidirectional_scan(
    xz: Tensor,  # (b, l, 2 d): x | z; (b, l, d) when not gated
    forward: ScanWeights,
    backward: ScanWeights,
    *,
    gated: bool,
    cu_seqlens: Tensor | None,
    gaps: Tensor | None = None,  # (2, b, l)
    keep_inputs: bool = False,  # this and the next one are no business of the definition
    overwrite: bool = False,
) -> Tensor:
    """Both directions of a Vim mixer, averaged, and gated once by silu(z). (Vim, arXiv 2401.09417, algorithm 1.)

    With `gaps` dt of a token is gap * softplus(...): the discretisation (arXiv 2312.00752, equation 4) over that time.
    """
    del keep_inputs, overwrite
    work = _work_dtype(xz)
    channels = forward.A_log.shape[0]
    x = xz[..., :channels].to(work)
    total = torch.zeros_like(x)
    for weights, reverse in ((forward, False), (backward, True)):
        u = causal_conv1d(
            x, weights.conv_weight, weights.conv_bias, activation="silu", reverse=reverse, cu_seqlens=cu_seqlens
        )
        gap = None if gaps is None else gaps[int(reverse)]
        total = total + _project_and_scan(u, weights, weights.D, reverse, cu_seqlens, gap)
    if gated:
        total = total * F.silu(xz[..., channels:].to(work))
    return (total / 2).to(xz.dtype)


def pooled_scan(
    xz: Tensor,  # (b, l, 2 d): x | z
    forward: ScanWeights,
    backward: ScanWeights,
    lines: Lines,
    *,
    norm: NormWeights | None,
    eps: float,
) -> Tensor:
    """As `bidirectional_scan`, with projections and scan on one token a line. (FastVim, arXiv 2502.00594.)"""
    work, d = _work_dtype(xz), forward.A_log.shape[0]
    b, l, _ = xz.shape
    line_of, cu_seqlens = lines.line_of.long(), lines.cu_seqlens()
    x = xz[..., :d].to(work)
    if lines.order is not None:
        x = x.flatten(0, 1)[lines.order.long()].view(b, l, d)
    total = torch.zeros_like(x)
    for weights, reverse in ((forward, False), (backward, True)):
        u = causal_conv1d(
            x, weights.conv_weight, weights.conv_bias, activation="silu", reverse=reverse, cu_seqlens=cu_seqlens
        )
        sums = x.new_zeros(lines.total, d).index_add(0, line_of, u.flatten(0, 1))
        pooled = (sums * lines.weights.to(work)[:, None]).view(b, lines.total // max(b, 1), d)
        y = _project_and_scan(pooled, weights, None, reverse, lines.cu_lines)
        total = total + y.flatten(0, 1)[line_of].view(b, l, d) + weights.D.to(work) * u
    if lines.order is not None:
        places = lines.order.long().argsort()
        total = total.flatten(0, 1)[places].view(b, l, d)
    total = total / 2
    if norm is not None:
        total = F.layer_norm(total, (d,), norm.weight.to(work), norm.bias.to(work), eps)
    return (total * F.silu(xz[..., d:].to(work))).to(xz.dtype)


def _project_and_scan(
    u: Tensor,
    weights: ScanWeights,
    skip: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
    gap: Tensor | None = None,
) -> Tensor:
    """The scan of u (b, l, d), whose dt, B and C are projections of u; dt times `gap` (b, l)."""
    states, rank = weights.A_log.shape[1], weights.dt_proj.shape[1]
    low_rank, B, C = F.linear(u, weights.x_proj.to(u)).split([rank, states, states], dim=-1)
    dt, A = F.linear(low_rank, weights.dt_proj.to(u)), -torch.exp(weights.A_log.to(u))
    dt = F.softplus(dt + weights.dt_bias.to(u))
    if gap is not None:
        dt = dt * gap.to(u)[..., None]
    options = {"dt_softplus": False, "reverse": reverse, "cu_seqlens": cu_seqlens, "initial_state": None}
    return selective_scan(u, dt, A, B, C, skip, None, None, **options)[0]


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual + x, and its RMS norm in x's dtype. The sum stays in float32 (float64 for float64 inputs)."""
    work = _work_dtype(x)
    total = x.to(work) if residual is None else x.to(work) + residual.to(work)
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.to(work)
    return normed.to(x.dtype), total


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """(first token, end) of every image of a packed row; of a batch, one range for all rows."""
    return [(0, x.shape[1])] if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
