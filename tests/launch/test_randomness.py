"""Randomness is a function of its key, and leaves the global generators alone."""

import random

import numpy as np
import torch

from launch.run.randomness import generator, hashes, seed_of, seeded, uniforms


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


def test_uniforms_are_those_of_splitmix64():
    # the first outputs of Vigna's splitmix64.c for the seed 0, and for 1234567
    top = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    more = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = uniforms(np.array([0, 1234567], np.uint64), 3)
    assert drawn.tolist() == [[(value >> 40) / 2**24 for value in row] for row in (top, more)]


def test_hashes_depend_on_every_number_and_its_place():
    keys = [(0,), (0, 0), (0, 1), (1, 0), (1, 2, 3), (3, 2, 1), (-1, 0)]
    assert len({int(hashes(*key)[0]) for key in keys}) == len(keys)
    epochs, indices = np.arange(300).repeat(300), np.tile(np.arange(300), 300)
    many = hashes(7, epochs, indices)
    assert len(np.unique(many)) == 90_000
    assert many[301] == hashes(7, 1, 1)[0]
    assert abs(uniforms(many, 1).mean() - 0.5) < 0.005
