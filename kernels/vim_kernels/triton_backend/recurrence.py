"""Launches the scan kernels: whole sequences at a time, or in chunks where that alone would not fill the chip.

In chunks a scan takes three launches: what every chunk does to a zero state; a scan over the chunks, which gives the
state that enters each; the scan itself from there. The backward does the same with the adjoint state. A part of longer
sequences is scanned so too: what enters it is asked for between the first launch and the second.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vim_kernels.dispatch.contract import Part
from vim_kernels.triton_backend import plan
from vim_kernels.triton_backend.chunks import carry_kernel, chunk_state_kernel
from vim_kernels.triton_backend.launch import cdiv, launch
from vim_kernels.triton_backend.layouts import backward_layouts, block_of, forward_layouts
from vim_kernels.triton_backend.plan import TILE, Chunks, Tokens
from vim_kernels.triton_backend.pointwise import gate_backward_kernel, softplus_forward_kernel
from vim_kernels.triton_backend.scan_backward import scan_backward_kernel
from vim_kernels.triton_backend.scan_forward import scan_forward_kernel
from vim_kernels.triton_backend.tiled_scan_backward import tiled_scan_backward_kernel
from vim_kernels.triton_backend.tiled_scan_forward import tiled_scan_forward_kernel


class ScanInputs(NamedTuple):
    """What the recurrence of q directions reads. All contiguous; n is a power of two."""

    u: Tensor  # (q, rows, d)
    dt: Tensor  # (q, rows, d), after softplus
    bc: Tensor  # (q, rows, 2 n) float32
    rates: Tensor  # (q, n, d) float32, A log2(e)
    skips: tuple[Tensor, ...] | None  # q of (d,)
    reverse: bool  # direction 0 runs from the last token to the first; direction 1 the other way
    gaps: Tensor | None = None  # (q, rows) float32: what dt was multiplied by after softplus

    @property
    def sizes(self) -> tuple[int, int, int]:
        """q, d, n."""
        q, n, d = self.rates.shape
        return q, d, n


class ScanGradients(NamedTuple):
    """Gradients of ScanInputs; what has parts or chunks is a partial sum, float32 but for that of bc."""

    u: Tensor
    dt: Tensor
    bc: Tensor  # (q, parts, rows, 2 n)
    rates: Tensor  # (q, chunks, n, d)
    sums: Tensor  # (q, chunks, 2, d): of the skips, and of dt over all rows
    initial: Tensor | None  # (q, sequences, n, d)


def scan_forward(
    inputs: ScanInputs,
    z: Tensor | None,  # (rows, d), any row stride
    out: Tensor,  # (rows, d), any row stride
    tokens: Tokens,
    *,
    scale: float,
    states: Tensor | None,  # (q, slots, n, d), filled where given
    ungated: Tensor | None,  # (rows, d), the sum before the gate, filled where states and z are given
    initial: Tensor | None,  # (q, sequences, n, d) float32
    want_final: bool,
    part: Part | None = None,
) -> Tensor | None:
    """Fill `out` with scale times the sum of the directions, gated by silu(z); returns the final states if wanted.

    The final states of a `part`, and what is `initial` to it, are not asked for here: `part.entering` has both.
    """
    q, d, n = inputs.sizes
    chunks = plan.cut(tokens, _forward_chunk(inputs, tokens), out.device)
    final = out.new_empty(q, tokens.sequences, n, d, dtype=torch.float32) if want_final else None
    entering = initial
    if part is not None or not chunks.one_each:
        entering = _entering_states(inputs, inputs.u, tokens, chunks, initial, final, part)
    _forward(inputs, z, out, ungated, entering, final if chunks.one_each else None, states, None, tokens, chunks, scale)
    return final


def _forward_chunk(inputs: ScanInputs, tokens: Tokens) -> int | None:
    """Rows a chunk of the forward scan, or None."""
    q, d, _ = inputs.sizes
    processors = plan.processors(inputs.u.device)
    return plan.chunk_size(tokens, q * cdiv(d, 32), processors, plan.FORWARD_FEW, plan.CARRY_CHUNKS)


def _forward(
    inputs: ScanInputs,
    z: Tensor | None,
    out: Tensor | None,  # None: only final states and, in total, the sums of dt
    ungated: Tensor | None,
    entering: Tensor | None,
    final: Tensor | None,
    states: Tensor | None,
    total: Tensor | None,
    tokens: Tokens,
    chunks: Chunks,
    scale: float,
    *,
    adjoint: bool = False,
) -> None:
    """Launch the forward kernel for the device; what is None is not read or not written."""
    q, d, n = inputs.sizes
    device = inputs.u.device
    unused = inputs.u if out is None else out  # may be written, where the gate's input is not wanted
    skips = inputs.skips or (unused,)
    states_only = out is None
    tensors = (
        inputs.u, inputs.dt, inputs.bc, *(unused if t is None else t for t in (z, out, ungated)),
        inputs.rates, skips[0], skips[-1], *(unused if t is None else t for t in (entering, final, states)),
    )  # fmt: skip
    places = (
        chunks.table if chunks.table is not None else unused, tokens.length, chunks.size, chunks.per_sequence,
        cdiv(tokens.length, tokens.interval), d,
    )  # fmt: skip
    strides = (
        z.stride(0) if z is not None else d, out.stride(0) if out is not None else d,
        tokens.rows * d, tokens.rows * 2 * n, chunks.total * n * d, tokens.slots() * n * d,
    )  # fmt: skip
    flags = {
        "DIRECTIONS": q, "REVERSE": inputs.reverse, "PACKED": tokens.packed, "GATE": z is not None,
        "SAVE": states is not None, "HAS_D": inputs.skips is not None and not states_only,
        "HAS_H0": entering is not None, "STORE_FINAL": final is not None, "SCALE": scale, "N": n,
        "INTERVAL": tokens.interval,
    }  # fmt: skip
    if plan.tiled(device, n):
        sizes = plan.tiled_forward(q * cdiv(d, 32) * chunks.total, plan.processors(device))
        block = block_of(sizes.states_thread, sizes.channels_thread, sizes.warps, n)
        layouts = forward_layouts(q, sizes.states_thread, sizes.channels_thread, sizes.warps, sizes.tile, n)
        launch(tiled_scan_forward_kernel, (cdiv(d, block), chunks.total),
            *tensors, total if total is not None else unused, *places, *strides, **flags,
            STATES_ONLY=states_only, ADJOINT=adjoint, BLOCK=block, TILE=sizes.tile, STEP=sizes.step, **layouts,
            num_warps=q * sizes.warps, num_stages=1,
        )  # fmt: skip
    else:
        sizes = plan.FORWARD[plan.target(device)]
        launch(scan_forward_kernel, (cdiv(d, sizes.block), chunks.total),
            *tensors, *places, d, *strides, **flags, BLOCK=sizes.block, AHEAD=sizes.ahead,
            num_warps=sizes.warps, num_stages=1,
        )  # fmt: skip


class Gate(NamedTuple):
    """What the forward scan multiplied its sum y with, scale silu(z) or scale alone; where the gradient of z goes."""

    scale: float
    z: Tensor | None = None  # (rows, d), any row stride
    ungated: Tensor | None = None  # (rows, d), y
    dz: Tensor | None = None  # (rows, d), any row stride, filled


def scan_backward(
    inputs: ScanInputs,
    dy: Tensor,  # (rows, d), gradient of the sum of the directions, or of what the gate made of it
    tokens: Tokens,
    *,
    gate: Gate,
    states: Tensor,  # (q, slots, n, d) from the forward
    dfinal: Tensor | None,  # (q, sequences, n, d) float32
    softplus: bool,
    want_initial: bool,
    part: Part | None = None,
) -> ScanGradients:
    """Gradients of one scan; that of dt is for the value before softplus where `softplus`."""
    q, d, n = inputs.sizes
    tiled = plan.tiled(dy.device, n)
    by_tile, core = plan.TILED_BACKWARD, plan.BACKWARD[plan.target(dy.device)]
    block = block_of(by_tile.states_thread, by_tile.channels_thread, by_tile.warps, n) if tiled else core.block
    warps = by_tile.warps if tiled else core.warps
    blocks, processors = cdiv(d, block), plan.processors(dy.device)
    size = plan.chunk_size(tokens, q * blocks * warps, processors, plan.BACKWARD_FEW)
    chunks = plan.cut(tokens, size, dy.device)
    initial = dy.new_empty(q, tokens.sequences, n, d, dtype=torch.float32) if want_initial else None
    adjoint = dfinal
    if gate != Gate(1.0) and not tiled:
        dy, gate = gate_backward(dy, gate), Gate(1.0)
    if part is not None or not chunks.one_each:
        adjoint = _entering_states(inputs, dy, tokens, chunks, dfinal, initial, part, gate=gate)
    du, ddt = torch.empty_like(inputs.u), torch.empty_like(inputs.u)
    dbc = dy.new_empty(q, blocks, tokens.rows, 2 * n)
    drates = dy.new_empty(q, chunks.total, n, d, dtype=torch.float32)
    sums = dy.new_empty(q, chunks.total, 2, d, dtype=torch.float32)
    skips = inputs.skips or (dy,)
    tensors = (
        inputs.u, inputs.dt, inputs.bc, dy, inputs.rates, skips[0], skips[-1],
        states, adjoint if adjoint is not None else dy,
        du, ddt, dbc, drates, sums, initial if initial is not None else dy,
        chunks.table if chunks.table is not None else dy, tokens.length, chunks.size, chunks.per_sequence,
        cdiv(tokens.length, tokens.interval),
        d, tokens.rows * d, tokens.rows * 2 * n, chunks.total * n * d, tokens.slots() * n * d, tokens.rows * 2 * n,
    )  # fmt: skip
    flags = {
        "REVERSE": inputs.reverse, "PACKED": tokens.packed, "HAS_D": inputs.skips is not None,
        "HAS_ADJOINT": adjoint is not None, "STORE_DH0": want_initial and chunks.one_each, "SOFTPLUS": softplus,
        "GAPS": softplus and inputs.gaps is not None, "N": n, "BLOCK": block, "INTERVAL": tokens.interval,
    }  # fmt: skip
    options = {"num_warps": warps, "num_stages": 1}
    gaps = inputs.rates if inputs.gaps is None else inputs.gaps
    if tiled:
        layouts = backward_layouts(by_tile.states_thread, by_tile.channels_thread, warps, n)
        z, ungated, dz = (dy if t is None else t for t in gate[1:])
        launch(tiled_scan_backward_kernel, (blocks, chunks.total, q),
            *tensors, z, ungated, dz, z.stride(0), dz.stride(0), gaps, tokens.rows, **flags,
            GATE=gate.z is not None, SCALE=gate.scale, GROUP=by_tile.step, **layouts, **options,
        )  # fmt: skip
    else:
        scratch_stride = cdiv(tokens.interval, core.group) * n * block
        scratch = dy.new_empty(q * chunks.total * blocks * scratch_stride, dtype=torch.float32)
        launch(scan_backward_kernel, (blocks, chunks.total, q),
            *tensors, scratch, scratch_stride, gaps, tokens.rows, **flags, GROUP=core.group, **options,
        )  # fmt: skip
    return ScanGradients(du, ddt, dbc, drates, sums, initial)


def _entering_states(
    inputs: ScanInputs,
    source: Tensor,  # u (q, rows, d), or dy (rows, d) when adjoint
    tokens: Tokens,
    chunks: Chunks,
    initial: Tensor | None,
    final: Tensor | None,
    part: Part | None,
    *,
    gate: Gate | None = None,
) -> Tensor:
    """(q, chunks, n, d): the state that enters every chunk; with `gate` the adjoint, which enters it from behind.

    Of a `part` the scan over the chunks runs twice, from zero and from what enters: it is small.
    """
    q, d, n = inputs.sizes
    adjoint = gate is not None
    after = source.new_empty(q, chunks.total, n, d, dtype=torch.float32)
    entering = torch.empty_like(after)
    total = source.new_empty(q, chunks.total, d, dtype=torch.float32)
    if plan.tiled(source.device, n):
        z, scale = (gate.z, gate.scale) if gate is not None else (None, 1.0)
        scanned = inputs._replace(u=source, reverse=inputs.reverse != adjoint)
        _forward(scanned, z, None, None, None, after, None, total, tokens, chunks, scale, adjoint=adjoint)
    else:
        sizes = plan.STATE[plan.target(source.device)]
        launch(chunk_state_kernel, (cdiv(d, sizes.block), chunks.total, q),
            source, inputs.dt, inputs.bc, inputs.rates, after, total,
            chunks.table if chunks.table is not None else source, tokens.length, chunks.size, chunks.per_sequence,
            d, d, 0 if adjoint else tokens.rows * d, tokens.rows * d, tokens.rows * 2 * n, chunks.total * n * d,
            chunks.total * d,
            REVERSE=inputs.reverse, ADJOINT=adjoint, PACKED=tokens.packed,
            N=n, BLOCK=sizes.block, AHEAD=sizes.ahead, num_warps=sizes.warps, num_stages=1,
        )  # fmt: skip
    reverse = inputs.reverse != adjoint

    def carry(initial: Tensor | None, final: Tensor | None) -> None:
        launch(carry_kernel, (cdiv(d, plan.CARRY_BLOCK), tokens.sequences, q * n),
            after, total, inputs.rates, entering,
            initial if initial is not None else after, final if final is not None else after,
            chunks.sequence_table if chunks.sequence_table is not None else after, chunks.per_sequence,
            d, chunks.total * n * d, chunks.total * d,
            REVERSE=reverse, PACKED=tokens.packed, HAS_INITIAL=initial is not None, STORE_FINAL=final is not None,
            N=n, BLOCK=plan.CARRY_BLOCK, CHUNKS=plan.CARRY_CHUNKS, num_warps=4, num_stages=1,
        )  # fmt: skip

    if part is not None:
        state = after
        if not chunks.one_each:
            state = source.new_empty(q, tokens.sequences, n, d, dtype=torch.float32)
            carry(None, state)
        initial = part.entering(state, total.view(q, tokens.sequences, -1, d).sum(2), inputs.rates, reverse)
        if chunks.one_each:
            return initial
    carry(initial, final)
    return entering


def softplus(dt: Tensor, bias: Tensor | None, *, apply: bool) -> Tensor:
    """In float32, softplus of dt + bias, or only their sum where not `apply`. dt is (rows, d), any row stride."""
    rows, d = dt.shape
    out = dt.new_empty(rows, d, dtype=torch.float32)
    launch(softplus_forward_kernel, (cdiv(rows, TILE["ROWS"]), cdiv(d, TILE["BLOCK"])),
        dt, bias if bias is not None else dt, out, rows, d, dt.stride(0),
        HAS_BIAS=bias is not None, SOFTPLUS=apply, **TILE,
    )  # fmt: skip
    return out


def gate_backward(dout: Tensor, gate: Gate) -> Tensor:
    """Gradient (rows, d) of the sum before the gate; fills that of z."""
    rows, d = dout.shape
    dy = torch.empty_like(dout)
    z, ungated, dz = (dy if t is None else t for t in gate[1:])
    launch(gate_backward_kernel, (cdiv(rows, TILE["ROWS"]), cdiv(d, TILE["BLOCK"])),
        dout, z, ungated, dy, dz, rows, d, z.stride(0), dz.stride(0),
        GATE=gate.z is not None, SCALE=gate.scale, **TILE,
    )  # fmt: skip
    return dy
