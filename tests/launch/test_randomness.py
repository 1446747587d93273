"""Randomness is a function of its key, and leaves the global generators alone."""

import random

import numpy as np
import torch

from launch.run.randomness import generator, seed_of, seeded


def test_seeds_depend_on_every_part_of_the_key():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 2), (0, 2, 1)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert torch.equal(torch.rand(3, generator=generator(4, 2)), torch.rand(3, generator=generator(4, 2)))


def test_seeded_blocks_leave_the_global_generators_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    want = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with seeded(7, 8):
        inside = draw()
    assert draw() == want
    with seeded(7, 8):
        assert draw() == inside
