"""Residual add and RMS norm, backward, for widths that are whole vectors."""

import math

import numba
import numpy as np

from vim_kernels.cpu_backend.jit import kernel
from vim_kernels.cpu_backend.vector import LANES, fma, lane_sum, load, load_as, splat, store


@kernel
def norm_backward(records, workers):
    """Gradient of the sum: dsum = dtotal + rstd (w dn - nhat mean(w dn nhat)).

    Each worker sums dn nhat over its rows for dweight.
    """
    for worker in numba.prange(workers):
        d = records[0]
        for c in range(0, d.channels, LANES):
            store(d.dweight, worker * d.channels + c, splat(np.float32(0)))
        for row in range(d.rows * worker // workers, d.rows * (worker + 1) // workers):
            base = row * d.channels
            squares, product = splat(np.float32(0)), splat(np.float32(0))
            for c in range(0, d.channels, LANES):
                total = load(d.total, base + c)
                squares = fma(total, total, squares)
                product = fma(load(d.weight, c) * load_as(d.dnormed, base + c, d.bf16), total, product)
            rstd = 1 / math.sqrt(lane_sum(squares) / d.channels + d.eps)
            pull = splat(np.float32(-lane_sum(product) / d.channels * rstd * rstd * rstd))
            rstd = splat(np.float32(rstd))
            for c in range(0, d.channels, LANES):
                total, dnormed = load(d.total, base + c), load_as(d.dnormed, base + c, d.bf16)
                dsum = fma(pull, total, rstd * load(d.weight, c) * dnormed)
                if d.dtotal != 0:
                    dsum = dsum + load(d.dtotal, base + c)
                store(d.dsum, base + c, dsum)
                at = worker * d.channels + c
                store(d.dweight, at, fma(dnormed, rstd * total, load(d.dweight, at)))
