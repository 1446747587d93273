"""The pooled scan of every fast backend against the float64 reference: values and gradients."""

import pytest
import torch

from tests.kernels.pooled_cases import CASES, draw_picture, lines_of
from tests.kernels.test_backends import (
    BACKENDS,
    DEVICES,
    INTERPRETED,
    LOW_GRADIENT,
    LOW_VALUE,
    check_levels,
    compare,
    draw,
    every_backend,
    mixer_tensors,
)
from vim_kernels import Lines, NormWeights, ScanWeights, pooled_scan


def pooled_tensors(pictures, packed, d, n, r, w, *, norm=True, bias=True):
    count = sum(len(picture.visible) for picture in pictures)
    b = 1 if packed else len(pictures)
    tensors = mixer_tensors(b, count // b, d, n, r, w, bias=bias)
    return tensors | {
        "norm.weight": draw(d, seed=30) if norm else None,
        "norm.bias": draw(d, seed=31) if norm else None,
    }


def run_pooled(t, backend, lines):
    forward, backward = (ScanWeights(**{f: t[f"{q}.{f}"] for f in ScanWeights._fields}) for q in "fb")
    norm = None if t["norm.weight"] is None else NormWeights(t["norm.weight"], t["norm.bias"])
    lines = Lines._make(None if line is None else line.to(t["xz"].device) for line in lines)
    return (pooled_scan(t["xz"], forward, backward, lines, norm=norm, backend=backend),)


def check(backend, pictures, packed, *sizes, by_column=False, norm=True, bias=True, **tolerances):
    lines = lines_of(pictures, by_column=by_column, packed=packed)
    tensors = pooled_tensors(pictures, packed, *sizes, norm=norm, bias=bias)
    compare(lambda t, name: run_pooled(t, name, lines), tensors, backend, **tolerances)


@every_backend
@pytest.mark.parametrize(("by_column", "norm"), [(False, True), (True, False)])
@pytest.mark.parametrize("case", CASES)
def test_pooled(backend, case, by_column, norm):
    check(backend, *CASES[case], 32, 16, 12, 4, by_column=by_column, norm=norm)


@every_backend
@pytest.mark.parametrize("case", ["packed", "masked"])
def test_what_is_kept_or_made_again_gives_the_same_bits(backend, case):
    pictures, packed = CASES[case]
    lines = lines_of(pictures, by_column=True, packed=packed)

    def run(t, xz, recompute):
        forward, backward = (ScanWeights(**{f: t[f"{q}.{f}"] for f in ScanWeights._fields}) for q in "fb")
        norm = NormWeights(t["norm.weight"], t["norm.bias"])
        own = Lines._make(None if line is None else line.to(xz.device) for line in lines)
        y = pooled_scan(xz, forward, backward, own, norm=norm, recompute=recompute, backend=backend)
        return y, (*forward, *backward, *norm)

    none, inputs, states = check_levels(backend, pooled_tensors(pictures, packed, 32, 16, 12, 4), run)
    assert states == sum(line.nbytes for line in lines if line is not None) < inputs == none


@every_backend
@pytest.mark.parametrize(("d", "n", "r", "w"), [(3, 2, 1, 1), (24, 16, 5, 3), (72, 5, 2, 6)])
@pytest.mark.parametrize("norm", [False, True])
def test_pooled_of_any_width(backend, d, n, r, w, norm):
    check(backend, *CASES["packed"], d, n, r, w, by_column=True, norm=norm, bias=norm)


@every_backend
@pytest.mark.parametrize("by_column", [False, True])
def test_many_lines_and_long_ones(backend, by_column):
    check(
        backend,
        [draw_picture(45, 3), draw_picture(2, 70, 67), draw_picture(33, 1)],
        True,
        16,
        16,
        2,
        4,
        by_column=by_column,
    )


@every_backend
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooled_low_precision(backend, dtype, norm):
    truncates = 4 if backend == "triton" and INTERPRETED else 1
    through_norm = 1.5 if norm else 1  # the gradient before the norm is rounded once more
    low = {"dtype": dtype, "value": truncates * LOW_VALUE, "gradient": truncates * through_norm * LOW_GRADIENT}
    check(backend, [draw_picture(9, 8, 30), draw_picture(5, 7)], True, 48, 16, 12, 4, by_column=True, norm=norm, **low)


@every_backend
def test_pooled_without_tokens(backend):
    none = torch.zeros(0, dtype=torch.int32)
    lines = Lines(torch.zeros(1, dtype=torch.int32), none, torch.zeros(0), none)
    tensors = mixer_tensors(0, 3, 16, 4, 2, 4) | {"norm.weight": draw(16), "norm.bias": draw(16)}
    compare(lambda t, name: run_pooled(t, name, lines), tensors, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pooled_gives_the_same_bits_every_time(backend):
    pictures, packed = CASES["packed"]
    lines = lines_of(pictures, by_column=True, packed=packed)
    drawn = pooled_tensors(pictures, packed, 40, 16, 3, 4)
    inputs = {k: None if t is None else t.float().to(DEVICES[backend]) for k, t in drawn.items()}

    def run():
        leaves = {k: None if t is None else t.clone().requires_grad_() for k, t in inputs.items()}
        (out,) = run_pooled(leaves, backend, lines)
        out.square().sum().backward()
        return [out, *(t.grad for t in leaves.values() if t is not None)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@every_backend
def test_a_bad_token_stays_in_its_picture(backend):
    pictures, packed = CASES["packed"]
    lines = lines_of(pictures, packed=packed)
    drawn = pooled_tensors(pictures, packed, 32, 16, 12, 4)
    inputs = {k: t.float().to(DEVICES[backend]) for k, t in drawn.items() if t is not None}
    (clean,) = run_pooled(inputs, backend, lines)
    inputs["xz"][0, 14, 3] = float("nan")  # of the third picture, whose tokens are 13 to 16
    xz = inputs["xz"].requires_grad_()
    (y,) = run_pooled(inputs, backend, lines)
    assert torch.isnan(y[0, 13:17]).any()
    y.sum().backward()
    assert xz.grad is not None
    for untouched in (slice(0, 13), slice(17, None)):
        assert torch.equal(y[0, untouched], clean[0, untouched])
        assert torch.isfinite(xz.grad[0, untouched]).all()
