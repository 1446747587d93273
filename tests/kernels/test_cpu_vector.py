"""The functions of the CPU kernels' vectors, on this processor; test_cpu_narrow runs them on narrower ones."""

import numpy as np
import pytest

pytest.importorskip("numba", reason="the CPU kernels are Numba's")

import numba

from vim_kernels.cpu_backend.vector import LANES, exp2_product, load, silu, softplus, store

ROUNDING = 2.0**-24


@numba.njit
def _exp2(x, y, out, size):
    for i in range(0, size, LANES):
        store(out, i, exp2_product(load(x, i), load(y, i)))


@numba.njit
def _activations(x, silus, softpluses, size):
    for i in range(0, size, LANES):
        store(silus, i, silu(load(x, i)))
        store(softpluses, i, softplus(load(x, i)))


def exp2(x, y):
    x, y = (np.ascontiguousarray(np.broadcast_to(np.float32(v), np.broadcast(x, y).shape)) for v in (x, y))
    out = np.full_like(x, np.nan)
    _exp2(x.ctypes.data, y.ctypes.data, out.ctypes.data, x.size)
    return out


@pytest.mark.parametrize(("low", "high"), [(-1e-3, 0), (-1, 0), (-30, 0), (-125, 126)])
def test_exponential_is_exact_to_a_few_roundings(low, high):
    generator = np.random.default_rng(0)
    product, x = generator.uniform(low, high, 2**16), generator.uniform(0.5, 2, 2**16).astype(np.float32)
    y = (product / x).astype(np.float32)
    exact = x.astype(np.float64) * y
    bound = (6 + np.abs(exact)) * ROUNDING  # SSE2 and NEON round the product
    assert (np.abs(exp2(x, y) / 2.0**exact - 1) <= bound).all()


def test_exponential_at_its_ends():
    special = [0, -0.0, -127, -200, -1e4, -1e7, 127, np.nan, -np.nan] + [0] * 7
    got = exp2(np.float32(special), np.float32(1))
    assert (got[:2] == 1).all()  # exactly: slow decays multiply it many times
    assert (got[2:6] >= 0).all()
    assert (got[2:6] <= 2.0**-126).all()
    assert got[6] == 2.0**127
    assert np.isnan(got[7:9]).all()
    assert (got[9:] == 1).all()


def test_activations():
    x = np.concatenate([np.linspace(-10, 10, 2**12 - 16), np.full(8, -1e30), np.full(8, 1e30)]).astype(np.float32)
    silus, softpluses = np.empty_like(x), np.empty_like(x)
    _activations(x.ctypes.data, silus.ctypes.data, softpluses.ctypes.data, x.size)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(softpluses, np.logaddexp(exact, 0), rtol=2e-6, atol=2e-38)
    np.testing.assert_allclose(silus[:-16], exact[:-16] / (1 + np.exp(-exact[:-16])), rtol=2e-6)
    np.testing.assert_allclose(silus[-16:], np.maximum(x[-16:], 0), rtol=2e-6, atol=1e-6)
