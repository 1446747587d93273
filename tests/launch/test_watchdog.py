"""When the watchdog ends a process: by one limit while the run starts, by another from its second step on."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from launch.run.watchdog import HUNG, LOST, USER_ERROR, RunningTime, Signs, Watchdog
from tests.launch.real import ROOT, environment
from tests.waiting import LIMIT, patience, wait_for


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


def test_time_in_suspension_does_not_count(monkeypatch):
    """A clock that jumps by an hour between two ticks counts as two periods; one that ticks on time counts all."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = RunningTime(0.5)
    for _ in range(10):
        now[0] += 0.5
        clock.tick()
    assert clock.read() == pytest.approx(5.0)
    now[0] += 3600
    assert clock.read() == pytest.approx(6.0)
    clock.tick()
    now[0] += 0.25
    assert clock.read() == pytest.approx(6.25)


SUSPENDED = """
import os, sys, time
from types import SimpleNamespace
from launch.run.watchdog import Watchdog
with Watchdog(SimpleNamespace(process_index=0, num_processes=1), {limit}, {limit}) as dog:
    for step in range({steps}):
        dog.beat(step, 0, "computing")
        print(step, flush=True)
        time.sleep({pause})
print("done", flush=True)
"""


@pytest.mark.parametrize(("pause", "code"), [(0.5, 0), (60, HUNG)])
def test_a_suspended_run_goes_on_when_it_wakes(pause, code):
    """Stopped for longer than its limit; what does hang is still ended."""
    limit = patience(3.0)
    source = SUSPENDED.format(steps=6, pause=pause, limit=limit)
    environ = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, env=environ)
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(limit + 2)
    assert process.poll() is None
    process.send_signal(signal.SIGCONT)
    assert process.wait(LIMIT) == code
    assert process.stdout.read().endswith("done\n") == (code == 0)


IN_C = """
import hashlib, os, signal, sys, threading, time
from types import SimpleNamespace
import torch.distributed as dist
from launch.run import watchdog
from launch.run.signals import stop_requests
folder, rank = sys.argv[1], int(sys.argv[2])
watchdog.LOST_SECONDS = float(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
accelerator = SimpleNamespace(process_index=rank, num_processes=2)
if rank:  # a host whose clock is wrong by an hour
    right, time.time = time.time, lambda: right() - 3600
with stop_requests() as stop, watchdog.Watchdog(accelerator, 1000.0, 1000.0, None, stop) as dog:
    print("ready", flush=True)
    if sys.argv[3].startswith("tells"):
        time.sleep(3)
        if sys.argv[3] == "tells too":
            dist.barrier()  # sooner than either could hear of the other
        dog.end_all("error: no more")
    dog.last_act = lambda: print("last act", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as a wait for a GPU, and no handler of Python's runs meanwhile
"""


@pytest.fixture
def waiting_in_c(tmp_path):
    """Two processes, of which the second does something, and the first waits for it where it hears of nothing."""
    both = []

    def begin(does, silence=2.0, first="waits"):
        paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
        environ = environment(PYTHONPATH=paths, TORCHELASTIC_ERROR_FILE=str(tmp_path / "table.json"))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environ}
        argv = [sys.executable, "-c", IN_C, str(tmp_path)]
        words = [[str(rank), each, str(silence)] for rank, each in enumerate((first, does))]
        both.extend(subprocess.Popen([*argv, *each], **pipes) for each in words)
        for each in both:
            assert each.stdout.readline() == "ready\n"
        return both

    yield begin
    for each in both:
        each.kill()
        each.communicate()


def test_who_waits_for_a_lost_process_ends_when_it_is_told_to_stop(waiting_in_c, tmp_path):
    first, second = waiting_in_c("waits")
    time.sleep(3)  # signs of life of both
    second.kill()
    first.terminate()
    out, err = first.communicate(timeout=LIMIT)
    assert first.returncode == LOST
    assert "error: process 1 of the run was lost, and process 0 was told to stop; --resume goes on" in err
    assert json.loads((tmp_path / "table.json").read_text())["message"]["message"] in err.splitlines()  # torchrun's
    assert out == "last act\n"


def test_who_waits_goes_on_while_the_other_lives(waiting_in_c):
    silence = patience(2.0)
    both = waiting_in_c("waits", silence)
    both[0].terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        both[0].wait(5 * silence)


def test_all_end_where_one_cannot_go_on(waiting_in_c):
    first, second = waiting_in_c("tells")
    assert second.communicate(timeout=LIMIT)[1] == "error: no more\n"
    out, err = first.communicate(timeout=LIMIT)
    assert (first.returncode, second.returncode) == (USER_ERROR, USER_ERROR)
    assert out == "last act\n"
    assert "error:" not in err


def test_there_is_one_line_where_several_cannot_go_on(waiting_in_c):
    both = waiting_in_c("tells too", first="tells too")
    printed = [each.communicate(timeout=LIMIT)[1] for each in both]
    assert [each.returncode for each in both] == [USER_ERROR, USER_ERROR]
    assert sorted(printed) == ["", "error: no more\n"]


class Counted:
    """A store that counts the questions."""

    def __init__(self, store):
        self.store, self.calls = store, []

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self.store, name)


@pytest.fixture
def signs(monkeypatch):
    """(number of processes) -> their signs of life, and a clock to set, in seconds."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.time", lambda: pytest.fail("clocks of hosts differ"))

    def make(world):
        store = Counted(dist.HashStore())
        return [Signs(store, rank, world, period=1.0) for rank in range(world)], now, store

    return make


def doing(step):
    return {"step": step, "stage": 0, "doing": "computing"}


def test_silence_is_counted_by_the_clock_of_who_reads(signs):
    (first, second, third), now, _ = signs(3)
    second.give(doing(1))
    third.give(doing(1), last=True)
    first.give(doing(1))
    first.read()
    for _ in range(20):
        now[0] += 1.0
        first.give(doing(1))
        first.read()
    assert first.silent(19.5) == [1], "the third has said that it would be"
    assert first.silence(1) == pytest.approx(20.0)
    second.give(doing(1))
    first.read()
    assert first.silent(0.5) == []
    now[0] += 3600  # in which the reader was suspended
    assert first.silence(1) == pytest.approx(2.0)
    assert first.behind(1.5) == "process 1 has not been heard of for 2 s"


def test_a_process_that_gave_no_sign_yet_is_named(signs):
    (first, second, _), _, _ = signs(3)
    first.give(doing(1))
    second.give(doing(0))
    first.read()
    assert first.beats.keys() == {0, 1}
    assert first.behind(10.0) == "process 2 has never been heard of"


def test_hundreds_are_heard_of_by_two_questions(signs):
    everyone, _, store = signs(300)
    for rank, each in enumerate(everyone):
        each.give(doing(int(rank != 7)))
    store.calls.clear()
    everyone[0].read()
    assert store.calls == ["check", "multi_get"]
    assert everyone[0].behind(10.0) == "process 7 is at step 1, computing"
