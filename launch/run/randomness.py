"""Randomness as a function of a key such as (seed, epoch, sample): nothing to save, nothing shared, exact on resume."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_GLOBAL: Any = np.random
"""Its types lack `get_bit_generator` and `set_bit_generator`."""
_SPARE: list[np.random.MT19937] = []
"""Generators of NumPy's that `seeded` does not use now; to make one takes 200 us."""


def seed_of(*key: int) -> int:
    """A 63-bit seed that depends on every number of the key and on their order."""
    # the length goes in first, because SeedSequence takes (0,) and (0, 0) for the same
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int) -> torch.Generator:
    """A fresh CPU generator for the key."""
    return torch.Generator().manual_seed(seed_of(*key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Run the block with the generators of Python, NumPy and PyTorch (CPU) seeded from the key, then put them back.

    A second normal deviate that NumPy had kept from before is dropped. For one thread.

    For library code, such as augmentations, that draws from the global generators.
    """
    seed = seed_of(*key)
    python, numpy = random.getstate(), _GLOBAL.get_bit_generator()
    # another one for NumPy's functions to draw from: to copy the state of theirs and back takes 100 us
    spare = _SPARE.pop() if _SPARE else np.random.MT19937(0)
    np.random.RandomState(spare).seed(seed % 2**32)
    try:
        _GLOBAL.set_bit_generator(spare)
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            # torch.manual_seed would also format a traceback, for a GPU that is not in use yet: 1 ms
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        _GLOBAL.set_bit_generator(numpy)
        _SPARE.append(spare)


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Step of splitmix64's counter."""


def hashes(*key: int | np.ndarray) -> np.ndarray:
    """Of many keys at once, whose numbers are whole, or arrays (b,) of whole ones: a 64-bit hash of each, (b,) uint64.

    Depends on every number and on their order, and is not `seed_of` of them.
    """
    parts = (np.uint64(part % 2**64) if isinstance(part, int) else part.astype(np.uint64) for part in key)
    columns = np.broadcast_arrays(*map(np.atleast_1d, parts))
    state = np.zeros(columns[0].shape, np.uint64)
    for column in columns:
        state = _mixed((state ^ column) + GOLDEN)
    return state


def uniforms(seeds: np.ndarray, count: int) -> np.ndarray:
    """Numbers in [0, 1), 24 bits each: of every seed (b,) uint64 the first `count` of splitmix64, (b, count) float32.

    Number k of a seed is a function of both alone (Steele, Lea and Flood, Fast splittable pseudorandom number
    generators, OOPSLA 2014), so that all are drawn at once.
    """
    counter = seeds[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return (_mixed(counter) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
