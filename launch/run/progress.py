"""How far work is and how long it still takes: a bar on a terminal, a line now and then elsewhere."""

import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_SECONDS = 10.0
"""Between lines where there is no terminal, and before the first step's wait is explained."""
COMPILING = "compiling kernels in the first step"


def user_console(quiet: bool = False) -> Console:
    """Lines and bars on stderr, bars and colours on a terminal alone.

    Jupyter and CI services set FORCE_COLOR, by which rich takes any pipe for a terminal; there each turn of a bar would
    be a line.
    """
    forced = None if sys.stderr.isatty() else False
    return Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, force_terminal=forced)


class Pace:
    """Seconds of an item, from the latest that were neither the first nor part of a slow start."""

    WINDOW = 100
    FEWEST = 3
    SLOW = 3.0
    """What takes so many times the median at the start was compiling."""

    def __init__(self) -> None:
        self._started = False
        self._seconds: deque[float] = deque(maxlen=self.WINDOW)

    def add(self, seconds: float) -> None:
        """The time of the next item; that of the first is left out."""
        if self._started:
            self._seconds.append(seconds)
        self._started = True

    def seconds(self) -> float | None:
        """Mean seconds of an item; None before enough are done."""
        if len(self._seconds) < self.FEWEST:
            return None
        limit = self.SLOW * statistics.median(self._seconds)
        while self._seconds[0] > limit:
            self._seconds.popleft()
        return statistics.mean(self._seconds)


class ProgressReport:
    """Reports on `total` items of which `done` are done; a context around the work."""

    def __init__(
        self, console: Console, unit: str, total: int, done: int = 0, work: Callable[[int], float] = float
    ) -> None:
        """`work`: of the first so many items, where some take longer than others."""
        self.console = console
        self._unit, self._total, self._done = unit, total, done
        self._work = work
        self._pace = Pace()
        self._bar = Progress(
            TextColumn(f"[bold]{unit}"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            console=console, disable=console.quiet or not console.is_terminal, redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        status = COMPILING if done < total else ""
        self._task = self._bar.add_task("", total=total, completed=done, status=status, left="")
        self._wait = threading.Timer(LINE_SECONDS, self._print, [f"{COMPILING} ..."])
        self._wait.daemon = True
        self._last = self._last_line = time.monotonic()

    def __enter__(self) -> "ProgressReport":
        self._bar.start()
        if self._bar.disable and self._done < self._total:
            self._wait.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._wait.cancel()
        with suppress(OSError):
            self._bar.stop()

    def update(self, done: int, status: str) -> None:
        """So many items are done in all."""
        self._wait.cancel()
        now = time.monotonic()
        if done > self._done:
            self._pace.add((now - self._last) / (self._work(done) - self._work(self._done)))
        self._done, self._last = done, now
        left = self.left()
        with suppress(OSError):
            self._bar.update(self._task, completed=done, status=status, left=left)
        if self._bar.disable and (now - self._last_line > LINE_SECONDS or done == self._total):
            self._last_line = now
            self._print("  ".join(part for part in (f"{self._unit} {done}/{self._total}", status, left) if part))

    def left(self) -> str:
        """The time that is left, in words; nothing where it is unknown or none."""
        seconds, work = self._pace.seconds(), self._work(self._total) - self._work(self._done)
        return f"about {timedelta(seconds=round(seconds * work))} left" if seconds is not None and work > 0 else ""

    def rate(self) -> str:
        """Items a second, in words; nothing where it is unknown."""
        seconds = self._pace.seconds()
        return f"{1 / seconds:.1f} a second" if seconds else ""

    def _print(self, line: str) -> None:
        with suppress(OSError):  # the terminal was closed
            self.console.print(line, markup=False)
