"""Residual add and RMS norm, forward, for widths that are whole vectors."""

import math

import numba
import numpy as np

from vim_kernels.cpu_backend.jit import kernel
from vim_kernels.cpu_backend.vector import LANES, fma, lane_sum, load, load_as, splat, store, store_as


@kernel
def norm_forward(records, workers):
    """Total = residual + x; normed = total / rms(total) * weight."""
    for worker in numba.prange(workers):
        d = records[0]
        for row in range(d.rows * worker // workers, d.rows * (worker + 1) // workers):
            base = row * d.channels
            squares = splat(np.float32(0))
            for c in range(base, base + d.channels, LANES):
                value = load_as(d.x, c, d.bf16)
                if d.residual != 0:
                    value = value + load(d.residual, c)
                store(d.total, c, value)
                squares = fma(value, value, squares)
            rstd = splat(np.float32(1 / math.sqrt(lane_sum(squares) / d.channels + d.eps)))
            for c in range(0, d.channels, LANES):
                value = load(d.total, base + c) * rstd * load(d.weight, c)
                store_as(d.normed, base + c, value, d.bf16)
