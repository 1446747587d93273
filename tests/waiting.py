"""How long tests wait, on any machine: for what must come, and for what must be taken for a hang."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from subprocess import Popen

import psutil

LIMIT = float(os.environ.get("TEST_LIMIT", "1200"))
"""Seconds, for all that ends by itself. Machines and what else they do differ by a factor of thirty, and on a GPU
kernels may have to be compiled first."""
SHOWN = 6000
"""Characters of what a process printed, at most."""


def wait_for(condition: Callable[[], object], what: str, *processes: Popen) -> None:
    """Return when `condition()` is true; fail when one of the processes has ended before, or after LIMIT.

    The failure shows what they printed, and none of them is left running.
    """
    end = time.monotonic() + LIMIT
    while not condition():
        ended = [process for process in processes if process.poll() is not None]
        if ended and not condition():
            code, printed = ended[0].returncode, ended[0].communicate()
            raise AssertionError(f"the process ended with {code} before {what}: {printed}")
        if time.monotonic() > end:
            raise AssertionError(f"waited {LIMIT:g} s for {what}\n" + "\n".join(map(kill, processes)))
        time.sleep(0.1)


def kill(process: Popen) -> str:
    """End a process with all that it has started; the end of what was printed."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for each in (*parent.children(recursive=True), parent):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    return "".join(process.communicate())[-SHOWN:]


def patience(seconds: float) -> float:
    """`seconds` on a free machine, more where its cores are shared."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
