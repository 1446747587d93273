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


def test_seeded_blocks_draw_what_their_seed_gives_and_nest():
    with seeded(7, 8):
        outer = np.random.normal(), np.random.rand()
    expected = np.random.RandomState(seed_of(7, 8) % 2**32)
    assert outer == (expected.normal(), expected.rand())
    with seeded(7, 8):
        first = np.random.normal()
        with seeded(1):
            inner = np.random.rand()
        try:
            with seeded(2):
                raise KeyError
        except KeyError:
            second = np.random.rand()
    assert (first, second) == outer
    assert inner == np.random.RandomState(seed_of(1) % 2**32).rand()
