"""Folders of sockets: held while a process or a worker of it lives, removed by the next run after a kill."""

import os
import signal
import subprocess
import sys

from launch.data.temporary import LOCK, PREFIX, remove_left_folders

CODE = """
import os, signal
from multiprocessing.util import get_temp_dir
from launch.data.temporary import take_temporary_folder
take_temporary_folder()
take_temporary_folder()
print(get_temp_dir(), flush=True)
{end}
"""


def started(end, tmp_path):
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", CODE.format(end=end)], env=env, stdout=subprocess.PIPE, text=True)


def test_folders_of_killed_runs_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed = started("os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    (left,) = killed.communicate()[0].split()
    assert killed.returncode == -signal.SIGKILL
    assert os.path.exists(f"{left}/{LOCK}")
    alive = started("signal.pause()", tmp_path)
    assert alive.stdout is not None
    held = alive.stdout.readline().strip()
    assert os.path.basename(held).startswith(PREFIX)
    assert not os.path.exists(left)
    remove_left_folders()
    assert os.path.exists(held)
    ended = started("", tmp_path)
    (gone,) = ended.communicate()[0].split()
    assert not os.path.exists(gone)
    alive.kill()
    alive.wait()
    remove_left_folders()
    assert list(tmp_path.glob(f"{PREFIX}*")) == []
