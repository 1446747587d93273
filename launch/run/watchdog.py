"""Names the process that hangs: each one reports what it is doing, and who waits too long looks for the last one.

It also ends a process whose others are gone, or cannot go on: on GPUs it would wait for them in a collective.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator

from launch.run.errors import print_error
from launch.run.signals import Stopped, StopRequest, kill_children

HUNG = 75
"""Exit code of a run that a watchdog ended (EX_TEMPFAIL: trying again may help)."""
POLLS = 10
"""How many times the watchdog looks in the shortest time that counts as hanging."""
USER_ERROR = 2
"""Exit code of a process that ends because another one has printed an error."""
LOST = 1
"""Exit code of a process whose others are gone."""
TICK = 1.0
"""Seconds between signs of life to the others, at most."""
LOST_SECONDS = 10.0
"""How long after a signal to stop another process may give none: a launcher ends all where one has died, and sends
SIGKILL after 30 seconds to those that do not end."""
FLIGHT_RECORDER = "flight_recorder"
"""Folder of a run for PyTorch's records of collectives, read by `torchfrtrace --prefix rank_ FOLDER`."""
DUMP_SECONDS = 15.0
ENDED = "ended"
"""Key in the store: a process cannot go on."""


class Watchdog:
    """A thread that ends the process when a step takes longer than `seconds`, with a line on who holds it up.

    Until the first step is done the limit is `start_seconds`: then kernels are compiled, which is not hanging.
    Time for which the process was suspended (SIGSTOP, `scontrol suspend`) does not count.
    Use as a context around the loop and call `beat` whenever something new begins.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        seconds: float,
        start_seconds: float,
        folder: Path | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """`folder`: of the run, for the flight recorder; `stop`: who is told of signals."""
        self.rank = accelerator.process_index
        self.world = accelerator.num_processes
        self.seconds = seconds
        self.start_seconds = start_seconds
        self._pause = min(seconds, start_seconds) / POLLS
        self._first_step: int | None = None
        self._clock = RunningTime(self._pause)
        self._beat: dict[str, Any] = {"step": -1, "stage": 0, "doing": "starting", "since": 0.0}
        self._done = threading.Event()
        self._finished = False
        self._store: Any = None
        self._beats: dict[int, dict[str, Any]] = {}
        self._read = time.time()
        self.last_act: Callable[[], object] = lambda: None
        """What must be done before this process ends for the sake of others."""
        self._folder, self._stop = folder, stop or StopRequest()
        self._stopped: float | None = None
        if self.world > 1:
            self._store = dist.distributed_c10d.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
        # apart, because the store blocks for minutes where the link to the main host is cut
        self._teller = threading.Thread(target=self._tell, daemon=True, name="watchdog-store")
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        if self._store is not None:
            self._teller.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._finished = exception[0] in (None, Stopped)
        self._done.set()
        self._thread.join()
        if self._store is not None:
            self._teller.join(self._pause)

    def beat(self, step: int, stage: int, doing: str) -> None:
        """Something new begins: the `stage`-th of what `step` consists of."""
        if self._first_step is None:
            self._first_step = step
        self._beat = {"step": step, "stage": stage, "doing": doing, "since": self._clock.read()}

    def start_again(self) -> None:
        """The next step may take as long as the first one."""
        self._first_step = None

    def _watch(self) -> None:
        while not self._done.wait(self._pause):
            self._clock.tick()
            beat = self._beat
            # the others give the main process the time to speak first
            patience = self._limit(beat)[1] + (self._pause * 2 if self.rank else 0)
            if self._clock.read() - beat["since"] > patience:
                self._end(beat)

    def _limit(self, beat: dict[str, Any]) -> tuple[str, float]:
        """The field that limits what a process is doing, and its value in seconds."""
        started = self._first_step is not None and beat["step"] > self._first_step
        return ("hang_seconds", self.seconds) if started else ("start_seconds", self.start_seconds)

    def end_all(self) -> NoReturn:
        """End all processes of the run, which cannot go on; this one has printed why."""
        with suppress(RuntimeError):
            self._store.set(ENDED, str(self.rank))
            time.sleep(2 * TICK)  # they would say that this process is lost
        self._leave(USER_ERROR)

    def _leave(self, code: int) -> NoReturn:
        with suppress(Exception):  # whatever the disk or a thread has
            self.last_act()
        leave_at_once(code)

    def _tell(self) -> None:
        while True:
            try:
                self._store.set(str(self.rank), json.dumps(self._beat | {"seen": time.time()}))
                if self._store.check([ENDED]) and int(self._store.get(ENDED)) != self.rank and not self._done.is_set():
                    self._leave(USER_ERROR)
                stopped = self._has_been_stopped()
                if stopped or time.time() - self._read > self._pause:
                    keys = [str(rank) for rank in range(self.world)]
                    present = [key for key in keys if self._store.check([key])]
                    self._beats = {int(key): json.loads(self._store.get(key)) for key in present}
                    self._read = time.time()
            except RuntimeError:  # the main host is gone or the link is cut: the beats grow stale, and `_end` says so
                stopped = self._has_been_stopped() and time.time() - self._read < LOST_SECONDS
            if stopped and not self._done.is_set():
                self._look_for_lost()
            if self._done.wait(min(self._pause, TICK)):
                break
        if self._finished:  # silent from now on, and not lost
            with suppress(RuntimeError):
                self._store.set(str(self.rank), json.dumps(self._beat | {"seen": math.inf}))

    def _has_been_stopped(self) -> bool:
        """Whether a signal came long enough ago for all others to have given a sign of life since."""
        if self._stopped is None and self._stop.arrived():
            self._stopped = time.time()
        return self._stopped is not None and time.time() - self._stopped > LOST_SECONDS

    def _look_for_lost(self) -> None:
        """End this process where another one is lost: what it waits for will not come."""
        now = time.time()
        others = [(rank, beat) for rank, beat in sorted(self._beats.items()) if rank != self.rank]
        lost = [rank for rank, beat in others if now - beat["seen"] > LOST_SECONDS]
        if not lost:
            return
        if self.rank == min(self._beats.keys() - lost, default=self.rank):
            names = ", ".join(map(str, lost))
            line = f"error: process {names} of the run was lost, and process {self.rank} was told to stop"
            print_error(f"{line}; --resume goes on from the newest checkpoint")
        self._leave(LOST)

    def _end(self, beat: dict[str, Any]) -> None:
        waited = self._clock.read() - beat["since"]
        field, limit = self._limit(beat)
        line = f"error: step {beat['step'] + 1} hangs: for {waited:.0f} s ({field} is {limit:g}) "
        line += f"process {self.rank} has been {beat['doing']}"
        stale = 3 * self._pause
        if self._store is not None and time.time() - self._read > stale:
            line += f"; the main process's host has not been reached for {time.time() - self._read:.0f} s"
        elif self._store is not None:
            line += f"; {behind(self._beats, self.world, self.rank, stale)}"
        if self._folder is not None and (record := record_collectives(self._folder, self.rank)):
            line += f"; its last collectives are in {record}"
        print_error(f"{line}; --resume goes on from the newest checkpoint")
        leave_at_once(HUNG)


def leave_at_once(code: int) -> NoReturn:
    """End this process, whatever its other threads wait for."""
    kill_children()
    os._exit(code)


def record_collectives(run: Path, rank: int) -> Path | None:
    """Write what PyTorch's flight recorder has of this process's collectives into the run's folder.

    Returns the file, in PyTorch's own format (a pickle, for torchfrtrace); None where nothing was recorded.
    """
    if not dist.is_initialized():
        return None
    # in PyTorch 2.15 that of NCCL is another one than that of all else
    name = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
    dump = getattr(getattr(torch._C, "_distributed_c10d", None), name, None)
    path = run / FLIGHT_RECORDER / f"rank_{rank}"
    written: list[Path] = []

    def write() -> None:
        assert dump is not None
        with suppress(OSError, RuntimeError):
            content = dump()
            path.parent.mkdir(exist_ok=True)  # not its parents: a run's folder that was deleted is not made again
            path.write_bytes(content)
            written.append(path)

    if dump is not None:
        # apart, because it asks the GPU, which may hang too
        thread = threading.Thread(target=write, daemon=True, name="flight-recorder")
        thread.start()
        thread.join(DUMP_SECONDS)
    return written[0] if written else None


class RunningTime:
    """Seconds that this process ran for; no clock of the system stops while a process is suspended.

    Args:
        period: seconds between calls of `tick`. A longer gap counts as twice that, however long it was.
    """

    def __init__(self, period: float) -> None:
        self._longest = 2 * period
        self._at = 0.0, time.monotonic()

    def read(self) -> float:
        """Seconds since this was made, as far as the process ran."""
        before, ticked = self._at
        return before + min(time.monotonic() - ticked, self._longest)

    def tick(self) -> None:
        """To be called every `period` seconds, in one thread."""
        self._at = self.read(), time.monotonic()


def behind(beats: dict[int, dict[str, Any]], world: int, me: int, stale: float) -> str:
    """Who holds a run up, in words: processes that went silent, else those that got the least far."""
    now = time.time()
    if missing := sorted(set(range(world)) - beats.keys()):
        return ", ".join(f"process {rank} has never been heard of" for rank in missing)
    silent = sorted(rank for rank, beat in beats.items() if now - beat["seen"] > stale)
    if silent:
        return ", ".join(
            f"process {rank} has not been heard of for {now - beats[rank]['seen']:.0f} s" for rank in silent
        )
    first = min((beat["step"], beat["stage"]) for beat in beats.values())
    slow = sorted(rank for rank, beat in beats.items() if (beat["step"], beat["stage"]) == first)
    if slow == [me] or len(slow) == len(beats):
        return "no other process is behind it"
    return ", ".join(
        f"process {rank} is at step {beats[rank]['step'] + 1}, {beats[rank]['doing']}" for rank in slow if rank != me
    )
