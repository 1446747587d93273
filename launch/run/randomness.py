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
