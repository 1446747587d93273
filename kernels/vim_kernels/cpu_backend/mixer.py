"""The core of a Vim mixer: convolutions, projections, both scans and the gate, forward and backward.

Kernels do all but the projections to dt's low rank, B and C, which are matrix products. dt_proj is part of the scan.
Saved for the backward, in bytes per token: 2 * 4 * (r + 2 n, filled up to 16) for the projections and, for the states
once a tile of 32 tokens, d n / 4: 384 + 1,536 for Vim-Ti (d 384, n 16, r 12). The convolutions are recomputed.
"""

from typing import Any

import torch
from torch import Tensor

from vim_kernels.cpu_backend.conv_backward import conv_backward, conv_backward_vectors
from vim_kernels.cpu_backend.conv_forward import conv_forward
from vim_kernels.cpu_backend.plan import Plan, plan_for, tile_bound
from vim_kernels.cpu_backend.records import CONV, SCAN, SCAN_GRADIENT
from vim_kernels.cpu_backend.scan_backward import backward_vectors, scan_backward
from vim_kernels.cpu_backend.scan_forward import forward_vectors, scan_forward
from vim_kernels.cpu_backend.tensors import address, fresh, kernel_dtype, records, token_rows, unblocked, whole
from vim_kernels.cpu_backend.vector import LANES
from vim_kernels.cpu_backend.weight_layout import DirectionWeights, direction_weights
from vim_kernels.dispatch.contract import BidirectionalScan, ScanWeights


def bidirectional_scan_saved(arguments: BidirectionalScan) -> list[Tensor]:
    """Empty [projections, states] of the forward direction, then of the backward one, float32."""
    x, _ = arguments.halves()
    cu_seqlens = arguments.cu_seqlens
    tokens, channels, tiles = x.shape[0] * x.shape[1], whole(x.shape[-1]), tile_bound(x, cu_seqlens)
    saved = []
    for weights in (arguments.forward, arguments.backward):
        states = weights.A_log.shape[1]
        saved.append(x.new_empty(tokens, whole(weights.x_proj.shape[0]), dtype=torch.float32))
        saved.append(x.new_empty(tiles, channels * states, dtype=torch.float32))
    return saved


def bidirectional_scan_forward(
    arguments: BidirectionalScan, save: bool, overwrite: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """See `vim_kernels.dispatch.contract`."""
    del overwrite
    _, forward, backward, cu_seqlens, gaps, *_ = arguments
    x, z = arguments.halves()
    saved = bidirectional_scan_saved(arguments) if save else []
    dtype = kernel_dtype(x, z)
    rows, gate = token_rows(x, dtype), None if z is None else token_rows(z, dtype)
    plan = plan_for(rows, cu_seqlens)
    two = direction_weights(forward, backward, rows)
    us = _convolve(rows, two, plan)
    projections = [(u @ weights.x_proj.t()).float() for u, weights in zip(us, two, strict=True)]
    # a token's u is read before its sum is written: the directions leave theirs where their u was
    out, partial = us[1], us[0] if dtype == torch.float32 else torch.empty_like(us[0], dtype=torch.float32)
    first, last = scan_fields(rows, gate, two, us, projections, gaps)
    first |= {"gate": 0, "out": partial.data_ptr(), "scale": 1.0}
    last |= {"partial": partial.data_ptr(), "out": out.data_ptr(), "out_bf16": dtype == torch.bfloat16}
    for fields, projection, copy, states in zip((first, last), projections, saved[::2], saved[1::2], strict=False):
        copy.copy_(projection)
        fields["checkpoints"] = states.data_ptr()
    scratch = plan.scratch(forward_vectors(two[0].states, plan.widest))
    scan_forward(records(SCAN, first, last), plan.borders, plan.chunks, plan.tasks, plan.task_starts, scratch)
    return out.view(rows.shape)[..., : x.shape[-1]].to(x.dtype).contiguous(), saved


def bidirectional_scan_backward(arguments: BidirectionalScan, dout: Tensor, saved: list[Tensor]) -> BidirectionalScan:
    """See `vim_kernels.dispatch.contract`."""
    _, forward, backward, cu_seqlens, gaps, *_ = arguments
    x, z = arguments.halves()
    dtype = kernel_dtype(x, z)
    rows, gate = token_rows(x, dtype), None if z is None else token_rows(z, dtype)
    dout_rows = token_rows(dout, dtype)
    plan = plan_for(rows, cu_seqlens)
    b, l, d = rows.shape
    halves = 1 if z is None else 2
    dxz = torch.empty(b, l, halves * d, dtype=dtype)
    dx, dz = dxz[..., :d], None if z is None else dxz[..., d:]
    two = direction_weights(forward, backward, rows)
    us = _convolve(rows, two, plan)
    projections = saved[::2]
    partial = torch.empty(plan.tokens, d)
    fields = scan_fields(rows, gate, two, us, projections, gaps)
    fields[1]["partial"] = partial.data_ptr()
    for one, states in zip(fields, saved[1::2], strict=True):
        one["checkpoints"] = states.data_ptr()
    gradients, buffers = gradient_fields(dout_rows, two, plan)
    gradients[0]["y_out"] = partial.data_ptr()
    gradients[1] |= {"dgate": address(dz), "dgate_stride": halves * d}
    directions, gradients = records(SCAN, *fields), records(SCAN_GRADIENT, *gradients)
    scratch = plan.scratch(backward_vectors(two[0].states, plan.widest))
    scan_backward(directions, gradients, plan.borders, plan.chunks, plan.tasks, plan.task_starts, scratch)
    partials = []
    for weights, (du, ddt, dbc, dweights), u, projection, parameters in zip(
        two, buffers, us, projections, (forward, backward), strict=True
    ):
        partials.append(projection_gradients(weights, parameters, u, projection, du, ddt, dbc, dweights.sum(0)))
    conv = _conv_gradients(rows, two, [du for du, *_ in buffers], dx, plan)
    dforward, dbackward = (
        like_weights(parameters, partial._replace(conv_weight=weight, conv_bias=bias))
        for parameters, partial, (weight, bias) in zip((forward, backward), partials, conv, strict=True)
    )
    if d != x.shape[-1]:
        dxz = torch.cat([half[..., : x.shape[-1]] for half in (dx, dz) if half is not None], dim=-1)
    return arguments._replace(xz=dxz.to(x.dtype), forward=dforward, backward=dbackward)


def _convolve(rows: Tensor, two: list[DirectionWeights], plan: Plan) -> list[Tensor]:
    """U (tokens, channels) of both directions, in the dtype of rows."""
    us = [torch.empty(plan.tokens, rows.shape[-1], dtype=rows.dtype) for _ in two]
    fields = [
        _conv_fields(rows, weights, k, out=address(u)) for k, (weights, u) in enumerate(zip(two, us, strict=True))
    ]
    conv_forward(records(CONV, *fields), plan.borders, plan.pieces, plan.piece_starts)
    return us


def _conv_fields(rows: Tensor, weights: DirectionWeights, reverse: int, **more: int) -> dict[str, int]:
    channels = rows.shape[-1]
    return dict(
        channels=channels, taps=weights.taps, reverse=reverse, silu=1,
        bf16=rows.dtype == torch.bfloat16, x=address(rows), x_stride=rows.stride(1),
        weight=address(weights.conv_weight), bias=address(weights.conv_bias), out_stride=channels, **more,
    )  # fmt: skip


def scan_fields(
    rows: Tensor,
    gate: Tensor | None,
    two: list[DirectionWeights],
    us: list[Tensor],
    projections: list[Tensor],
    gaps: Tensor | None = None,
) -> list[dict[str, Any]]:
    """SCAN records of both directions, all but outputs and checkpoints."""
    channels, fields = rows.shape[-1], []
    for k, (weights, u, projection) in enumerate(zip(two, us, projections, strict=True)):
        low, columns = address(projection), projection.shape[1]
        fields.append(
            {
                "channels": channels, "states": weights.states, "rank": weights.rank, "reverse": k, "softplus": 1,
                "bf16": rows.dtype == torch.bfloat16, "u": address(u), "u_stride": channels, "low": low,
                "low_stride": columns, "gate": address(gate), "gate_stride": 0 if gate is None else gate.stride(1),
                "B": low + 4 * weights.rank, "C": low + 4 * (weights.rank + weights.states), "bc_stride": columns,
                "gaps": 0 if gaps is None else gaps[k].data_ptr(),
                "dt_proj": address(weights.dt_proj), "dt_bias": address(weights.dt_bias), "skip": address(weights.skip),
                "decay": address(weights.decay), "out_stride": channels, "scale": 0.5,
            }
        )  # fmt: skip
    return fields


def gradient_fields(
    dout: Tensor, two: list[DirectionWeights], plan: Plan
) -> tuple[list[dict[str, int]], list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """SCAN_GRADIENT records, and what they point to: du, ddt, dB | dC by group, dA | dskip | ddt_bias."""
    channels, fields, buffers = dout.shape[-1], [], []
    for weights in two:
        du, ddt = torch.empty(plan.tokens, channels), torch.empty(plan.tokens, channels)
        dbc = torch.empty(plan.groups, plan.tokens, 2 * weights.states)
        dweights = torch.empty(plan.sequences, (weights.states + 2) * channels)
        buffers.append((du, ddt, dbc, dweights))
        fields.append(
            {
                "dout": address(dout), "dout_stride": dout.stride(1), "du": address(du), "ddt": address(ddt),
                "dbc": address(dbc), "dbc_stride": 2 * weights.states,
                "dbc_group_stride": plan.tokens * 2 * weights.states, "dweights": address(dweights),
            }
        )  # fmt: skip
    return fields, buffers


def projection_gradients(
    weights: DirectionWeights,
    parameters: ScanWeights,
    u: Tensor,
    projection: Tensor,
    du: Tensor,
    ddt: Tensor,
    dbc: Tensor,
    dweights: Tensor,
) -> ScanWeights:
    """Through dt_proj and x_proj: adds to du in place; the convolution's fields are left to the caller."""
    rank, states, channels = weights.rank, weights.states, du.shape[1]
    work = u.dtype
    ddt_work = ddt.to(work)
    dprojection = torch.zeros(projection.shape, dtype=work)
    dprojection[:, :rank] = ddt_work @ weights.dt_proj.t().to(work)
    dprojection[:, rank : rank + 2 * states] = dbc.sum(0) if len(dbc) > 1 else dbc[0]
    if work == torch.float32:
        du.addmm_(dprojection, weights.x_proj)
    else:
        du += dprojection @ weights.x_proj
    dA = unblocked(dweights[: states * channels].view(-1, states, LANES), channels)
    dskip, dbias = dweights[states * channels :].view(2, channels)
    size = len(parameters.D)
    return ScanWeights(
        conv_weight=parameters.conv_weight,
        conv_bias=None,
        x_proj=(dprojection.t() @ u)[: rank + 2 * states, :size],
        dt_proj=(ddt_work.t() @ projection[:, :rank].to(work))[:size],
        dt_bias=dbias[:size],
        A_log=dA[:size] * -torch.exp(parameters.A_log.detach().float()),
        D=dskip[:size],
    )


def _conv_gradients(
    rows: Tensor, two: list[DirectionWeights], dus: list[Tensor], dx: Tensor, plan: Plan
) -> list[tuple[Tensor, Tensor]]:
    """Fills dx; returns each direction's (weight, bias) gradients, (channels, taps) and (channels,)."""
    channels, bf16 = rows.shape[-1], rows.dtype == torch.bfloat16
    partial = torch.empty(dx.shape) if bf16 else dx
    fields, buffers = [], []
    for k, (weights, du) in enumerate(zip(two, dus, strict=True)):
        target = dx if k else partial
        dweights = torch.empty(plan.sequences, weights.taps + 1, channels)
        buffers.append(dweights)
        fields.append(
            _conv_fields(
                rows, weights, k, dout=address(du), dout_stride=channels, dx=address(target),
                dx_stride=target.stride(1), dx_bf16=target.dtype == torch.bfloat16, dweights=address(dweights),
                dx_partial=address(partial) if k else 0, dx_partial_stride=partial.stride(1),
            )
        )  # fmt: skip
    scratch = plan.scratch(conv_backward_vectors(two[0].taps))
    conv_backward(records(CONV, *fields), plan.borders, plan.tasks, plan.task_starts, scratch)
    totals = [dweights.sum(0) for dweights in buffers]
    return [(total[:-1].t(), total[-1]) for total in totals]


def like_weights(parameters: ScanWeights, partials: ScanWeights) -> ScanWeights:
    """Gradients in the shapes and dtypes of the parameters, None for a None."""
    return ScanWeights(*(fresh(gradient, weight) for weight, gradient in zip(parameters, partials, strict=True)))  # pyright: ignore
