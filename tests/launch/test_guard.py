"""Which steps are bad, what follows from one, and an optimizer that passes bad ones over."""

import math

import pytest
import torch
from torch import nn

from launch.run.guard import LOWERED_STEPS, Guard, GuardConfig, take_only


def test_what_is_not_finite_is_bad():
    guard = Guard(GuardConfig())
    assert guard.wrong(1.0, 2.0) is None
    assert guard.wrong(1.0, None) is None
    assert guard.wrong(math.nan, 2.0) == "its loss is nan"
    assert guard.wrong(1.0, math.inf) == "its gradient norm is inf"


def test_a_spike_is_measured_against_the_median_of_good_steps():
    guard = Guard(GuardConfig(spike=3.0))
    for step in range(16):
        guard.note(step, 1.0 + step % 2, bad=False)  # median 1.5
    assert guard.wrong(4.4, 0.0) is None
    assert guard.wrong(4.6, 0.0) == "its loss 4.6 is over 3 times the usual 1.5"
    assert Guard(guard.config, guard.state()).wrong(4.6, 0.0) is not None  # a resumed run knows it too


def test_each_bad_step_halves_the_rate_for_a_while():
    guard = Guard(GuardConfig(on_bad_step="lower"))
    guard.note(5, math.nan, bad=True)
    guard.note(7, math.nan, bad=True)
    assert [guard.rate_factor(step) for step in (8, 5 + LOWERED_STEPS, 7 + LOWERED_STEPS)] == [0.25, 0.5, 1.0]


def test_many_bad_steps_in_a_row_end_the_run():
    guard = Guard(GuardConfig(max_bad_steps=2))
    for loss, bad, ends in [(math.nan, True, False), (1.0, False, False), (math.nan, True, False), (0, True, True)]:
        guard.note(0, loss, bad)
        assert guard.must_stop() == ends


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_is_not_good_changes_nothing_and_keeps_its_gradients(make):
    p = nn.Parameter(torch.ones(3))
    optimizer = make([p], lr=0.1)
    good = [False, True]
    take_only(optimizer, lambda: good.pop(0))
    gradient = p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert p.grad is gradient
    assert not optimizer.state[p]
    optimizer.step()
    assert (p < 1).all()
