"""Expected speed, against the figures that it starts from."""

import pytest

from launch.planning.memory import Stack
from launch.planning.speed import measured, seconds_a_picture
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.masked import DecoderConfig
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


def pretraining(name, pixels, scan):
    """Stacks of a step of masked pretraining: 75 % hidden, decoder 512 x 2."""
    model = ModelConfig(name=name, img_size=pixels, depth=None, patch_size=None, scan=scan)
    config = PretrainConfig(model=model, decoder=DecoderConfig(width=512, depth=2))
    return config.method.work(config.architecture(), 2, "inputs").stacks


STEPS = {
    ("vim_base", 224, "full"): 68.1 / 256, ("vim_small", 1024, "full"): 90.9 / 32,
    ("vim_base", 1024, "full"): 84.0 / 16, ("vim_small", 224, "full"): 72.2 / 512,
    ("vim_base", 2048, "full"): 96.8 / 4, ("vim_small", 2048, "full"): 110.5 / 8,
    ("vim_base", 224, "pooled"): 44.2 / 256, ("vim_small", 1024, "pooled"): 39.8 / 32,
    ("vim_base", 1024, "pooled"): 41.0 / 16, ("vim_base", 2048, "pooled"): 40.5 / 4,
}  # fmt: skip
"""Milliseconds a picture on an H100: docs/results-h100-2026-11-26.md."""


@pytest.mark.parametrize("case", STEPS)
def test_measured_steps_are_what_they_were_and_tell_of_others(case):
    """Each in turn is left out, and may then be off by a fifth; of the four with the pooled scan by 0.3.

    With it, the table's row is the page's.
    """
    rows, stacks = measured("NVIDIA H100"), pretraining(*case)
    assert seconds_a_picture(stacks, rows) == pytest.approx(STEPS[case] / 1e3, rel=1e-3)
    others = [row for row in rows if row.milliseconds / row.batch != STEPS[case]]
    assert len(others) == len(rows) - 1
    assert seconds_a_picture(stacks, others) == pytest.approx(STEPS[case] / 1e3, rel=0.2 if case[2] == "full" else 0.3)


def test_what_is_made_again_costs_its_share_of_the_step():
    rows, config = measured("NVIDIA H200"), named_config("vim_small", num_classes=0)
    seconds = [seconds_a_picture([Stack(config, 50, level)], rows) for level in LEVELS]
    assert seconds == sorted(seconds)
    inputs, states = seconds[1:3]
    assert states == pytest.approx(inputs * 91.8 / 83.7, rel=1e-3)  # ms of a step on an H100
    assert seconds_a_picture([Stack(config, 50)] * 2, rows) == pytest.approx(2 * inputs)
