"""Lays out a mixer's weights: channels last and filled up with zeros, decay rates in blocks of sixteen channels."""

import numpy as np

from vim_kernels.constants import LOG2E
from vim_kernels.cpu_backend.jit import device, serial_kernel
from vim_kernels.cpu_backend.vector import LANES, exp2_product, load, scalar_at, set_scalar, splat, store

ZERO = np.float32(0)


@device
def _copy(source, size, target, channels):
    """(size,) -> (channels,); zeros where the source is absent."""
    for d in range(channels):
        set_scalar(target, d, scalar_at(source, d) if source != 0 and d < size else ZERO)


@device
def _transpose(source, size, columns, target, channels):
    """(size, columns) -> (columns, channels)."""
    for c in range(columns):
        for d in range(channels):
            set_scalar(target, c * channels + d, scalar_at(source, d * columns + c) if d < size else ZERO)


@device
def _decay(A_log, size, states, target, channels):
    """(size, states) -> -exp(A_log) log2(e) as (channels / 16, states, 16)."""
    for d in range(channels):
        at = d // LANES * LANES * states + d % LANES
        for n in range(states):
            set_scalar(target, at + LANES * n, scalar_at(A_log, d * states + n) if d < size else ZERO)
    log2_e, minus_log2_e = splat(np.float32(LOG2E)), splat(np.float32(-LOG2E))
    for at in range(0, channels * states, LANES):
        store(target, at, exp2_product(load(target, at), log2_e) * minus_log2_e)


@serial_kernel
def lay_out_weights(records):
    """Fill each record's target, field after field of `DirectionWeights`."""
    for k in range(len(records)):
        d = records[k]
        target, row = d.target, 4 * d.channels
        _transpose(d.conv_weight, d.size, d.taps, target, d.channels)
        target += row * d.taps
        _copy(d.conv_bias, d.size, target, d.channels)
        target += row
        _transpose(d.dt_proj, d.size, d.rank, target, d.channels)
        target += row * d.rank
        _copy(d.dt_bias, d.size, target, d.channels)
        target += row
        _copy(d.skip, d.size, target, d.channels)
        target += row
        _decay(d.A_log, d.size, d.states, target, d.channels)
        target += row * d.states
        for c in range(d.columns):
            inside = c < d.x_proj_rows
            _copy(d.x_proj + 4 * c * d.size if inside else 0, d.size, target + row * c, d.channels)
