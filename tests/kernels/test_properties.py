"""Any shape, stride and packing: the CPU backends against the float64 reference, values and gradients (hypothesis)."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vim_kernels import ScanWeights, add_rms_norm, available_backends, bidirectional_scan, causal_conv1d, selective_scan

BACKENDS = [name for name in ("cpu", "torch") if available_backends()[name] is None]
VALUE, GRADIENT = 3e-6, 1e-5

few = settings(
    max_examples=25, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@st.composite
def layouts(draw):
    """(batch, length, cu_seqlens or None): lengths about the kernels' tile of 32 tokens, 0 and 1 among them."""
    if draw(st.booleans()):
        images = draw(st.lists(st.sampled_from([1, 2, 5, 31, 32, 33, 40]), min_size=1, max_size=4))
        borders = torch.tensor([0, *images], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return 1, sum(images), borders
    return draw(st.sampled_from([0, 1, 2, 3])), draw(st.sampled_from([0, 1, 2, 31, 32, 33, 70])), None


def tensor(seed, *shape, stride="contiguous"):
    """Float32 in memory that is contiguous, transposed, every second channel of a wider tensor, or offset."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if stride == "transposed" and len(shape) == 3:
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    elif stride == "stepped":
        values = values.repeat_interleave(2, dim=-1)[..., ::2]
    elif stride == "half":
        values = torch.cat([values, values], dim=-1)[..., shape[-1] :]
    return values.requires_grad_()


taps = st.sampled_from([4, 4, 1, 3, 6])  # four have a kernel of their own
strides = st.sampled_from(["contiguous", "transposed", "stepped", "half"])


def compare(op, tensors, backend):
    """Outputs and gradients of op(backend, tensors), float32, against the float64 reference."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    actual, expected = op(backend, tensors), op("reference", exact)
    seeds = [torch.randn(w.shape, generator=torch.Generator().manual_seed(9)) for w in expected]
    got = torch.autograd.grad(actual, tensors, seeds, allow_unused=True)
    want = torch.autograd.grad(
        [w for w in expected if w.requires_grad], exact,
        [s.to(w.dtype) for s, w in zip(seeds, expected, strict=True) if w.requires_grad], allow_unused=True,
    )  # fmt: skip
    for g, w in zip(actual, expected, strict=True):
        assert (g - w).norm() <= VALUE * w.norm()
    largest = max((w.norm() for w in want if w is not None), default=0.0)  # a sum of one channel may cancel
    for g, w in zip(got, want, strict=True):
        if w is None:
            assert g is None or not g.any()
        else:
            assert (g - w).norm() <= GRADIENT * (w.norm() + 0.01 * largest)


@few
@given(layouts(), st.integers(1, 33), st.integers(1, 17), st.booleans(), st.booleans(), strides)
def test_selective_scan(backend, layout, d, n, reverse, has_options, stride):
    b, l, cu = layout
    tokens = [tensor(i, b, l, size, stride=stride) for i, size in enumerate((d, d, n, n))]
    options = [tensor(5, d), tensor(6, b, l, d, stride=stride), tensor(7, d)] if has_options else []
    state = [tensor(8, b if cu is None else len(cu) - 1, d, n)] if has_options else []

    def op(name, inputs):
        x, dt, B, C, A, *rest = inputs
        h0 = rest[3] if has_options else None
        return selective_scan(
            x, dt, -A.exp(), B, C, *rest[:3], dt_softplus=True, reverse=reverse, cu_seqlens=cu, initial_state=h0,
            return_final_state=True, backend=name,
        )  # fmt: skip

    compare(op, [*tokens, tensor(4, d, n), *options, *state], backend)


@few
@given(layouts(), st.integers(1, 33), st.integers(1, 17), st.integers(1, 5), taps, st.booleans(), strides)
def test_bidirectional_scan(backend, layout, d, n, r, taps, gated, stride):
    b, l, cu = layout
    xz = tensor(0, b, l, 2 * d if gated else d, stride=stride)
    shapes = [(d, taps), (d,), (r + 2 * n, d), (d, r), (d,), (d, n), (d,)] * 2
    weights = [tensor(1 + i, *shape, stride=stride) for i, shape in enumerate(shapes)]

    def op(name, inputs):
        xz, *weights = inputs
        two = (ScanWeights(*(0.5 * w for w in weights[k : k + 7])) for k in (0, 7))
        return (bidirectional_scan(xz, *two, gated=gated, cu_seqlens=cu, backend=name),)

    compare(op, [xz, *weights], backend)


@few
@given(layouts(), st.integers(1, 40), taps, st.booleans(), st.booleans(), strides)
def test_causal_conv1d(backend, layout, d, taps, reverse, silu, stride):
    b, l, cu = layout

    def op(name, inputs):
        options = {"reverse": reverse, "cu_seqlens": cu, "backend": name}
        return (causal_conv1d(*inputs, "silu" if silu else None, **options),)

    tensors = [tensor(0, b, l, d, stride=stride), tensor(1, d, taps, stride=stride), tensor(2, d)]
    compare(op, tensors, backend)


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 40), st.booleans(), strides)
def test_add_rms_norm(backend, leading, d, has_residual, stride):
    def op(name, inputs):
        x, weight, *residual = inputs
        return add_rms_norm(x, residual[0] if residual else None, weight, backend=name)

    tensors = [tensor(0, *leading, d, stride=stride), tensor(1, d)]
    compare(op, tensors + [tensor(2, *leading, d, stride=stride)] * has_residual, backend)
