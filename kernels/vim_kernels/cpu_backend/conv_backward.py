"""Depthwise causal convolution and SiLU, backward; sums over tokens are taken tile by tile, in a fixed order."""

import numba
import numpy as np

from vim_kernels.cpu_backend.conv_forward import pre_activation, taps_inside
from vim_kernels.cpu_backend.jit import device, kernel
from vim_kernels.cpu_backend.records import TILE
from vim_kernels.cpu_backend.scan_backward import silu_slope
from vim_kernels.cpu_backend.scan_forward import aligned
from vim_kernels.cpu_backend.vector import LANES, fma, load, load_as, prefetch, splat, store, store_as


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
            pre = pre_activation(d, token, channel, taps_inside(d, token, start, stop), step)
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
