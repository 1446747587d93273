"""Checkpoints are written one after the other, beside the training; a failure shows at the next chance."""

import threading

import pytest

from launch.state import writer
from launch.state.checkpoint import Snapshot
from launch.state.writer import CheckpointWriter
from vim_backbone import UserError


@pytest.fixture
def slow_disk(monkeypatch):
    """Writes that wait until they are let go, and the steps that were written."""
    go, written = threading.Event(), []

    def write(snapshot, folder, keep, keep_every):
        assert go.wait(30)
        if snapshot.step < 0:
            raise UserError("the disk is full")
        written.append((snapshot.step, folder.name, keep, keep_every))

    monkeypatch.setattr(writer, "write_snapshot", write)
    return go, written


def test_the_training_goes_on_while_one_is_written(slow_disk, tmp_path):
    go, written = slow_disk
    checkpoints = CheckpointWriter(tmp_path / "checkpoints", 3, 100, asynchronous=True)
    checkpoints.write(Snapshot(1, {}, {}))  # returns, though nothing can be written yet
    assert written == []
    assert checkpoints.failure() is None
    go.set()
    checkpoints.write(Snapshot(2, {}, {}))
    assert written[0] == (1, "checkpoints", 3, 100)  # the second waited for the first
    checkpoints.wait()
    assert [step for step, *_ in written] == [1, 2]


def test_a_synchronous_one_is_there_when_write_returns(slow_disk, tmp_path):
    go, written = slow_disk
    go.set()
    CheckpointWriter(tmp_path, 3, 0, asynchronous=False).write(Snapshot(1, {}, {}))
    assert [step for step, *_ in written] == [1]


def test_a_failure_is_shown_and_raised_once(slow_disk, tmp_path):
    go, _ = slow_disk
    checkpoints = CheckpointWriter(tmp_path, 3, 0, asynchronous=True)
    checkpoints.write(Snapshot(-1, {}, {}))
    go.set()
    checkpoints._thread.shutdown(wait=True)
    assert checkpoints.failure() == "the disk is full"
    with pytest.raises(UserError, match="the disk is full"):
        checkpoints.wait()
    assert checkpoints.failure() is None
    checkpoints.wait()
