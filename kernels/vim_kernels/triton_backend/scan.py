"""Launches the scan kernels: whole sequences at a time, or in chunks where that alone would not fill the chip.

In chunks a scan takes three launches: what every chunk does to a zero state; a scan over the chunks, which gives the
state that enters each; the scan itself from there. The backward does the same with the adjoint state.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vim_kernels.triton_backend import plan
from vim_kernels.triton_backend.backward_kernels import scan_backward_kernel
from vim_kernels.triton_backend.forward_kernels import carry_kernel, chunk_state_kernel, scan_forward_kernel
from vim_kernels.triton_backend.launch import launch
from vim_kernels.triton_backend.layouts import backward_layouts, block_of, forward_layouts
from vim_kernels.triton_backend.plan import Chunks, Tokens
from vim_kernels.triton_backend.tiled_forward import tiled_forward_kernel
from vim_kernels.triton_backend.tiled_kernels import tiled_backward_kernel


class ScanInputs(NamedTuple):
    """What the recurrence of q directions reads. All contiguous; n is a power of two."""

    u: Tensor  # (q, rows, d)
    dt: Tensor  # (q, rows, d), after softplus
    bc: Tensor  # (q, rows, 2 n) float32
    rates: Tensor  # (q, n, d) float32, A log2(e)
    skips: tuple[Tensor, ...] | None  # q of (d,)
    reverse: bool  # direction 0 runs from the last token to the first; direction 1 the other way

    @property
    def sizes(self) -> tuple[int, int, int]:
        """q, d, n."""
        return self.u.shape[0], self.u.shape[2], self.rates.shape[1]


class ScanGradients(NamedTuple):
    """Gradients of ScanInputs; `initial` is (q, sequences, n, d) or None."""

    u: Tensor
    dt: Tensor
    bc: Tensor
    rates: Tensor
    skips: Tensor | None  # (q, d) float32
    initial: Tensor | None


def scan_forward(
    inputs: ScanInputs,
    z: Tensor | None,  # (rows, d), any row stride
    out: Tensor,  # (rows, d)
    tokens: Tokens,
    *,
    scale: float,
    states: Tensor | None,  # (q, slots, n, d) float32, filled where given
    ungated: Tensor | None,  # (rows, d), the sum before the gate, filled where states and z are given
    initial: Tensor | None,  # (q, sequences, n, d) float32
    want_final: bool,
) -> Tensor | None:
    """Fill `out` with scale times the sum of the directions, gated by silu(z); returns the final states if wanted."""
    q, d, n = inputs.sizes
    tiled = plan.tiled(out.device, n)
    block, warps = _block(plan.TILED_FORWARD, plan.FORWARD[plan.target(out.device)], tiled, n)
    blocks = triton.cdiv(d, block)
    chunks = plan.cut(tokens, plan.chunk_size(tokens, blocks * warps, plan.processors(out.device)), out.device)
    final = out.new_empty(q, tokens.sequences, n, d, dtype=torch.float32) if want_final else None
    entering = initial
    if not chunks.one_each:
        entering = _entering_states(inputs, inputs.u, tokens, chunks, initial, final, adjoint=False)
    skips = inputs.skips or (out,)
    tensors = (
        inputs.u, inputs.dt, inputs.bc, z if z is not None else out, out, ungated if ungated is not None else out,
        inputs.rates, skips[0], skips[-1],
        entering if entering is not None else out, final if final is not None else out,
        states if states is not None else out,
        chunks.table if chunks.table is not None else out, tokens.length, chunks.size, chunks.per_sequence,
        triton.cdiv(tokens.length, plan.INTERVAL), d,
    )  # fmt: skip
    strides = (
        z.stride(0) if z is not None else d, tokens.rows * d, tokens.rows * 2 * n, chunks.total * n * d,
        tokens.slots() * n * d,
    )  # fmt: skip
    flags = {
        "DIRECTIONS": q, "REVERSE": inputs.reverse, "PACKED": tokens.packed, "GATE": z is not None,
        "SAVE": states is not None, "HAS_D": inputs.skips is not None, "HAS_H0": entering is not None,
        "STORE_FINAL": want_final and chunks.one_each, "SCALE": scale, "N": n, "BLOCK": block,
        "INTERVAL": plan.INTERVAL,
    }  # fmt: skip
    options = {"num_warps": warps, "num_stages": 1}
    if tiled:
        sizes = plan.TILED_FORWARD
        layouts = forward_layouts(q, sizes.states_thread, sizes.channels_thread, warps, sizes.tile, n)
        launch(tiled_forward_kernel, (blocks, chunks.total), *tensors, *strides, **flags,
            TILE=sizes.tile, STEP=sizes.step, **layouts, **(options | {"num_warps": q * warps}),
        )  # fmt: skip
    else:
        ahead = plan.FORWARD[plan.target(out.device)].ahead
        launch(scan_forward_kernel, (blocks, chunks.total), *tensors, d, *strides, **flags, AHEAD=ahead, **options)
    return final


def scan_backward(
    inputs: ScanInputs,
    dy: Tensor,  # (rows, d), gradient of the sum of the directions
    tokens: Tokens,
    *,
    states: Tensor,  # (q, slots, n, d) from the forward
    dfinal: Tensor | None,  # (q, sequences, n, d) float32
    softplus: bool,
    want_initial: bool,
) -> ScanGradients:
    """Gradients of one scan; that of dt is for the value before softplus where `softplus`."""
    q, d, n = inputs.sizes
    tiled = plan.tiled(dy.device, n)
    block, warps = _block(plan.TILED_BACKWARD, plan.BACKWARD[plan.target(dy.device)], tiled, n)
    blocks = triton.cdiv(d, block)
    chunks = plan.cut(tokens, plan.chunk_size(tokens, q * blocks * warps, plan.processors(dy.device)), dy.device)
    initial = dy.new_empty(q, tokens.sequences, n, d, dtype=torch.float32) if want_initial else None
    adjoint = dfinal
    if not chunks.one_each:
        adjoint = _entering_states(inputs, dy, tokens, chunks, dfinal, initial, adjoint=True)
    du, ddt = torch.empty_like(inputs.u), torch.empty_like(inputs.u)
    dbc = dy.new_empty(q, blocks, tokens.rows, 2 * n, dtype=torch.float32)
    drates = dy.new_empty(q, chunks.total, n, d, dtype=torch.float32)
    dskips = dy.new_empty(q, chunks.total, d, dtype=torch.float32) if inputs.skips else None
    skips = inputs.skips or (dy,)
    tensors = (
        inputs.u, inputs.dt, inputs.bc, dy, inputs.rates, skips[0], skips[-1],
        states, adjoint if adjoint is not None else dy,
        du, ddt, dbc, drates, dskips if dskips is not None else dy, initial if initial is not None else dy,
        chunks.table if chunks.table is not None else dy, tokens.length, chunks.size, chunks.per_sequence,
        triton.cdiv(tokens.length, plan.INTERVAL),
        d, tokens.rows * d, tokens.rows * 2 * n, chunks.total * n * d, tokens.slots() * n * d, tokens.rows * 2 * n,
    )  # fmt: skip
    flags = {
        "REVERSE": inputs.reverse, "PACKED": tokens.packed, "HAS_D": inputs.skips is not None,
        "HAS_ADJOINT": adjoint is not None, "STORE_DH0": want_initial and chunks.one_each, "SOFTPLUS": softplus,
        "N": n, "BLOCK": block, "INTERVAL": plan.INTERVAL,
    }  # fmt: skip
    options = {"num_warps": warps, "num_stages": 1}
    if tiled:
        sizes = plan.TILED_BACKWARD
        layouts = backward_layouts(sizes.states_thread, sizes.channels_thread, warps, n)
        launch(
            tiled_backward_kernel, (blocks, chunks.total, q), *tensors, **flags, GROUP=sizes.step, **layouts, **options
        )
    else:
        group = plan.BACKWARD[plan.target(dy.device)].group
        kept = triton.cdiv(plan.INTERVAL, group) * n * block
        scratch = dy.new_empty(q * chunks.total * blocks * kept, dtype=torch.float32)
        launch(
            scan_backward_kernel, (blocks, chunks.total, q), *tensors, scratch, kept, **flags, GROUP=group, **options
        )
    return ScanGradients(du, ddt, dbc.sum(1), drates.sum(1), dskips.sum(1) if dskips is not None else None, initial)


def _block(
    tiled_sizes: plan.TiledSizes, sizes: plan.ForwardSizes | plan.BackwardSizes, tiled: bool, n: int
) -> tuple[int, int]:
    """Channels and warps a program."""
    if tiled:
        return block_of(tiled_sizes.states_thread, tiled_sizes.channels_thread, tiled_sizes.warps, n), tiled_sizes.warps
    return sizes.block, sizes.warps


def _entering_states(
    inputs: ScanInputs,
    source: Tensor,  # u (q, rows, d), or dy (rows, d) when adjoint
    tokens: Tokens,
    chunks: Chunks,
    initial: Tensor | None,
    final: Tensor | None,
    *,
    adjoint: bool,
) -> Tensor:
    """(q, chunks, n, d): the state that enters every chunk, or the gradient that enters it from behind if adjoint."""
    q, d, n = inputs.sizes
    after = source.new_empty(q, chunks.total, n, d, dtype=torch.float32)
    entering = torch.empty_like(after)
    total = source.new_empty(q, chunks.total, d, dtype=torch.float32)
    sizes = plan.STATE[plan.target(source.device)]
    launch(chunk_state_kernel, (triton.cdiv(d, sizes.block), chunks.total, q),
        source, inputs.dt, inputs.bc, inputs.rates, after, total,
        chunks.table if chunks.table is not None else source, tokens.length, chunks.size, chunks.per_sequence,
        d, d, 0 if adjoint else tokens.rows * d, tokens.rows * d, tokens.rows * 2 * n, chunks.total * n * d,
        chunks.total * d,
        REVERSE=inputs.reverse, ADJOINT=adjoint, PACKED=tokens.packed,
        N=n, BLOCK=sizes.block, AHEAD=sizes.ahead, num_warps=sizes.warps, num_stages=1,
    )  # fmt: skip
    launch(carry_kernel, (triton.cdiv(d, plan.CARRY_BLOCK), tokens.sequences, q * n),
        after, total, inputs.rates, entering,
        initial if initial is not None else after, final if final is not None else after,
        chunks.sequence_table if chunks.sequence_table is not None else after, chunks.per_sequence,
        d, chunks.total * n * d, chunks.total * d,
        REVERSE=inputs.reverse != adjoint, PACKED=tokens.packed, HAS_INITIAL=initial is not None,
        STORE_FINAL=final is not None,
        N=n, BLOCK=plan.CARRY_BLOCK, CHUNKS=plan.CARRY_CHUNKS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return entering
