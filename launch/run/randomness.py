"""Randomness as a function of a key such as (seed, epoch, sample): nothing to save, nothing shared, exact on resume."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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

    For library code, such as augmentations, that draws from the global generators.
    """
    seed = seed_of(*key)
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
