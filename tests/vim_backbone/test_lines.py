"""Rows and columns of pictures as lines, against their definition, patch by patch."""

import pytest
import torch

from tests.kernels.pooled_cases import CASES, lines_of
from vim_backbone.lines import batch_lines, packed_lines

CPU = torch.device("cpu")


def assert_same(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_lines(case, share):
    pictures, packed = CASES[case]
    if packed:
        before, visible = 0, []
        for picture in pictures:
            visible += [before + patch for patch in picture.visible]
            before += picture.grid[0] * picture.grid[1]
        got = packed_lines([picture.grid for picture in pictures], CPU, visible=torch.tensor([visible]), share=share)
    else:
        visible = torch.tensor([picture.visible for picture in pictures])
        got = batch_lines(len(pictures), pictures[0].grid, CPU, visible=visible, share=share)
    for by_column in (False, True):
        assert_same(got[by_column], lines_of(pictures, by_column=by_column, packed=packed, share=share))


def test_without_a_mask_all_patches_are_visible():
    every = torch.arange(15).expand(2, -1)
    for got, want in zip(batch_lines(2, (5, 3), CPU), batch_lines(2, (5, 3), CPU, visible=every), strict=True):
        assert_same(got, want)
    every = torch.arange(15 + 4)[None]
    grids = [(5, 3), (1, 4)]
    for got, want in zip(packed_lines(grids, CPU), packed_lines(grids, CPU, visible=every), strict=True):
        assert_same(got, want)


def test_weights_are_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        lines = batch_lines(2, (3, 4), torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert [each.weights.dtype for each in lines] == [torch.float32] * 2
