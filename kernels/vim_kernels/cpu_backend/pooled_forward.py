"""The pooled scan token by token, forward: both convolutions and the sums of lines; skip, norm and gate.

A worker takes a run of lines. `position` counts tokens in scan order; `order` says in which row each lies. What is
convolved is not stored but made again, as on a GPU.
"""

import math

import numba
import numpy as np

from vim_kernels.cpu_backend.jit import device, kernel
from vim_kernels.cpu_backend.records import TILE
from vim_kernels.cpu_backend.scan_forward import aligned
from vim_kernels.cpu_backend.vector import (
    LANES,
    fma,
    lane_sum,
    load,
    load_as,
    scalar_at,
    set_scalar,
    silu,
    splat,
    store,
    store_as,
)

ZERO = np.float32(0)


@device
def pre_activation(d, order, position, channel, first, last, weight, bias, step):
    """Bias and taps that meet a token of the sequence first .. last; step 1 looks back, -1 ahead."""
    value = load(bias, channel)
    for back in range(d.taps):
        source = position - step * back
        if source < first or source >= last:
            break
        x = load_as(d.xz, order[source] * 2 * d.channels + channel, d.bf16)
        value = fma(load(weight, (d.taps - 1 - back) * d.channels + channel), x, value)
    return value


@device
def _four_taps(d, channel, weight, bias):
    """Bias and taps, the token's first."""
    return (
        load(bias, channel),
        load(weight, 3 * d.channels + channel),
        load(weight, 2 * d.channels + channel),
        load(weight, d.channels + channel),
        load(weight, channel),
    )


@device
def _both(d, order, position, channel, first, last, forwards, backwards):
    """U in both directions; with four taps, all of them inside, from weights in registers."""
    if d.taps != 4 or position < first + 3 or position + 3 >= last:
        ahead = pre_activation(d, order, position, channel, first, last, d.weight, d.bias, 1)
        behind = pre_activation(d, order, position, channel, first, last, d.weight_b, d.bias_b, -1)
        return silu(ahead), silu(behind)
    width = 2 * d.channels
    token = load_as(d.xz, order[position] * width + channel, d.bf16)
    ahead, behind = fma(forwards[1], token, forwards[0]), fma(backwards[1], token, backwards[0])
    ahead = fma(forwards[2], load_as(d.xz, order[position - 1] * width + channel, d.bf16), ahead)
    behind = fma(backwards[2], load_as(d.xz, order[position + 1] * width + channel, d.bf16), behind)
    ahead = fma(forwards[3], load_as(d.xz, order[position - 2] * width + channel, d.bf16), ahead)
    behind = fma(backwards[3], load_as(d.xz, order[position + 2] * width + channel, d.bf16), behind)
    ahead = fma(forwards[4], load_as(d.xz, order[position - 3] * width + channel, d.bf16), ahead)
    behind = fma(backwards[4], load_as(d.xz, order[position + 3] * width + channel, d.bf16), behind)
    return silu(ahead), silu(behind)


@device
def _weights_of(d, channel):
    """What `_both` keeps in registers; with another number of taps it is not read."""
    if d.taps == 4:
        return _four_taps(d, channel, d.weight, d.bias), _four_taps(d, channel, d.weight_b, d.bias_b)
    none = splat(ZERO)
    return (none, none, none, none, none), (none, none, none, none, none)


@kernel
def pool_lines(records, starts, weights, order, borders, line_starts):
    """The weighted sums over lines of both convolutions; borders (lines, 2) are those of a line's sequence."""
    for worker in numba.prange(len(line_starts) - 1):
        d = records[0]
        for line in range(line_starts[worker], line_starts[worker + 1]):
            first, last = borders[line, 0], borders[line, 1]
            weight = splat(weights[line])
            for channel in range(0, d.channels, LANES):
                forwards, backwards = _weights_of(d, channel)
                ahead, behind = splat(ZERO), splat(ZERO)
                for position in range(starts[line], starts[line + 1]):
                    u, u_b = _both(d, order, position, channel, first, last, forwards, backwards)
                    ahead, behind = ahead + u, behind + u_b
                store_as(d.pooled, line * d.channels + channel, weight * ahead, d.bf16)
                store_as(d.pooled, (d.lines + line) * d.channels + channel, weight * behind, d.bf16)


@device
def fill_sums(d, order, line, start, stop, first, last, sums):
    """What comes before norm and gate, of the tokens start .. stop of a line: rows of float32."""
    half = splat(np.float32(0.5))
    for channel in range(0, d.channels, LANES):
        forwards, backwards = _weights_of(d, channel)
        y = load(d.y, line * d.channels + channel)
        skip, skip_b = half * load(d.skip, channel), half * load(d.skip_b, channel)
        for position in range(start, stop):
            u, u_b = _both(d, order, position, channel, first, last, forwards, backwards)
            store(sums, (position - start) * d.channels + channel, fma(skip_b, u_b, fma(skip, u, y)))


@device
def _statistics(d, sums):
    """Mean and 1 / deviation of a row, whose filling is zeros."""
    total = splat(ZERO)
    for channel in range(0, d.channels, LANES):
        total = total + load(sums, channel)
    mean = lane_sum(total) / d.size
    centre, squares, whole = splat(np.float32(-mean)), splat(ZERO), d.size - d.size % LANES
    for channel in range(0, whole, LANES):
        off = load(sums, channel) + centre
        squares = fma(off, off, squares)
    variance = lane_sum(squares)
    for channel in range(whole, d.size):
        variance += (scalar_at(sums, channel) - mean) ** 2
    return mean, 1 / math.sqrt(variance / d.size + d.eps)


@device
def _finish(d, row, sums):
    """Norm and gate of one row."""
    has_norm = d.norm_weight != 0
    centre, scale = splat(ZERO), splat(ZERO)
    if has_norm:
        mean, deviation = _statistics(d, sums)
        set_scalar(d.stats, 2 * row, np.float32(mean))
        set_scalar(d.stats, 2 * row + 1, np.float32(deviation))
        centre, scale = splat(np.float32(-mean)), splat(np.float32(deviation))
    for channel in range(0, d.channels, LANES):
        value = load(sums, channel)
        if has_norm:
            value = fma((value + centre) * scale, load(d.norm_weight, channel), load(d.norm_bias, channel))
        gate = silu(load_as(d.xz, (2 * row + 1) * d.channels + channel, d.bf16))
        store_as(d.out, row * d.channels + channel, value * gate, d.bf16)


@kernel
def finish_tokens(records, starts, order, borders, line_starts, scratch):
    """The output of every token from y of its line."""
    for worker in numba.prange(len(line_starts) - 1):
        d = records[0]
        sums = aligned(scratch[worker])
        for line in range(line_starts[worker], line_starts[worker + 1]):
            for start in range(starts[line], starts[line + 1], TILE):
                stop = min(start + TILE, starts[line + 1])
                fill_sums(d, order, line, start, stop, borders[line, 0], borders[line, 1], sums)
                for position in range(start, stop):
                    _finish(d, order[position], sums + 4 * (position - start) * d.channels)


def finish_vectors(channels):
    """Vectors of scratch that a worker of `finish_tokens` needs."""
    return TILE * channels // LANES
