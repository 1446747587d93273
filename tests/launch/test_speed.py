"""Expected speed, against the figures that it starts from."""

import pytest

from launch.planning.memory import Stack
from launch.planning.speed import measured, seconds_a_picture
from vim_backbone import UserError, named_config


def test_the_measured_step_is_what_the_speed_starts_from():
    """A backbone that sees everything, at the measured 23.5 ms for 128 pictures."""
    rows = measured("NVIDIA H200")
    tiny, large = (Stack(named_config(name, num_classes=0), 197) for name in ("vim_tiny", "vim_large"))
    assert seconds_a_picture([tiny], rows) == pytest.approx(23.5e-3 / 128, rel=0.03)
    assert 5 < seconds_a_picture([large], rows) / seconds_a_picture([tiny], rows) < 40
    with pytest.raises(UserError, match=r"no speeds of 'abacus' were measured: choose from .*NVIDIA H200"):
        measured("abacus")


def test_blocks_computed_again_cost_a_forward_pass_more():
    """A third: the backward pass costs about twice the forward one."""
    rows, config = measured("NVIDIA H200"), named_config("vim_small", num_classes=0)
    once, twice = (seconds_a_picture([Stack(config, 50, recompute)], rows) for recompute in (False, True))
    assert twice == pytest.approx(once * 4 / 3)
    assert seconds_a_picture([Stack(config, 50)] * 2, rows) == pytest.approx(2 * once)
