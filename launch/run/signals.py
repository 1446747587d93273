"""Interrupts: a run that must stop finishes its step, saves, and leaves with the signal's exit code."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""SIGHUP comes when the terminal is closed; SLURM is asked to send SIGUSR1 ahead of the time limit, because launchers
leave it to the processes."""
SAME_REQUEST_SECONDS = 1.0


class Stopped(Exception):  # noqa: N818 - it is no error
    """The run ended early because of a signal, with everything saved."""

    def __init__(self, signal_number: int, message: str, quiet: bool = False) -> None:
        super().__init__(message)
        self.signal = signal_number
        self.quiet = quiet
        """Another process informs the user."""


class StopRequest:
    """Which signal asked the run to stop, if any."""

    received: int | None = None
    _since = 0.0
    _arrived = False
    _pipe: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; a second Ctrl-C ends the process at once.

        The terminal, the launcher and the scheduler may each send the same request, so that only a later one counts.
        """
        del frame
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt

    def arrived(self) -> bool:
        """Whether a signal has come, be it one that Python has not noted yet.

        It does so in the main thread alone, which may wait for a GPU that waits for another process. For one thread.
        """
        pipe = self._pipe
        if pipe is not None:
            with suppress(OSError):  # nothing there, or closed meanwhile
                self._arrived |= any(number in STOPPING for number in os.read(pipe, 4096))
        return self._arrived or self.received is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Have Python write down the numbers of signals as they come."""
        self._pipe, end = os.pipe()
        for each in (self._pipe, end):
            os.set_blocking(each, False)
        before = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            pipe, self._pipe = self._pipe, None
            os.close(pipe)
            os.close(end)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the signals of STOPPING inside the block; in a thread, where Python lets none be caught, do nothing.

    A SIGHUP that is ignored (`nohup`) stays ignored.
    """
    request = StopRequest()
    if not in_main_thread():
        yield request
        return
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    before = {number: signal.signal(number, request) for number in STOPPING if not (nohup and number == signal.SIGHUP)}
    stop_with_launcher()
    try:
        with request.listening():
            yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_main_thread() -> bool:
    """Whether signal handlers can be set here; a trial of Ray runs in another thread."""
    return threading.current_thread() is threading.main_thread()


def stop_with_launcher() -> None:
    """Ask Linux to send SIGTERM when the launcher that started this process dies, so that no run is orphaned."""
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    if launched:
        die_with_parent(signal.SIGTERM)


def die_with_parent(number: int) -> None:
    """Ask Linux to send this process the signal when its parent dies, however it dies."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)


def kill_children() -> None:
    """Kill the data-loading processes; SIGTERM they ignore, and one that is stopped would outlive this process."""
    for child in multiprocessing.active_children():
        child.kill()
