"""Batches outlive the processes that read them; loaders draw from no global generator."""

import pytest
import torch
from torch.utils.data import Dataset

from launch.data.loading import RESTARTS, enduring, loader_of
from vim_backbone import UserError


def dying(at):
    """A source of loaders of 0 .. 5: one dies before each number in `at`, once for each mention."""
    remaining = list(at)

    def loader_from(start):
        for number in range(start, 6):
            if number in remaining:
                remaining.remove(number)
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
            yield number

    return loader_from


def test_a_lost_process_costs_no_batch():
    lines = []
    assert list(enduring(dying([2, 2, 4]), 1, lines.append)) == [1, 2, 3, 4, 5]
    assert len(lines) == 3
    assert lines[0].startswith("a data-loading process was lost, its batches are read again: DataLoader worker")


def test_losses_without_a_batch_in_between_end_the_run():
    with pytest.raises(UserError, match=rf"died {RESTARTS + 1} times at batch 3 .*: is memory short"):
        list(enduring(dying([3] * (RESTARTS + 1)), 0, lambda line: None))


def test_other_errors_are_not_caught():
    def broken(start):
        raise RuntimeError("shape mismatch")
        yield

    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(enduring(broken, 0, lambda line: None))


class Refusing(Dataset):
    def __getitem__(self, index):
        raise UserError("the stream has no rows: set data.split")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_user_can_mend_is_one_line_whichever_process_says_it(workers):
    loader = loader_of(Refusing(), list, seed=0, workers=workers, ahead=2, sampler=[0])
    with pytest.raises(UserError) as caught:
        list(enduring(lambda start: loader, 0, lambda line: None))
    assert str(caught.value) == "the stream has no rows: set data.split"


def test_a_loader_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loader = loader_of(range(6), list, seed=0, workers=0, ahead=2, batch_size=3)
    assert list(loader) == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(torch.get_rng_state(), before)
