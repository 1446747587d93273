"""The scan, forward: lanes are channels, a task is one sequence times a group of channel blocks.

A tile of 32 tokens goes through three short loops, all within the L1 cache: dt and drive; the recurrence over the
states, which is where the time goes; the gate. The second direction runs backwards by index; nothing is flipped.
"""

import numba
import numpy as np

from vim_kernels.cpu_backend.jit import device, kernel
from vim_kernels.cpu_backend.records import TILE
from vim_kernels.cpu_backend.vector import (
    LANES,
    exp2_product,
    fma,
    load,
    load_as,
    prefetch,
    silu,
    softplus,
    splat,
    splat_at,
    store,
    store_as,
)

BYTES = 4 * LANES
CACHE_LINE = 64


@device
def aligned(array):
    """First address in a scratch array that starts a cache line; split lines would halve the load rate."""
    return (array.ctypes.data + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


@device
def raw_dt(d, token, channel):
    """Sixteen channels of dt before softplus."""
    if d.dt != 0:
        return load(d.dt, token * d.dt_stride + channel) + load(d.dt_bias, channel)
    row = token * d.low_stride
    even, odd = load(d.dt_bias, channel), splat(np.float32(0))
    for r in range(0, d.rank - 1, 2):
        even = fma(splat_at(d.low, row + r), load(d.dt_proj, r * d.channels + channel), even)
        odd = fma(splat_at(d.low, row + r + 1), load(d.dt_proj, (r + 1) * d.channels + channel), odd)
    if d.rank & 1:
        even = fma(splat_at(d.low, row + d.rank - 1), load(d.dt_proj, (d.rank - 1) * d.channels + channel), even)
    return even + odd


@device
def _prepare(d, channel, first, step, count, dts, drives, ys):
    """Per token: dt, the drive dt u, and the skip D u that starts y."""
    skip = load(d.skip, channel)
    for k in range(count):
        token = first + step * k
        dt = raw_dt(d, token, channel)
        if d.softplus:
            dt = softplus(dt)
        if d.gaps != 0:
            dt = dt * splat_at(d.gaps, token)
        u = load_as(d.u, token * d.u_stride + channel, d.bf16)
        store(dts, LANES * k, dt)
        store(drives, LANES * k, dt * u)
        store(ys, LANES * k, skip * u)


@device
def _fetch_ahead(d, token, channel):
    """Ask for what one token of the next block or tile reads and writes: rows lie far apart, no CPU guesses them."""
    size = 2 if d.bf16 else 4
    prefetch(d.u + size * (token * d.u_stride + channel))
    if d.gate != 0:
        prefetch(d.gate + size * (token * d.gate_stride + channel))
    if d.partial != 0:
        prefetch(d.partial + 4 * (token * d.channels + channel))
    prefetch(d.out + (2 if d.out_bf16 else 4) * (token * d.out_stride + channel))


@device
def _recur(d, channel, first, step, count, dts, drives, ys, state, next_channel, next_first):
    # in registers: a store might change the record, for all that the compiler knows
    states, B, C, bc_stride = d.states, d.B, d.C, d.bc_stride
    decay = d.decay + 4 * channel * states
    for k in range(count):
        row = (first + step * k) * bc_stride
        _fetch_ahead(d, next_first + step * k, next_channel)
        dt, drive, y = load(dts, LANES * k), load(drives, LANES * k), load(ys, LANES * k)
        for n in range(states):
            h = fma(exp2_product(dt, load(decay, LANES * n)), load(state, LANES * n), drive * splat_at(B, row + n))
            store(state, LANES * n, h)
            y = fma(h, splat_at(C, row + n), y)
        store(ys, LANES * k, y)


@device
def _finish(d, channel, first, step, count, ys):
    scale = splat(d.scale)
    for k in range(count):
        token = first + step * k
        y = load(ys, LANES * k)
        if d.partial != 0:
            y = y + load(d.partial, token * d.channels + channel)
        if d.gate != 0:
            y = y * silu(load_as(d.gate, token * d.gate_stride + channel, d.bf16))
        store_as(d.out, token * d.out_stride + channel, scale * y, d.out_bf16)


@device
def copy_blocks(source, target, vectors):
    """Copy states; from zeros where the source is absent."""
    for i in range(vectors):
        store(target, LANES * i, load(source, LANES * i) if source != 0 else splat(np.float32(0)))


@device
def at_or_zero(address, index):
    """Address of a float32 element, or 0 where the array is absent."""
    return address + 4 * index if address != 0 else 0


@device
def _scan_sequence(d, sequence, start, stop, chunk, first_block, last_block, state, dts, drives, ys):
    per_sequence = d.channels * d.states
    offset = LANES * first_block * d.states
    vectors = (last_block - first_block) * d.states
    copy_blocks(at_or_zero(d.initial, sequence * per_sequence + offset), state, vectors)
    step = -1 if d.reverse else 1
    for done in range(0, stop - start, TILE):
        count = min(TILE, stop - start - done)
        first = stop - 1 - done if d.reverse else start + done
        if d.checkpoints != 0:
            tile = chunk + done // TILE
            copy_blocks(state, d.checkpoints + 4 * (tile * per_sequence + offset), vectors)
        for block in range(first_block, last_block):
            channel = LANES * block
            _prepare(d, channel, first, step, count, dts, drives, ys)
            block_state = state + BYTES * (block - first_block) * d.states
            next_channel, next_first = channel + LANES, first
            if block + 1 == last_block:
                next_channel, next_first = LANES * first_block, first + step * TILE
            _recur(d, channel, first, step, count, dts, drives, ys, block_state, next_channel, next_first)
            _finish(d, channel, first, step, count, ys)
    if d.final != 0:
        copy_blocks(state, d.final + 4 * (sequence * per_sequence + offset), vectors)


def forward_vectors(states, widest):
    """Vectors of scratch that a worker of `scan_forward` needs."""
    return states * widest + 3 * TILE


@kernel
def scan_forward(directions, borders, chunks, tasks, worker_starts, scratch):
    """Run every task (sequence, first block, last block, group), directions in order, over the workers."""
    for worker in numba.prange(len(worker_starts) - 1):
        for i in range(worker_starts[worker], worker_starts[worker + 1]):
            sequence, first_block, last_block = tasks[i, 0], tasks[i, 1], tasks[i, 2]
            state = aligned(scratch[worker])
            dts = state + BYTES * directions[0].states * (last_block - first_block)
            drives = dts + BYTES * TILE
            ys = drives + BYTES * TILE
            for k in range(len(directions)):
                _scan_sequence(
                    directions[k], sequence, borders[sequence], borders[sequence + 1], chunks[sequence],
                    first_block, last_block, state, dts, drives, ys,
                )  # fmt: skip
