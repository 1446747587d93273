"""Masks: the count is exact, blocks are whole, and the key alone decides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.run.randomness import generator
from pretrain.masking import MaskConfig, draw_mask
from vim_backbone import UserError


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    ratio=st.floats(0.01, 0.99),
    unit=st.integers(1, 5),
    kind=st.sampled_from(["random", "block"]),
)
def test_the_count_is_exact(rows, columns, ratio, unit, kind):
    if rows * columns < 2:
        return
    config = MaskConfig(ratio=ratio, kind=kind, unit=unit)
    mask = draw_mask((rows, columns), config, generator(0))
    assert mask.shape == (rows * columns,)
    assert mask.sum().item() == config.num_masked(rows * columns)
    assert 0 < mask.sum().item() < rows * columns


def test_blocks_are_hidden_whole_but_for_the_last():
    mask = draw_mask((12, 12), MaskConfig(ratio=0.6, kind="block", unit=3), generator(1)).view(4, 3, 4, 3)
    hidden = mask.sum(dim=(1, 3)).flatten()  # hidden patches of each 3 x 3 unit: 86 = 9 units of 9, one of 5
    assert sorted(hidden.tolist()) == [0] * 6 + [5] + [9] * 9


def test_every_patch_is_hidden_as_often_as_any_other():
    masks = torch.stack([draw_mask((6, 6), MaskConfig(ratio=0.75), generator(i)) for i in range(600)]).float()
    assert masks.mean(0).min().item() > 0.75 - 0.08
    assert masks.mean(0).max().item() < 0.75 + 0.08


def test_the_key_decides():
    draws = [draw_mask((7, 9), MaskConfig(), generator(*key)) for key in ((0, 1, 2), (0, 1, 2), (0, 2, 1))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 75.0])
def test_ratio_outside_its_range(ratio):
    with pytest.raises(UserError, match=r"mask\.ratio is .*: it must lie between 0 and 1"):
        MaskConfig(ratio=ratio)
