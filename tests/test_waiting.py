"""What hangs in a test is ended with all that it started, and the failure shows what it printed."""

import sys
from pathlib import Path

import psutil
import pytest

from tests import waiting
from tests.launch.real import begin, environment, finish

HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("waits", [finish, lambda process: waiting.wait_for(lambda: False, "a step", process)])
def test_a_limit_shows_what_was_printed(device, waits, tmp_path, monkeypatch):
    """On either device's way to start a process."""
    (tmp_path / "hangs.py").write_text(HANGS)
    process = begin([sys.executable, str(tmp_path / "hangs.py")], tmp_path, environment(), device)
    if device == "cpu":
        waiting.wait_for(lambda: Path(process._output[0]).read_text(), "the first line", process)
    monkeypatch.setattr(waiting, "LIMIT", 5.0)
    with pytest.raises(AssertionError, match=r" 5 s") as raised:
        waits(process)
    _, words = str(raised.value).split("child ")
    child = int(words.split()[0])
    assert process.poll() is not None
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
