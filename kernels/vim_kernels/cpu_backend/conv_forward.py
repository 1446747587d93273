"""Depthwise causal convolution and SiLU, forward and backward, any number of taps, forwards or backwards by index."""

import numba
import numpy as np

from vim_kernels.cpu_backend.jit import device, kernel
from vim_kernels.cpu_backend.records import TILE
from vim_kernels.cpu_backend.scan_backward import silu_slope
from vim_kernels.cpu_backend.scan_forward import aligned
from vim_kernels.cpu_backend.vector import LANES, fma, load, load_as, prefetch, silu, splat, store, store_as


@device
def _taps_inside(d, token, start, stop):
    """Number of taps that meet a token of the sequence: 1 for its first, all from its taps-th on."""
    return min(d.taps, stop - token if d.reverse else token - start + 1)


@device
def _pre_activation(d, token, channel, inside, step):
    """Bias and taps; the last tap meets the token itself, the one before it the token a step back."""
    value = load(d.bias, channel)
    at = token * d.x_stride + channel
    last = (d.taps - 1) * d.channels + channel
    for back in range(inside):
        x = load_as(d.x, at - step * back * d.x_stride, d.bf16)
        value = fma(load(d.weight, last - back * d.channels), x, value)
    return value


@device
def _activate(d, token, channel, value):
    store_as(d.out, token * d.out_stride + channel, silu(value) if d.silu else value, d.bf16)


@device
def _four_taps(d, channel, first, last, step):
    """Four taps, Vim's number, of tokens with all of them inside: the weights stay in registers, three times faster."""
    bias = load(d.bias, channel)
    far, middle = load(d.weight, channel), load(d.weight, d.channels + channel)
    near, own = load(d.weight, 2 * d.channels + channel), load(d.weight, 3 * d.channels + channel)
    back, size = step * d.x_stride, 2 if d.bf16 else 4
    for token in range(first, last):
        at = token * d.x_stride + channel
        prefetch(d.x + size * (at + LANES))  # of the next block: rows lie far apart, no CPU guesses them
        prefetch(d.out + size * (token * d.out_stride + channel + LANES))
        value = fma(own, load_as(d.x, at, d.bf16), bias)
        value = fma(near, load_as(d.x, at - back, d.bf16), value)
        value = fma(middle, load_as(d.x, at - 2 * back, d.bf16), value)
        _activate(d, token, channel, fma(far, load_as(d.x, at - 3 * back, d.bf16), value))


@device
def _forward_tile(d, first, last, start, stop):
    step = -1 if d.reverse else 1
    whole_first, whole_last = first, first  # tokens that `_four_taps` does
    if d.taps == 4:
        whole_first = first if d.reverse else min(max(first, start + 3), last)
        whole_last = max(first, min(last, stop - 3)) if d.reverse else last
    for channel in range(0, d.channels, LANES):
        for token in range(first, whole_first):
            _activate(d, token, channel, _pre_activation(d, token, channel, _taps_inside(d, token, start, stop), step))
        _four_taps(d, channel, whole_first, whole_last, step)
        for token in range(whole_last, last):
            _activate(d, token, channel, _pre_activation(d, token, channel, _taps_inside(d, token, start, stop), step))


@kernel
def conv_forward(directions, borders, pieces, worker_starts):
    """Run every piece (sequence, first token, end) over the workers; a tile of x is read once for all directions."""
    for worker in numba.prange(len(worker_starts) - 1):
        for i in range(worker_starts[worker], worker_starts[worker + 1]):
            sequence, end = pieces[i, 0], pieces[i, 2]
            for first in range(pieces[i, 1], end, TILE):
                last = min(end, first + TILE)
                for k in range(len(directions)):
                    _forward_tile(directions[k], first, last, borders[sequence], borders[sequence + 1])


@device
def _fetch_next_tile(d, channel, token):
    """Ask for what one token of the next tile reads and writes."""
    ahead = token + TILE
    prefetch(d.x + (2 if d.bf16 else 4) * (ahead * d.x_stride + channel))
    prefetch(d.dout + (2 if d.dout_bf16 else 4) * (ahead * d.dout_stride + channel))
    prefetch(d.dx + (2 if d.dx_bf16 else 4) * (ahead * d.dx_stride + channel))
    if d.dx_partial != 0:
        prefetch(d.dx_partial + 4 * (ahead * d.dx_partial_stride + channel))


@device
def _fill_pre_gradient(d, channel, first, last, start, stop, target):
    """Gradient before the activation of tokens first .. last, zero outside of the sequence."""
    step = -1 if d.reverse else 1
    for token in range(first, last):
        at = LANES * (token - first)
        if token < start or token >= stop:
            store(target, at, splat(np.float32(0)))
            continue
        value = load_as(d.dout, token * d.dout_stride + channel, d.dout_bf16)
        if d.silu:
            pre = _pre_activation(d, token, channel, _taps_inside(d, token, start, stop), step)
            value = value * silu_slope(pre)
        store(target, at, value)


@device
def _backward_tile(d, channel, first, last, start, stop, pre, dweights):
    """Gradient of x in tokens first .. last, and their share in the weights'. `pre` holds taps - 1 tokens more."""
    halo = d.taps - 1
    step = -1 if d.reverse else 1
    origin = first - halo if d.reverse else first
    _fill_pre_gradient(d, channel, origin, last if d.reverse else last + halo, start, stop, pre)
    for token in range(first, last):
        _fetch_next_tile(d, channel, token)
        value = splat(np.float32(0))
        if d.dx_partial != 0:
            value = load(d.dx_partial, token * d.dx_partial_stride + channel)
        for ahead in range(d.taps):
            weight = load(d.weight, (halo - ahead) * d.channels + channel)
            value = fma(weight, load(pre, LANES * (token + step * ahead - origin)), value)
        store_as(d.dx, token * d.dx_stride + channel, value, d.dx_bf16)
    for back in range(d.taps):
        slot = (halo - back) * d.channels
        total = load(dweights, slot)
        for token in range(max(first, start + back), last) if step == 1 else range(first, min(last, stop - back)):
            x = load_as(d.x, (token - step * back) * d.x_stride + channel, d.bf16)
            total = fma(load(pre, LANES * (token - origin)), x, total)
        store(dweights, slot, total)
    bias = load(dweights, d.taps * d.channels)
    for token in range(first, last):
        bias = bias + load(pre, LANES * (token - origin))
    store(dweights, d.taps * d.channels, bias)


def conv_backward_vectors(taps):
    """Vectors of scratch that a worker of `conv_backward` needs."""
    return TILE + taps


@kernel
def conv_backward(directions, borders, tasks, worker_starts, scratch):
    """Run every task (sequence, first block, last block, group) over the workers, directions in order."""
    for worker in numba.prange(len(worker_starts) - 1):
        for i in range(worker_starts[worker], worker_starts[worker + 1]):
            sequence = tasks[i, 0]
            start, stop = borders[sequence], borders[sequence + 1]
            for k in range(len(directions)):
                d = directions[k]
                for block in range(tasks[i, 1], tasks[i, 2]):
                    channel = LANES * block
                    dweights = d.dweights + 4 * (sequence * (d.taps + 1) * d.channels + channel)
                    for row in range(d.taps + 1):
                        store(dweights, row * d.channels, splat(np.float32(0)))
                    for first in range(start, stop, TILE):
                        last = min(stop, first + TILE)
                        _backward_tile(d, channel, first, last, start, stop, aligned(scratch[worker]), dweights)
