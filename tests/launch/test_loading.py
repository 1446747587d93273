"""How many processes read; batches outlive them; loaders draw from no global generator."""

import multiprocessing

import joblib
import pytest
import torch
from torch.utils.data import Dataset

from launch.data.loading import RESTARTS, enduring, loader_of, number_of_workers, workers_of_stream
from launch.state.checkpoint import TrainState
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
    assert not multiprocessing.active_children(), "it ends, or this process would wait for it when it ends itself"


def test_a_loader_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loader = loader_of(range(6), list, seed=0, workers=0, ahead=2, batch_size=3)
    assert list(loader) == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(torch.get_rng_state(), before)


CORES = [
    (1, 1, 1),
    (2, 1, 2),
    (3, 1, 2),
    (4, 1, 3),
    (16, 1, 15),
    (64, 1, 16),
    (16, 8, 2),
    (8, 8, 1),
    (4, 8, 1),
    (208, 8, 16),
]


@pytest.mark.parametrize(("cores", "processes", "wanted"), CORES)
def test_each_training_process_reads_with_its_share_of_the_cores_but_one(monkeypatch, cores, processes, wanted):
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert number_of_workers(None) == wanted
    assert [number_of_workers(asked) for asked in (0, 1, 40)] == [0, 1, 40]


def test_a_loader_has_no_more_processes_than_batches(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

    def processes(batches, workers):
        return loader_of(range(9), list, seed=0, workers=workers, ahead=2, batch_sampler=batches).num_workers

    assert [processes([[0]] * 9, workers) for workers in (None, 0, 1, 8)] == [3, 0, 1, 8]
    assert [processes([[0]] * 2, workers) for workers in (None, 0, 1, 8)] == [2, 0, 1, 2]
    assert processes([], 8) == 0
    assert loader_of(range(9), list, seed=0, workers=3, ahead=2, batch_size=9).num_workers == 3


def test_a_resumed_stream_is_read_by_as_many_as_before_or_a_line_says_so(monkeypatch):
    def readers(asked, processes, step, extra):
        state = TrainState(torch.nn.Identity(), None, step=step, extra=extra)
        workers, lines = workers_of_stream(asked, processes, state)
        assert state.extra["stream"] == {"processes": processes, "workers": workers}
        assert state.extra["guard"] == 1
        return workers, *lines

    monkeypatch.setattr(joblib, "cpu_count", lambda: 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before = {"guard": 1, "stream": {"processes": 2, "workers": 7}}
    assert readers(None, 2, 0, {"guard": 1}) == (3,)
    assert readers(None, 2, 5, before | {}) == (7,)
    assert readers(7, 2, 5, before | {}) == (7,)
    for asked, processes, extra, was in (
        (None, 1, before, "2 x 7"),
        (0, 2, before, "2 x 7"),
        (3, 2, {"guard": 1}, "an"),
    ):
        workers, line = readers(asked, processes, 5, extra | {})
        assert workers == (7 if asked is None else asked)
        assert f"was read by {was} " in line
        assert f"is by {processes} x {workers} now: it does not go on exactly" in line
