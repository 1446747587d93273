"""The reference ops against float64 loops in NumPy, and their gradients against finite differences."""

import itertools

import numpy as np
import pytest
import torch

from tests.kernels import oracle
from vim_kernels import ScanWeights, add_rms_norm, bidirectional_scan, causal_conv1d, selective_scan

BORDERS = {1: [0, 1], 2: [0, 1, 2], 7: [0, 3, 4, 7], 33: [0, 1, 17, 33]}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


def scan_inputs(b, l, d, n, dtype=torch.float64):
    return {
        "x": draw(b, l, d, dtype=dtype),
        "dt": draw(b, l, d, seed=1, dtype=dtype),
        "A": -draw(d, n, seed=2).exp(),
        "B": draw(b, l, n, seed=3, dtype=dtype),
        "C": draw(b, l, n, seed=4, dtype=dtype),
        "D": draw(d, seed=5),
        "z": draw(b, l, d, seed=6, dtype=dtype),
        "dt_bias": draw(d, seed=7),
    }


def mixer_weights(d, n, r, w, seed):
    return ScanWeights(
        conv_weight=draw(d, w, seed=seed),
        conv_bias=draw(d, seed=seed + 1),
        x_proj=draw(r + 2 * n, d, seed=seed + 2) / d**0.5,
        dt_proj=draw(d, r, seed=seed + 3),
        dt_bias=draw(d, seed=seed + 4) - 2,
        A_log=draw(d, n, seed=seed + 5),
        D=draw(d, seed=seed + 6),
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 33])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_equals_a_loop(length, reverse, packed):
    i = scan_inputs(1 if packed else 2, length, 5, 3)
    borders = BORDERS[length]
    count = len(borders) - 1 if packed else 2
    h0 = draw(count, 5, 3, seed=9)
    cu = torch.tensor(borders, dtype=torch.int32) if packed else None
    y, state = selective_scan(
        **i, dt_softplus=True, reverse=reverse, cu_seqlens=cu, initial_state=h0, return_final_state=True,
        backend="reference",
    )  # fmt: skip
    for s in range(count):
        row, part = (0, slice(borders[s], borders[s + 1])) if packed else (s, slice(None))
        cut = {k: i[k][row, part] for k in ("x", "dt", "B", "C", "z")}
        want_y, want_state = oracle.scan(
            **cut, A=i["A"], D=i["D"], dt_bias=i["dt_bias"], softplus=True, reverse=reverse, h0=h0[s]
        )
        np.testing.assert_allclose(y[row, part].numpy(), want_y, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(state[s].numpy(), want_state, rtol=1e-11, atol=1e-12)


def test_scan_without_options():
    i = scan_inputs(2, 9, 4, 2)
    dt = i["dt"].abs()
    y = selective_scan(i["x"], dt, i["A"], i["B"], i["C"], backend="reference")
    for row in range(2):
        want, _ = oracle.scan(i["x"][row], dt[row], i["A"], i["B"][row], i["C"][row])
        np.testing.assert_allclose(y[row].numpy(), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_gradients(reverse, packed):
    i = scan_inputs(1, 5, 3, 2)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32) if packed else None
    h0 = draw(2 if packed else 1, 3, 2, seed=9)
    tensors = [t.requires_grad_() for t in (*i.values(), h0)]

    def op(x, dt, A, B, C, D, z, dt_bias, h0):
        return selective_scan(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus=True, reverse=reverse, cu_seqlens=cu, initial_state=h0,
            return_final_state=True, backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, tensors)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_conv_equals_a_loop(length, width, reverse):
    x, weight, bias = draw(2, length, 5), draw(5, width, seed=1), draw(5, seed=2)
    y = causal_conv1d(x, weight, bias, reverse=reverse, backend="reference")
    for row in range(2):
        want = oracle.conv(x[row], weight, bias, reverse=reverse)
        np.testing.assert_allclose(y[row].numpy(), want, rtol=1e-12, atol=1e-13)


def test_conv_packed_without_activation_or_bias():
    x, weight = draw(1, 9, 5), draw(5, 4, seed=1)
    cu = torch.tensor([0, 2, 9], dtype=torch.int32)
    y = causal_conv1d(x, weight, None, None, cu_seqlens=cu, backend="reference")
    for part in (slice(0, 2), slice(2, 9)):
        np.testing.assert_allclose(y[0, part].numpy(), oracle.conv(x[0, part], weight, silu=False), rtol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 7, 33])
def test_mixer_core_equals_a_loop(length, packed, gated):
    d, n, r = 6, 4, 2
    forward, backward = mixer_weights(d, n, r, 4, seed=10), mixer_weights(d, n, r, 4, seed=20)
    xz = draw(1, length, 2 * d)
    borders = BORDERS[length] if packed else [0, length]
    cu = torch.tensor(borders, dtype=torch.int32) if packed else None
    inputs = xz if gated else xz[..., :d]
    y = bidirectional_scan(inputs, forward, backward, gated=gated, cu_seqlens=cu, backend="reference")
    for start, stop in itertools.pairwise(borders):
        x, z = xz[0, start:stop, :d], xz[0, start:stop, d:]
        want = oracle.mixer_core(x, z if gated else None, forward, backward)
        np.testing.assert_allclose(y[0, start:stop].numpy(), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_gaps_are_the_time_of_each_token_of_a_loop(packed):
    forward, backward = mixer_weights(6, 4, 2, 4, seed=10), mixer_weights(6, 4, 2, 4, seed=20)
    xz, borders = draw(1, 7, 12), [0, 3, 4, 7] if packed else [0, 7]
    gaps = torch.tensor([[1, 4, 1, 2, 9, 1, 1], [3, 1, 1, 2, 1, 1, 5]], dtype=torch.float32)[:, None]
    cu = torch.tensor(borders, dtype=torch.int32) if packed else None
    y = bidirectional_scan(xz, forward, backward, cu_seqlens=cu, gaps=gaps, backend="reference")
    for start, stop in itertools.pairwise(borders):
        here = slice(start, stop)
        want = oracle.mixer_core(xz[0, here, :6], xz[0, here, 6:], forward, backward, gaps[:, 0, here].tolist())
        np.testing.assert_allclose(y[0, here].numpy(), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gaps", [None, torch.tensor([[[1.0, 2, 1, 4, 3]], [[2, 1, 1, 1, 6]]])])
def test_mixer_core_gradients(gaps):
    forward, backward = mixer_weights(3, 2, 2, 4, seed=10), mixer_weights(3, 2, 2, 4, seed=20)
    tensors = [t.requires_grad_() for t in (draw(1, 5, 6), *forward, *backward)]
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)

    def op(xz, *weights):
        two = ScanWeights(*weights[:7]), ScanWeights(*weights[7:])
        return bidirectional_scan(xz, *two, cu_seqlens=cu, gaps=gaps, backend="reference")

    assert torch.autograd.gradcheck(op, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_state_in_float32(dtype):
    i = scan_inputs(1, 50, 8, 4, dtype=dtype)
    y, state = selective_scan(**i, dt_softplus=True, return_final_state=True, backend="reference")
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    f = {k: v.double() for k, v in i.items()}
    row = {k: f[k][0] for k in ("x", "dt", "B", "C", "z")}
    want, want_state = oracle.scan(**row, A=f["A"], D=f["D"], dt_bias=f["dt_bias"], softplus=True)
    rounding = torch.finfo(dtype).eps  # one rounding on the way out, none inside
    np.testing.assert_allclose(y[0].double().numpy(), want, rtol=rounding + 2e-5, atol=1e-5)
    np.testing.assert_allclose(state[0].double().numpy(), want_state, rtol=2e-5, atol=1e-5)


def test_add_rms_norm():
    x, residual, weight = draw(2, 5, 8), draw(2, 5, 8, seed=1), draw(8, seed=2)
    total = (x + residual).numpy()
    want = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * weight.numpy()
    normed, stream = add_rms_norm(x, residual, weight, backend="reference")
    np.testing.assert_allclose(stream.numpy(), total, rtol=1e-14)
    np.testing.assert_allclose(normed.numpy(), want, rtol=1e-12)
    normed, stream = add_rms_norm(x.bfloat16(), None, weight, backend="reference")
    assert normed.dtype == torch.bfloat16
    assert stream.dtype == torch.float32


def test_empty_inputs():
    i = scan_inputs(0, 3, 4, 2)
    y, state = selective_scan(**i, return_final_state=True, backend="reference")
    assert y.shape == (0, 3, 4)
    assert state.shape == (0, 4, 2)
    i = scan_inputs(2, 0, 4, 2)
    h0 = draw(2, 4, 2)
    y, state = selective_scan(**i, initial_state=h0, return_final_state=True, backend="reference")
    assert y.shape == (2, 0, 4)
    torch.testing.assert_close(state, h0)
