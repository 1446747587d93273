"""When the watchdog ends a process: by one limit while the run starts, by another from its second step on."""

from types import SimpleNamespace

import pytest

from launch.run.watchdog import Watchdog
from tests.waiting import LIMIT, wait_for


@pytest.fixture
def watchdog(monkeypatch):
    """(seconds, start_seconds) -> a watchdog of one process that writes down what it would end, in `ended`."""
    monkeypatch.setattr(Watchdog, "_end", lambda self, beat: (ended.append(dict(beat)), self._done.set()))
    ended = []

    def make(seconds, start_seconds):
        watching = Watchdog(SimpleNamespace(process_index=0, num_processes=1), seconds, start_seconds)
        return watching, ended

    return make


def test_starting_is_not_hanging(watchdog):
    dog, ended = watchdog(0.01, LIMIT)
    with dog:
        dog.beat(7, 0, "reading data")  # of a run that goes on from step 7
        dog.beat(7, 1, "computing")
        assert not dog._done.wait(0.5)  # fifty times the limit of a step
        dog.beat(8, 0, "reading data")
        wait_for(lambda: ended, "the end of a step that hangs")
    assert (ended[0]["step"], ended[0]["doing"]) == (8, "reading data")


def test_a_start_that_hangs_ends_by_its_own_limit(watchdog):
    dog, ended = watchdog(LIMIT, 0.01)
    with dog:
        wait_for(lambda: ended, "the end of a start that hangs")
    assert ended[0]["doing"] == "starting"
    assert dog._limit(ended[0]) == ("start_seconds", 0.01)
