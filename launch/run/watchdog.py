"""Names the process that hangs: each one reports what it is doing, and who waits too long looks for the last one.

It also ends a process whose others are gone, or cannot go on: on GPUs it would wait for them in a collective.
"""

import json
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
"""Key in the store: how many processes cannot go on."""


class Signs:
    """Signs of life of all processes of a run: what each is doing, and for how long it has been silent.

    A sign is a number that its process raises, and silence is counted by the clock of who reads: hosts' clocks differ.
    All methods raise RuntimeError where the store cannot be reached.
    """

    def __init__(self, store: Any, rank: int, world: int, period: float) -> None:
        """`period`: seconds between calls of `give`, by which time in suspension is known."""
        self._store, self._rank = store, rank
        self._keys = [str(rank) for rank in range(world)]
        self._number = 0
        self._moved: dict[int, float] = {}
        self._clock = RunningTime(period)
        self.beats: dict[int, dict[str, Any]] = {}
        """Of each process that has been heard of."""

    def give(self, beat: dict[str, Any], last: bool = False) -> None:
        """Tell the others what this process does; after the `last` sign it may be silent."""
        self._clock.tick()
        self._number += 1
        self._store.set(str(self._rank), json.dumps(beat | {"sign": None if last else self._number}))

    def read(self) -> None:
        """Hear of the others: two questions to the store, however many they are, once each has given a sign."""
        store, keys = self._store, self._keys
        present = keys if store.check(keys) else [key for key in keys if store.check([key])]
        beats = {int(key): json.loads(value) for key, value in zip(present, store.multi_get(present), strict=True)}
        now = self._clock.read()
        for rank, beat in beats.items():
            if rank not in self.beats or beat["sign"] != self.beats[rank]["sign"]:
                self._moved[rank] = now
        self.beats = beats

    def silence(self, rank: int) -> float:
        """Seconds for which a process that has been heard of has given no sign."""
        return 0.0 if self.beats[rank]["sign"] is None else self._clock.read() - self._moved[rank]

    def silent(self, seconds: float) -> list[int]:
        """Other processes that have been silent for longer."""
        return sorted(rank for rank in self.beats if rank != self._rank and self.silence(rank) > seconds)

    def behind(self, stale: float) -> str:
        """Who holds a run up, in words: processes silent for `stale` seconds, else those that got the least far."""
        beats = self.beats
        if missing := [key for key in self._keys if int(key) not in beats]:
            return ", ".join(f"process {rank} has never been heard of" for rank in missing)
        if silent := self.silent(stale):
            return ", ".join(f"process {rank} has not been heard of for {self.silence(rank):.0f} s" for rank in silent)
        first = min((beat["step"], beat["stage"]) for beat in beats.values())
        slow = sorted(rank for rank, beat in beats.items() if (beat["step"], beat["stage"]) == first)
        if slow == [self._rank] or len(slow) == len(beats):
            return "no other process is behind it"
        return ", ".join(
            f"process {rank} is at step {beats[rank]['step'] + 1}, {beats[rank]['doing']}"
            for rank in slow
            if rank != self._rank
        )


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
        self._period = min(self._pause, TICK)
        self._read = 0.0
        self.last_act: Callable[[], object] = lambda: None
        """What must be done before this process ends for the sake of others."""
        self._folder, self._stop = folder, stop or StopRequest()
        self._stopped: float | None = None
        self._has_said_why = False
        if self.world > 1:
            self._store = dist.distributed_c10d.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
            self._signs = Signs(self._store, self.rank, self.world, self._period)
        # apart, because the store blocks for minutes where the link to the main host is cut
        self._teller = threading.Thread(target=self._tell, daemon=True, name="watchdog-store")
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        if self.world > 1:
            self._teller.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._finished = exception[0] in (None, Stopped)
        self._done.set()
        self._thread.join()
        if self.world > 1:
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

    def end_all(self, line: str) -> NoReturn:
        """End all processes of the run, which cannot go on, with this line; of several that call, with the first's."""
        self._has_said_why, first = True, True
        with suppress(RuntimeError):
            first = self._store.add(ENDED, 1) == 1
        if first:
            print_error(line)
        time.sleep(2 * TICK)  # the others would say that this process is lost, and it may be the store's
        self._leave(USER_ERROR)

    def _leave(self, code: int) -> NoReturn:
        with suppress(Exception):  # whatever the disk or a thread has
            self.last_act()
        leave_at_once(code)

    def _tell(self) -> None:
        while True:
            with suppress(RuntimeError):  # the main host is gone or the link is cut: `_end` says so
                self._signs.give(self._beat)
                if self._store.check([ENDED]) and not self._has_said_why and not self._done.is_set():
                    self._leave(USER_ERROR)
                stopped_for = self._stopped_for()
                if stopped_for is not None or self._clock.read() - self._read > self._pause:
                    self._signs.read()
                    self._read = self._clock.read()
                # all others have had the time for a sign of life since
                if stopped_for is not None and stopped_for > LOST_SECONDS and not self._done.is_set():
                    self._look_for_lost()
            if self._done.wait(self._period):
                break
        if self._finished:  # silent from now on, and not lost
            with suppress(RuntimeError):
                self._signs.give(self._beat, last=True)

    def _stopped_for(self) -> float | None:
        """Seconds since a signal came."""
        if self._stopped is None and self._stop.arrived():
            self._stopped = time.monotonic()
        return None if self._stopped is None else time.monotonic() - self._stopped

    def _look_for_lost(self) -> None:
        """End this process where another one is lost: what it waits for will not come."""
        if not (lost := self._signs.silent(LOST_SECONDS)):
            return
        if self.rank == min(self._signs.beats.keys() - lost, default=self.rank):
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
        unreached = self._clock.read() - self._read
        if self.world > 1 and unreached > stale:
            line += f"; the main process's host has not been reached for {unreached:.0f} s"
        elif self.world > 1:
            line += f"; {self._signs.behind(stale)}"
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
