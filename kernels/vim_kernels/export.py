"""Every op in operators that other runtimes have: what `torch.export` makes a program of, for ONNX and AOTInductor.

The recurrence is one `scan` of PyTorch's higher-order operators, a token a step, both directions of a mixer in the same
steps. It is ONNX's Scan, and a loop of C++ in AOTInductor. Measured beside tiles and chunks by `benchmarks.export`.
Lengths may be symbols. For inference, and nothing packed. Shape letters as in `vim_kernels.reference`; g directions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels.dispatch.contract import Lines, NormWeights, ScanWeights

try:
    from torch._higher_order_ops.scan import scan
except ImportError as _error:
    scan = None
    _REASON = f"PyTorch {torch.__version__} has no scan operator ({_error})"


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001 - one signature for all backends
    """Why it cannot run, or None."""
    return _REASON if scan is None else None


def selective_scan(
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
) -> tuple[Tensor, Tensor]:
    """As `vim_kernels.reference.selective_scan`. Raises ValueError for packed rows."""
    _refuse_packed(cu_seqlens)
    u, step, A, B, C = (t.float() for t in (x, dt, A, B, C))
    step = step if dt_bias is None else step + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    inputs = [t.flip(1) if reverse else t for t in (step, step * u, B, C)]
    step, drive, B, C = (t[None] for t in inputs)
    y, state = recurrence(step, drive, B, C, A[None], initial_state)
    y = y[0].flip(1) if reverse else y[0]
    y = y if D is None else y + D.float() * u
    y = y if z is None else y * F.silu(z.float())
    return y.to(x.dtype), state[0]


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None, reverse: bool, cu_seqlens: Tensor | None
) -> Tensor:
    """As `vim_kernels.reference.causal_conv1d`. Raises ValueError for packed rows."""
    _refuse_packed(cu_seqlens)
    y = _convolve(x.float(), weight, bias, reverse)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def bidirectional_scan(
    xz: Tensor,
    forward: ScanWeights,
    backward: ScanWeights,
    *,
    gated: bool,
    cu_seqlens: Tensor | None,
    gaps: Tensor | None = None,
    keep_inputs: bool = False,
) -> Tensor:
    """As `vim_kernels.reference.bidirectional_scan`. Raises ValueError for packed rows."""
    del keep_inputs
    _refuse_packed(cu_seqlens)
    x, z = xz.float().chunk(2, dim=-1) if gated else (xz.float(), None)
    us = [F.silu(_convolve(x, w.conv_weight, w.conv_bias, r)) for w, r in ((forward, False), (backward, True))]
    ys = _project_and_scan(us, (forward, backward), gaps)
    total = _mean_with_skips(ys, us, (forward, backward))
    return (total if z is None else total * F.silu(z)).to(xz.dtype)


def pooled_scan(
    xz: Tensor,
    forward: ScanWeights,
    backward: ScanWeights,
    lines: Lines,
    *,
    norm: NormWeights | None,
    eps: float,
) -> Tensor:
    """As `vim_kernels.reference.pooled_scan`. Raises ValueError for packed rows."""
    _refuse_packed(lines.cu_lines)
    b, l, _ = xz.shape
    x, z = xz.float().chunk(2, dim=-1)
    line_of = lines.line_of.long()
    order = None if lines.order is None else lines.order.long()
    x = x if order is None else x.flatten(0, 1)[order].view(b, l, -1)
    us = [F.silu(_convolve(x, w.conv_weight, w.conv_bias, r)) for w, r in ((forward, False), (backward, True))]
    pooled = []
    for u in us:
        sums = x.new_zeros(lines.total, x.shape[-1]).index_put((line_of,), u.flatten(0, 1), accumulate=True)
        pooled.append((sums * lines.weights[:, None]).view(b, -1, x.shape[-1]))
    ys = _project_and_scan(pooled, (forward, backward))
    spread = [y.flatten(0, 1)[line_of].view(b, l, -1) for y in ys]
    total = _mean_with_skips(spread, us, (forward, backward))
    if order is not None:
        total = torch.zeros_like(total.flatten(0, 1)).index_put((order,), total.flatten(0, 1)).view(b, l, -1)
    if norm is not None:
        total = F.layer_norm(total, total.shape[-1:], norm.weight.float(), norm.bias.float(), eps)
    return (total * F.silu(z)).to(xz.dtype)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `vim_kernels.reference.add_rms_norm`."""
    total = x.float() if residual is None else x.float() + residual.float()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normed.to(x.dtype), total


def _project_and_scan(
    us: list[Tensor], two: tuple[ScanWeights, ScanWeights], gaps: Tensor | None = None
) -> list[Tensor]:
    """The scans of u, each (b, l, d), whose dt, B and C are projections of it: first to last, and last to first."""
    inputs: list[list[Tensor]] = []
    for reverse, (u, weights) in enumerate(zip(us, two, strict=True)):
        states, rank = weights.A_log.shape[1], weights.dt_proj.shape[1]
        low, B, C = F.linear(u, weights.x_proj.float()).split([rank, states, states], dim=-1)
        step = F.softplus(F.linear(low.contiguous(), weights.dt_proj.float(), weights.dt_bias.float()))
        step = step if gaps is None else step * gaps[reverse, :, :, None]
        inputs.append([t.flip(1) if reverse else t for t in (step, step * u, B, C)])
    A = torch.stack([-torch.exp(weights.A_log.float()) for weights in two])
    step, drive, B, C = (torch.stack(pair) for pair in zip(*inputs, strict=True))
    y, _ = recurrence(step, drive, B, C, A, None)
    return [y[0], y[1].flip(1)]


def _mean_with_skips(ys: list[Tensor], us: list[Tensor], two: tuple[ScanWeights, ScanWeights]) -> Tensor:
    first, second = (y + weights.D.float() * u for y, u, weights in zip(ys, us, two, strict=True))
    return (first + second) / 2


def recurrence(
    step: Tensor, drive: Tensor, B: Tensor, C: Tensor, A: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step and drive (g, b, l, d), B and C (g, b, l, n), A (g, d, n), initial (b, d, n) -> y (g, b, l, d), final
    states (g, b, d, n).

    States are (g, b, n, d), so that all but the exponential is rows of channels.
    """
    A_nd = A.mT.contiguous()[:, None]
    h = (
        A_nd.new_zeros(A.shape[0], step.shape[1], *A_nd.shape[2:])
        if initial is None
        else initial.mT[None].float().contiguous()
    )
    of_token = [t.permute(2, 0, 1, 3) for t in (step, drive, B, C)]
    rows = [of_token[0][:, :, :, None], of_token[1][:, :, :, None], of_token[2][..., None], of_token[3][:, :, :, None]]

    def one(h: Tensor, token: list[Tensor]) -> tuple[Tensor, Tensor]:
        step, drive, B, C = token
        h = torch.exp(step * A_nd) * h + drive * B
        return h, C @ h

    assert scan is not None
    final, y = scan(one, h, rows)
    return y[..., 0, :].permute(1, 2, 0, 3), final.mT


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """The convolution of x (b, l, d) before its activation: a product a tap."""
    taps, l = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, 0, taps - 1) if reverse else (0, 0, taps - 1, 0))
    kernel = (weight.flip(1) if reverse else weight).float()
    y = torch.zeros_like(x) if bias is None else bias.float()
    for k in range(taps):
        y = y + padded[:, k : k + l] * kernel[:, k]
    return y


def _refuse_packed(borders: Tensor | None) -> None:
    if borders is not None:
        raise ValueError("backend 'export' takes no packed rows: give a batch of one size")
