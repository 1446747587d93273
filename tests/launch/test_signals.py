"""Signals: what stops a run saves it, what is ignored stays so, and no data-loading process outlives its parent."""

import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from launch.data.loading import leave_signals_to_the_trainer
from launch.run.cli import run
from launch.run.signals import STOPPING, kill_children, stop_requests
from tests.launch.real import ROOT, SMALL, environment, rows_written
from tests.waiting import LIMIT, wait_for

context = multiprocessing.get_context("fork")


@pytest.mark.parametrize("number", STOPPING)
def test_each_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with stop_requests() as stop:
        signal.raise_signal(number)
        assert stop.received == number
    assert signal.getsignal(number) == before


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def worker(ready):
    leave_signals_to_the_trainer(0)
    ready.send(os.getpid())
    time.sleep(LIMIT)


def signalled_worker():
    leave_signals_to_the_trainer(0)
    signal.signal(signal.SIGUSR1, lambda number, frame: None)  # as a library that reads pictures may
    signal.raise_signal(signal.SIGUSR1)


def test_a_signal_of_a_worker_is_none_of_the_trainer():
    with stop_requests() as stop:
        child = context.Process(target=signalled_worker)
        child.start()
        child.join(LIMIT)
        assert child.exitcode == 0
        assert not stop.arrived()
        signal.raise_signal(signal.SIGUSR1)
        assert stop.arrived()


def parent(ready):
    context.Process(target=worker, args=(ready,), daemon=True).start()
    time.sleep(LIMIT)


def test_a_stopped_worker_dies_with_its_parent():
    ready, theirs = context.Pipe(duplex=False)
    process = context.Process(target=parent, args=(theirs,))
    process.start()
    child = psutil.Process(ready.recv())
    child.suspend()
    process.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the end of the worker")
    process.join()


def test_a_stopped_worker_is_killed_before_the_process_leaves():
    ready, theirs = context.Pipe(duplex=False)
    child = context.Process(target=worker, args=(theirs,), daemon=True)
    child.start()
    for number in STOPPING:
        os.kill(ready.recv() if number == STOPPING[0] else child.pid, number)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGSTOP)
    kill_children()
    child.join(LIMIT)
    assert child.exitcode == -signal.SIGKILL


def test_a_second_ctrl_c_prints_nothing(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert run(interrupted, []) == 130
    assert capsys.readouterr().err == ""


ENTRIES = [
    "pretrain/main.py", "finetune/main.py", "finetune/sweep.py", "pretrain/plan.py", "launch", "pretrain.bands",
    "finetune.predict", "finetune.sample_data",
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_ctrl_c_during_imports_prints_nothing(entry):
    """At the first import of the program after the one line that there must be."""
    run_it = f"run_path({str(ROOT / entry)!r}" if entry.endswith(".py") else f"run_module({entry!r}"
    code = (
        "import os, runpy, signal, sys\n"
        "def audit(event, args):\n"
        "    first = event == 'import' and args[0] in ('torch', 'numpy', 'accelerate')\n"
        "    if first: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(audit)\n"
        f"runpy.{run_it}, run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


@pytest.mark.slow
def test_a_closed_terminal_saves(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "pretrain/main.py"), *SMALL, "--steps=4000"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment(), start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)

    def two_steps():
        with suppress(BlockingIOError):
            os.read(ours, 65536)  # a full terminal would block the run
        return rows_written(tmp_path / "runs/run") >= 2

    wait_for(two_steps, "two steps")
    os.close(ours)  # the kernel sends SIGHUP, and what is printed from now on fails
    assert process.wait(LIMIT) == 128 + signal.SIGHUP
    done = rows_written(tmp_path / "runs/run")
    assert [p.name for p in (tmp_path / "runs/run/checkpoints").iterdir()] == [f"step-{done:08d}"]
