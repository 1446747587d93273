"""Names the process that hangs: each one reports what it is doing, and who waits too long looks for the last one."""

import json
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator

from launch.run.signals import kill_children

HUNG = 75
"""Exit code of a run that a watchdog ended (EX_TEMPFAIL: trying again may help)."""
POLLS = 10
"""How many times the watchdog looks in the shortest time that counts as hanging."""


class Watchdog:
    """A thread that ends the process when a step takes longer than `seconds`, with a line on who holds it up.

    Until the first step is done the limit is `start_seconds`: then kernels are compiled, which is not hanging.
    Time for which the process was suspended (SIGSTOP, `scontrol suspend`) does not count.
    Use as a context around the loop and call `beat` whenever something new begins.
    """

    def __init__(self, accelerator: Accelerator, seconds: float, start_seconds: float) -> None:
        self.rank = accelerator.process_index
        self.world = accelerator.num_processes
        self.seconds = seconds
        self.start_seconds = start_seconds
        self._pause = min(seconds, start_seconds) / POLLS
        self._first_step: int | None = None
        self._clock = RunningTime(self._pause)
        self._beat: dict[str, Any] = {"step": -1, "stage": 0, "doing": "starting", "since": 0.0}
        self._done = threading.Event()
        self._store: Any = None
        self._beats: dict[int, dict[str, Any]] = {}
        self._read = time.time()
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

    def _tell(self) -> None:
        while True:
            try:
                self._store.set(str(self.rank), json.dumps(self._beat | {"seen": time.time()}))
                keys = [str(rank) for rank in range(self.world)]
                present = [key for key in keys if self._store.check([key])]
                self._beats = {int(key): json.loads(self._store.get(key)) for key in present}
            except RuntimeError:
                return  # the main host is gone or the link is cut: the beats grow stale, and `_end` says so
            self._read = time.time()
            if self._done.wait(self._pause):
                return

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
        print(line + "; --resume goes on from the newest checkpoint", file=sys.stderr, flush=True)  # noqa: T201
        kill_children()
        os._exit(HUNG)


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
