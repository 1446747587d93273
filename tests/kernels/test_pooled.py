"""The pooled scan: its reference against float64 loops over pictures in NumPy, and what it refuses."""

import itertools

import numpy as np
import pytest
import torch

from tests.kernels import oracle
from tests.kernels.pooled_cases import CASES, MASKED, PACKED, draw_picture, lines_of
from vim_kernels import NormWeights, ScanWeights, bidirectional_scan, pooled_scan

D, N, R = 6, 4, 2


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def weights(seed, d=D, n=N, r=R):
    return ScanWeights(
        conv_weight=draw(d, 4, seed=seed),
        conv_bias=draw(d, seed=seed + 1),
        x_proj=draw(r + 2 * n, d, seed=seed + 2) / d**0.5,
        dt_proj=draw(d, r, seed=seed + 3),
        dt_bias=draw(d, seed=seed + 4) - 1,
        A_log=draw(d, n, seed=seed + 5) / 2,
        D=draw(d, seed=seed + 6),
    )


def tokens_of(pictures, packed, d=D):
    count = sum(len(picture.visible) for picture in pictures)
    flat = draw(1, count, 2 * d, seed=3)
    return flat if packed else flat.view(len(pictures), -1, 2 * d)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_reference_equals_loops_over_pictures(case, by_column, with_norm):
    pictures, packed = CASES[case]
    xz = tokens_of(pictures, packed)
    forward, backward = weights(10), weights(20)
    norm = NormWeights(draw(D, seed=30), draw(D, seed=31)) if with_norm else None
    lines = lines_of(pictures, by_column=by_column, packed=packed, share=0.25)
    out = pooled_scan(xz, forward, backward, lines, norm=norm, backend="reference").flatten(0, 1)
    borders = [0, *itertools.accumulate(len(picture.visible) for picture in pictures)]
    for picture, (start, stop) in zip(pictures, itertools.pairwise(borders), strict=True):
        x, z = xz.flatten(0, 1)[start:stop].split(D, dim=1)
        count, length = picture.whole(by_column)
        weight = float(np.float32(0.25 / length))  # as the ops take it
        want = oracle.pooled_core(x, z, *picture.coordinates(by_column), count, weight, forward, backward, norm=norm)
        np.testing.assert_allclose(out[start:stop].numpy(), want, rtol=1e-9, atol=1e-12)


def test_lines_of_one_token_make_the_full_scan():
    pictures = [draw_picture(7, 1), draw_picture(4, 1)]
    xz, forward, backward = tokens_of(pictures, True), weights(10), weights(20)
    out = pooled_scan(xz, forward, backward, lines_of(pictures, packed=True), backend="reference")
    cu_seqlens = torch.tensor([0, 7, 11], dtype=torch.int32)
    want = bidirectional_scan(xz, forward, backward, cu_seqlens=cu_seqlens, backend="reference")
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("by_column", [False, True])
def test_reference_gradients(by_column):
    pictures = [draw_picture(2, 3), draw_picture(3, 2, 2)]
    lines = lines_of(pictures, by_column=by_column, packed=True)
    small = {"d": 3, "n": 2, "r": 1}
    tensors = [draw(1, 8, 6), *weights(10, **small), *weights(20, **small), draw(3, seed=30), draw(3, seed=31)]

    def op(xz, *tensors):
        two = ScanWeights(*tensors[:7]), ScanWeights(*tensors[7:14])
        return pooled_scan(xz, *two, lines, norm=NormWeights(*tensors[14:]), backend="reference")

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": torch.tensor([0, 9, 18, 20])}, r"lines.starts has dtype torch.int64, wanted int32"),
        ({"weights": torch.zeros(4)}, r"lines.weights has shape \(4,\), wanted \(15,\)"),
        ({"line_of": torch.zeros(27, dtype=torch.int32)}, r"lines.line_of is not the line of every position"),
        ({"order": torch.full((27,), 27, dtype=torch.int32)}, r"lines.order runs from 27 to 27, wanted tokens from 0"),
        ({"cu_lines": torch.tensor([0, 15], dtype=torch.int32)}, r"lines.cu_lines goes with packed rows of batch 1"),
    ],
)
def test_lines_that_do_not_fit_are_refused(change, message):
    lines = lines_of(MASKED)._replace(**change)
    with pytest.raises((ValueError, TypeError), match=message):
        pooled_scan(tokens_of(MASKED, False), weights(10), weights(20), lines)


def test_borders_that_do_not_fit_are_refused():
    lines, xz = lines_of(PACKED, packed=True), tokens_of(PACKED, True)
    assert lines.cu_lines is not None
    short = lines._replace(cu_lines=lines.cu_lines[:-1])
    with pytest.raises(ValueError, match=f"lines.cu_lines must increase from 0 to {lines.total}"):
        pooled_scan(xz, weights(10), weights(20), short)
    uneven = lines_of([MASKED[0], draw_picture(5, 6, 10), draw_picture(5, 6, 8)])
    with pytest.raises(ValueError, match="lines of different sequences meet"):
        pooled_scan(tokens_of(MASKED, False), weights(10), weights(20), uneven)
