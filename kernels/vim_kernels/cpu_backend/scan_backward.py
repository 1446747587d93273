"""The scan, backward: states are recomputed tile by tile from the checkpoints, then the adjoint walks the tile back.

With a = exp(dt A) and the adjoint g of the state: g_t = C_t dy_t + a_{t+1} g_{t+1}; dB = g dt u and dC = dy h summed
over channels; d(dt A) = g a h_{t-1}. Sums over channels stay in 16 lanes until a tile is done; every order is fixed.
"""

import numba
import numpy as np

from vim_kernels.constants import LN2
from vim_kernels.cpu_backend.jit import device, kernel
from vim_kernels.cpu_backend.records import TILE
from vim_kernels.cpu_backend.scan_forward import BYTES, aligned, at_or_zero, copy_blocks, raw_dt
from vim_kernels.cpu_backend.vector import (
    LANES,
    exp2_product,
    fma,
    lane_sum,
    load,
    load_as,
    prefetch,
    set_scalar,
    sigmoid,
    silu,
    softplus,
    splat,
    splat_at,
    store,
    store_as,
)


@device
def silu_slope(x):
    """Derivative of silu."""
    s = sigmoid(x)
    return s * fma(x, splat(np.float32(1)) - s, splat(np.float32(1)))


@device
def _prepare(d, g, channel, first, step, count, dts, slopes, us, dys):
    """Per token: dt, its slope in the raw dt, u, and the gradient of the ungated y."""
    scale = splat(d.scale)
    for k in range(count):
        token = first + step * k
        raw = raw_dt(d, token, channel)
        gap = splat_at(d.gaps, token) if d.gaps != 0 else splat(np.float32(1))
        store(dts, LANES * k, gap * softplus(raw) if d.softplus else gap * raw)
        store(slopes, LANES * k, gap * sigmoid(raw) if d.softplus else gap)
        store(us, LANES * k, load_as(d.u, token * d.u_stride + channel, d.bf16))
        dy = scale * load_as(g.dout, token * g.dout_stride + channel, d.bf16)
        if d.gate != 0:
            dy = dy * silu(load_as(d.gate, token * d.gate_stride + channel, d.bf16))
        store(dys, LANES * k, dy)


@device
def _fetch_ahead(d, g, token, channel):
    """Ask for what one token of the next block or tile reads and writes: rows lie far apart, no CPU guesses them."""
    size = 2 if d.bf16 else 4
    prefetch(d.u + size * (token * d.u_stride + channel))
    prefetch(g.dout + size * (token * g.dout_stride + channel))
    prefetch(g.du + 4 * (token * d.channels + channel))
    prefetch(g.ddt + 4 * (token * d.channels + channel))
    if d.gate != 0:
        prefetch(d.gate + size * (token * d.gate_stride + channel))
    if d.partial != 0:
        prefetch(d.partial + 4 * (token * d.channels + channel))
    if g.dgate != 0:
        prefetch(g.dgate + size * (token * g.dgate_stride + channel))


@device
def _recompute(d, g, channel, first, step, count, dts, us, ys, decays, history, next_channel, next_first):
    """Fill decays[k, n] and history[k + 1, n] from history[0], and the ungated y."""
    states = d.states
    skip = load(d.skip, channel)
    for k in range(count):
        row = (first + step * k) * d.bc_stride
        _fetch_ahead(d, g, next_first + step * k, next_channel)
        dt, u = load(dts, LANES * k), load(us, LANES * k)
        drive, y = dt * u, skip * u
        for n in range(states):
            at = LANES * (states * k + n)
            decay = exp2_product(dt, load(d.decay, channel * states + LANES * n))
            h = fma(decay, load(history, at), drive * splat_at(d.B, row + n))
            store(decays, at, decay)
            store(history, at + LANES * states, h)
            y = fma(h, splat_at(d.C, row + n), y)
        store(ys, LANES * k, y)


@device
def _gate_gradient(d, g, channel, first, step, count, ys):
    """Hand the ungated y on to the last direction, which owns the gradient of the gate."""
    scale = splat(d.scale)
    for k in range(count):
        token = first + step * k
        y = load(ys, LANES * k)
        if d.partial != 0:
            y = y + load(d.partial, token * d.channels + channel)
        if g.y_out != 0:
            store(g.y_out, token * d.channels + channel, y)
        if g.dgate != 0:
            z = load_as(d.gate, token * d.gate_stride + channel, d.bf16)
            dout = load_as(g.dout, token * g.dout_stride + channel, d.bf16)
            store_as(g.dgate, token * g.dgate_stride + channel, scale * dout * y * silu_slope(z), d.bf16)


@device
def _walk_back(
    d, g, channel, first, step, count, dts, slopes, us, dys, decays, history, adjoint, dB, dC, dA, dskip, dbias
):
    states = d.states
    skip, ln2 = load(d.skip, channel), splat(np.float32(LN2))
    skip_sum, bias_sum = load(dskip, 0), load(dbias, 0)
    for k in range(count - 1, -1, -1):
        token = first + step * k
        row = token * d.bc_stride
        dt, u, dy = load(dts, LANES * k), load(us, LANES * k), load(dys, LANES * k)
        drive = dt * u
        by_drive, by_decay = splat(np.float32(0)), splat(np.float32(0))
        for n in range(states):
            at = LANES * (states * k + n)
            offset = LANES * n
            grad = fma(splat_at(d.C, row + n), dy, load(adjoint, offset))
            store(dC, at, fma(dy, load(history, at + LANES * states), load(dC, at)))
            store(dB, at, fma(grad, drive, load(dB, at)))
            by_drive = fma(grad, splat_at(d.B, row + n), by_drive)
            grad = grad * load(decays, at)
            store(adjoint, offset, grad)
            by_exponent = grad * load(history, at)
            by_decay = fma(by_exponent, load(d.decay, channel * states + offset), by_decay)
            store(dA, offset, fma(by_exponent, dt, load(dA, offset)))
        ddt = fma(by_decay, ln2, by_drive * u) * load(slopes, LANES * k)
        store(g.du, token * d.channels + channel, fma(by_drive, dt, dy * skip))
        store(g.ddt, token * d.channels + channel, ddt)
        skip_sum, bias_sum = fma(dy, u, skip_sum), bias_sum + ddt
    store(dskip, 0, skip_sum)
    store(dbias, 0, bias_sum)


@device
def _clear(address, vectors):
    for i in range(vectors):
        store(address, LANES * i, splat(np.float32(0)))


@device
def _write_lane_sums(d, g, group, first, step, count, dB, dC):
    for k in range(count):
        row = group * g.dbc_group_stride + (first + step * k) * g.dbc_stride
        for n in range(d.states):
            at = LANES * (d.states * k + n)
            set_scalar(g.dbc, row + n, lane_sum(load(dB, at)))
            set_scalar(g.dbc, row + d.states + n, lane_sum(load(dC, at)))


@device
def _scan_sequence(d, g, sequence, start, stop, chunk, first_block, last_block, group, scratch):
    states, channels = d.states, d.channels
    per_sequence = channels * states
    blocks = last_block - first_block
    offset = LANES * first_block * states
    dts = scratch
    slopes, us, dys, ys = dts + BYTES * TILE, dts + 2 * BYTES * TILE, dts + 3 * BYTES * TILE, dts + 4 * BYTES * TILE
    decays = ys + BYTES * TILE
    history = decays + BYTES * TILE * states
    dB = history + BYTES * (TILE + 1) * states
    dC = dB + BYTES * TILE * states
    adjoint = dC + BYTES * TILE * states
    copy_blocks(at_or_zero(g.dfinal, sequence * per_sequence + offset), adjoint, blocks * states)
    dA = g.dweights + 4 * (sequence * (states + 2) * channels + offset)
    dskip = g.dweights + 4 * ((sequence * (states + 2) + states) * channels + LANES * first_block)
    _clear(dA, blocks * states)
    _clear(dskip, blocks)
    _clear(dskip + 4 * channels, blocks)
    step = -1 if d.reverse else 1
    for tile in range((stop - start + TILE - 1) // TILE - 1, -1, -1):
        done = TILE * tile
        count = min(TILE, stop - start - done)
        first = stop - 1 - done if d.reverse else start + done
        _clear(dB, TILE * states)
        _clear(dC, TILE * states)
        for block in range(blocks):
            channel = LANES * (first_block + block)
            _prepare(d, g, channel, first, step, count, dts, slopes, us, dys)
            saved = d.checkpoints + 4 * ((chunk + tile) * per_sequence + channel * states)
            copy_blocks(saved, history, states)
            next_channel, next_first = channel + LANES, first
            if block + 1 == blocks:
                next_channel, next_first = LANES * first_block, first - step * TILE
            _recompute(d, g, channel, first, step, count, dts, us, ys, decays, history, next_channel, next_first)
            _gate_gradient(d, g, channel, first, step, count, ys)
            _walk_back(
                d, g, channel, first, step, count, dts, slopes, us, dys, decays, history,
                adjoint + BYTES * block * states, dB, dC, dA + BYTES * block * states,
                dskip + BYTES * block, dskip + 4 * channels + BYTES * block,
            )  # fmt: skip
        _write_lane_sums(d, g, group, first, step, count, dB, dC)
    if g.dinitial != 0:
        copy_blocks(adjoint, g.dinitial + 4 * (sequence * per_sequence + offset), blocks * states)


def backward_vectors(states, widest):
    """Vectors of scratch that a worker of `scan_backward` needs."""
    return 5 * TILE + states * (4 * TILE + 1 + widest)


@kernel
def scan_backward(directions, gradients, borders, chunks, tasks, worker_starts, scratch):
    """Run every task (sequence, first block, last block, group), directions in order, over the workers."""
    for worker in numba.prange(len(worker_starts) - 1):
        for i in range(worker_starts[worker], worker_starts[worker + 1]):
            sequence, first_block, last_block = tasks[i, 0], tasks[i, 1], tasks[i, 2]
            for k in range(len(directions)):
                _scan_sequence(
                    directions[k], gradients[k], sequence, borders[sequence], borders[sequence + 1], chunks[sequence],
                    first_block, last_block, tasks[i, 3], aligned(scratch[worker]),
                )  # fmt: skip
