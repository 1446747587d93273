"""Depthwise causal convolution and SiLU, any number of taps, from the first token or from the last by index."""

import numba

from vim_kernels.cpu_backend.jit import device, kernel
from vim_kernels.cpu_backend.records import TILE
from vim_kernels.cpu_backend.vector import LANES, fma, load, load_as, prefetch, silu, store_as


@device
def taps_inside(d, token, start, stop):
    """Number of taps that meet a token of the sequence: 1 for its first, all from its taps-th on."""
    return min(d.taps, stop - token if d.reverse else token - start + 1)


@device
def pre_activation(d, token, channel, inside, step):
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
    near, last_tap = load(d.weight, 2 * d.channels + channel), load(d.weight, 3 * d.channels + channel)
    back, size = step * d.x_stride, 2 if d.bf16 else 4
    for token in range(first, last):
        at = token * d.x_stride + channel
        prefetch(d.x + size * (at + LANES))  # of the next block: rows lie far apart, no CPU guesses them
        prefetch(d.out + size * (token * d.out_stride + channel + LANES))
        value = fma(last_tap, load_as(d.x, at, d.bf16), bias)
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
            _activate(d, token, channel, pre_activation(d, token, channel, taps_inside(d, token, start, stop), step))
        _four_taps(d, channel, whole_first, whole_last, step)
        for token in range(whole_last, last):
            _activate(d, token, channel, pre_activation(d, token, channel, taps_inside(d, token, start, stop), step))


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
