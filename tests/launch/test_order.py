"""The order of samples: every epoch has each once, whatever the processes, accumulation and restarts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data.order import BatchPlan, StepSampler
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


def test_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match="batch_size 10 does not divide into 2 processes x 3"):
        BatchPlan(10, 3, 2, 0)
