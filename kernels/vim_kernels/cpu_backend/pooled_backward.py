"""The pooled scan token by token, backward: gate, norm and skip; the convolutions of both directions at once."""

import numba
import numpy as np

from vim_kernels.cpu_backend.jit import device, kernel
from vim_kernels.cpu_backend.pooled_forward import fill_sums, pre_activation
from vim_kernels.cpu_backend.records import TILE
from vim_kernels.cpu_backend.scan_backward import silu_slope
from vim_kernels.cpu_backend.scan_forward import BYTES, aligned
from vim_kernels.cpu_backend.vector import LANES, fma, lane_sum, load, load_as, scalar_at, silu, splat, store, store_as

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)


@device
def _through_norm(d, row, sums, dnorm):
    """Turn a row of sums into the gradient of what comes before the gate, and fill its share in dz and the norm's.

    Returns what is to be added to it, and the factor of the row of sums, by which the gradient passes the norm.
    """
    has_norm = d.norm_weight != 0
    centre, scale = splat(ZERO), splat(ONE)
    if has_norm:
        centre, scale = splat(-scalar_at(d.stats, 2 * row)), splat(scalar_at(d.stats, 2 * row + 1))
    along, across = splat(ZERO), splat(ZERO)
    for channel in range(0, d.channels, LANES):
        value = load(sums, channel)
        unit = (value + centre) * scale
        z = load_as(d.xz, (2 * row + 1) * d.channels + channel, d.bf16)
        dout = load_as(d.dout, row * d.channels + channel, d.bf16)
        gradient = dout * silu(z)
        if has_norm:
            weight = load(d.norm_weight, channel)
            value = fma(unit, weight, load(d.norm_bias, channel))
            store(dnorm, channel, fma(gradient, unit, load(dnorm, channel)))
            store(dnorm, d.channels + channel, gradient + load(dnorm, d.channels + channel))
            gradient = gradient * weight
            along, across = fma(gradient, unit, along), across + gradient
        store_as(d.dxz, (2 * row + 1) * d.channels + channel, dout * value * silu_slope(z), d.bf16)
        store(d.dsum, row * d.channels + channel, gradient)
    return lane_sum(along) / d.size, lane_sum(across) / d.size


@device
def _through_sum(d, row, line, sums, along, across):
    """Half of the gradient of the mean of both directions; its sum over the line grows."""
    has_norm = d.norm_weight != 0
    half, slope, mean = splat(HALF), splat(np.float32(-along)), splat(np.float32(-across))
    centre, scale = splat(ZERO), splat(ONE)
    if has_norm:
        centre, scale = splat(-scalar_at(d.stats, 2 * row)), splat(scalar_at(d.stats, 2 * row + 1))
    for channel in range(0, d.channels, LANES):
        gradient = load(d.dsum, row * d.channels + channel)
        if has_norm:
            unit = (load(sums, channel) + centre) * scale
            gradient = scale * (gradient + fma(slope, unit, mean))
        gradient = half * gradient
        store(d.dsum, row * d.channels + channel, gradient)
        store(d.dy, line * d.channels + channel, gradient + load(d.dy, line * d.channels + channel))


@kernel
def finish_tokens_backward(records, starts, order, borders, line_starts, scratch):
    """Gradients of z, of the sum of the directions and, summed over lines, of y; each worker sums those of the norm."""
    for worker in numba.prange(len(line_starts) - 1):
        d = records[0]
        sums = aligned(scratch[worker])
        dnorm = d.dnorm + 4 * worker * 2 * d.channels
        for line in range(line_starts[worker], line_starts[worker + 1]):
            for channel in range(0, d.channels, LANES):
                store(d.dy, line * d.channels + channel, splat(ZERO))
            for start in range(starts[line], starts[line + 1], TILE):
                stop = min(start + TILE, starts[line + 1])
                fill_sums(d, order, line, start, stop, borders[line, 0], borders[line, 1], sums)
                for position in range(start, stop):
                    row = sums + 4 * (position - start) * d.channels
                    along, across = _through_norm(d, order[position], row, dnorm)
                    _through_sum(d, order[position], line, row, along, across)


@device
def _fill_pre_gradient(
    d, order, line_of, weights, channel, begin, end, first, last, weight, bias, skip, dpooled, step, inner, target
):
    """Gradient before the activation of positions begin .. end, zero outside of the sequence; returns D's.

    `inner` is the range of positions whose part in the gradient of D is wanted.
    """
    dskip, factor = splat(ZERO), load(skip, channel)
    for position in range(begin, end):
        at = LANES * (position - begin)
        if position < first or position >= last:
            store(target, at, splat(ZERO))
            continue
        pre = pre_activation(d, order, position, channel, first, last, weight, bias, step)
        line = line_of[position]
        dsum = load(d.dsum, order[position] * d.channels + channel)
        du = fma(factor, dsum, splat(weights[line]) * load(dpooled, line * d.channels + channel))
        store(target, at, du * silu_slope(pre))
        if inner[0] <= position < inner[1]:
            dskip = fma(dsum, silu(pre), dskip)
    return dskip


@device
def _add_weight_sums(d, order, channel, begin, end, first, last, pre, origin, step, dweights, dskip):
    """The share of positions begin .. end in the gradients of taps, bias and D."""
    for back in range(d.taps):
        slot = (d.taps - 1 - back) * d.channels
        total = load(dweights, slot)
        low = max(begin, first + back) if step == 1 else begin
        high = end if step == 1 else min(end, last - back)
        for position in range(low, high):
            x = load_as(d.xz, order[position - step * back] * 2 * d.channels + channel, d.bf16)
            total = fma(load(pre, LANES * (position - origin)), x, total)
        store(dweights, slot, total)
    bias = load(dweights, d.taps * d.channels)
    for position in range(begin, end):
        bias = bias + load(pre, LANES * (position - origin))
    store(dweights, d.taps * d.channels, bias)
    store(dweights, (d.taps + 1) * d.channels, dskip + load(dweights, (d.taps + 1) * d.channels))


@device
def _convolution_tile(d, order, line_of, weights, channel, begin, end, first, last, pre, dweights, dweights_b):
    halo = d.taps - 1
    pre_b = pre + BYTES * (TILE + halo)
    dskip = _fill_pre_gradient(
        d, order, line_of, weights, channel, begin, end + halo, first, last, d.weight, d.bias, d.skip, d.dpooled, 1,
        (begin, end), pre,
    )  # fmt: skip
    dskip_b = _fill_pre_gradient(
        d, order, line_of, weights, channel, begin - halo, end, first, last, d.weight_b, d.bias_b, d.skip_b,
        d.dpooled + 4 * d.lines * d.channels, -1, (begin, end), pre_b,
    )  # fmt: skip
    for position in range(begin, end):
        value = splat(ZERO)
        for ahead in range(d.taps):
            slot = (halo - ahead) * d.channels + channel
            value = fma(load(d.weight, slot), load(pre, LANES * (position + ahead - begin)), value)
            value = fma(load(d.weight_b, slot), load(pre_b, LANES * (position - ahead - begin + halo)), value)
        store_as(d.dxz, order[position] * 2 * d.channels + channel, value, d.bf16)
    _add_weight_sums(d, order, channel, begin, end, first, last, pre, begin, 1, dweights, dskip)
    _add_weight_sums(d, order, channel, begin, end, first, last, pre_b, begin - halo, -1, dweights_b, dskip_b)


def convolution_vectors(taps):
    """Vectors of scratch that a worker of `convolve_backward` needs."""
    return 2 * (TILE + taps)


@kernel
def convolve_backward(records, line_of, weights, order, borders, tasks, worker_starts, scratch):
    """Gradients of x, and of taps, bias and D of both directions, by tasks (sequence, first and last block, group)."""
    for worker in numba.prange(len(worker_starts) - 1):
        d = records[0]
        for i in range(worker_starts[worker], worker_starts[worker + 1]):
            sequence = tasks[i, 0]
            first, last = borders[sequence], borders[sequence + 1]
            for channel in range(LANES * tasks[i, 1], LANES * tasks[i, 2], LANES):
                dweights = d.dweights + 4 * (sequence * (d.taps + 2) * d.channels + channel)
                dweights_b = dweights + 4 * d.sequences * (d.taps + 2) * d.channels
                for row in range(d.taps + 2):
                    store(dweights, row * d.channels, splat(ZERO))
                    store(dweights_b, row * d.channels, splat(ZERO))
                for begin in range(first, last, TILE):
                    end = min(begin + TILE, last)
                    _convolution_tile(
                        d, order, line_of, weights, channel, begin, end, first, last, aligned(scratch[worker]),
                        dweights, dweights_b,
                    )  # fmt: skip
