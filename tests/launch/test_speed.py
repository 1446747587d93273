"""Expected speed, against the figures that it starts from."""

import pytest

from launch.planning.memory import Stack
from launch.planning.speed import measured, seconds_a_picture
from vim_backbone import UserError, named_config
from vim_backbone.memory import LEVELS


def test_the_measured_step_is_what_the_speed_starts_from():
    """A backbone that sees everything, at the measured 23.5 ms for 128 pictures."""
    rows = measured("NVIDIA H200")
    tiny, large = (Stack(named_config(name, num_classes=0), 197) for name in ("vim_tiny", "vim_large"))
    assert seconds_a_picture([tiny], rows) == pytest.approx(23.5e-3 / 128, rel=0.03)
    assert 5 < seconds_a_picture([large], rows) / seconds_a_picture([tiny], rows) < 40
    with pytest.raises(UserError, match=r"no speeds of 'abacus' were measured: choose from .*NVIDIA H200"):
        measured("abacus")


def test_what_is_made_again_costs_its_share_of_the_step():
    rows, config = measured("NVIDIA H200"), named_config("vim_small", num_classes=0)
    seconds = [seconds_a_picture([Stack(config, 50, level)], rows) for level in LEVELS]
    assert seconds == sorted(seconds)
    inputs, states = seconds[1:3]
    assert states == pytest.approx(inputs * 91.8 / 83.7, rel=1e-3)  # ms of a step on an H100
    assert seconds_a_picture([Stack(config, 50)] * 2, rows) == pytest.approx(2 * inputs)
