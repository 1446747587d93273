"""The order of samples: every epoch has each once, whatever the processes, accumulation and restarts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data.order import BatchPlan, Passes, StepSampler, Turns
from vim_backbone import UserError


@given(
    count=st.integers(1, 40),
    micro=st.integers(1, 5),
    world=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    start=st.integers(0, 6),
)
def test_an_epoch_has_every_picture_once(count, micro, world, accumulation, start):
    batch = micro * world * accumulation
    steps = -(-3 * count // batch) + start
    order = [[] for _ in range(steps)]
    for step in range(start):
        for rank in range(world):
            sampler = iter(
                StepSampler(count, 5, BatchPlan(batch, accumulation, world, rank), step * accumulation, step + 1)
            )
            order[step] += [(a, rank, items) for a, items in enumerate(sampler)]
    for rank in range(world):  # resumed: one sampler from `start` on
        plan = BatchPlan(batch, accumulation, world, rank)
        for index, items in enumerate(StepSampler(count, 5, plan, start * accumulation, steps)):
            order[start + index // accumulation].append((index % accumulation, rank, items))
    samples = [item for step in order for _, _, items in sorted(step) for item in items]
    for epoch in range(len(samples) // count):
        passed = samples[epoch * count : (epoch + 1) * count]
        assert sorted(passed) == [(epoch, i) for i in range(count)]


def test_epochs_are_shuffled_differently():
    samples = [item for items in StepSampler(50, 5, BatchPlan(50, 1, 1, 0), 0, 2) for item in items]
    assert [i for _, i in samples[:50]] != [i for _, i in samples[50:]]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4), st.integers(0, 10**12))
def test_every_stretch_of_samples_has_each_source_by_its_weight(weights, start):
    turns = Turns(weights)
    taken, drawn = turns.before(start), []
    assert sum(taken) == start
    for position in range(start, start + 50):
        number, before = turns.at(position)
        assert before == taken[number] + drawn.count(number)
        drawn.append(number)
    for number, weight in enumerate(weights):
        assert abs(drawn.count(number) - 50 * weight / sum(weights)) < 3


def test_samples_of_two_sources_by_hand():
    assert [Turns([2, 1]).at(position)[0] for position in range(6)] == [0, 1, 0, 0, 1, 0]


def test_sources_are_passed_over_each_at_its_pace():
    samples = [item for items in StepSampler([4, 3], 5, BatchPlan(3, 1, 1, 0), 0, 12, [2, 1]) for item in items]
    first, second = ([item for item in samples if (item[1] < 4) == of_first] for of_first in (True, False))
    assert first == [Passes([4], [1], 5)[position] for position in range(24)]  # as it would be alone
    for epoch in range(4):
        assert sorted(second[3 * epoch : 3 * epoch + 3]) == [(epoch, 4), (epoch, 5), (epoch, 6)]
    assert [Passes([4, 3], [2, 1], 5)[position] for position in range(35, 17, -1)] == samples[:17:-1]
    alike = Passes([9, 9], [1, 1], 5)  # each has an order of its own
    assert [alike[2 * k][1] for k in range(9)] != [alike[2 * k + 1][1] - 9 for k in range(9)]
    assert [Passes([4, 3], [2, 1], 5).in_order(position) for position in range(4)] == [(0, 0), (0, 4), (0, 1), (0, 2)]


def test_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match="batch_size 10 does not divide into 2 processes x 3"):
        BatchPlan(10, 3, 2, 0)
