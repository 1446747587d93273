"""How long tests wait, on any machine: for what must come, and for what must be taken for a hang."""

import os
import time
from collections.abc import Callable
from subprocess import Popen

LIMIT = 1200.0
"""Seconds, for all that ends by itself. Machines and what else they do differ by a factor of thirty."""


def wait_for(condition: Callable[[], object], what: str, *processes: Popen) -> None:
    """Return when `condition()` is true; fail when one of the processes has ended before, or after LIMIT."""
    end = time.monotonic() + LIMIT
    while not condition():
        ended = [process for process in processes if process.poll() is not None]
        if ended and not condition():
            code, printed = ended[0].returncode, ended[0].communicate()
            raise AssertionError(f"the process ended with {code} before {what}: {printed}")
        if time.monotonic() > end:
            raise AssertionError(f"waited {LIMIT:g} s for {what}")
        time.sleep(0.1)


def patience(seconds: float) -> float:
    """`seconds` on a free machine, more where its cores are shared."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
