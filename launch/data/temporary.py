"""The folder of a process and its workers for sockets: one that a killed run leaves is removed by the next."""

import atexit
import contextlib
import fcntl
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "vim-workers-"
LOCK = "lock"


def take_temporary_folder() -> None:
    """Give multiprocessing a folder of its own, and remove those whose processes are gone. Once a process."""
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if settings.get("tempdir") is not None:
        return
    remove_left_folders()
    folder = tempfile.mkdtemp(prefix=PREFIX)
    lock = os.open(f"{folder}/{LOCK}", os.O_CREAT | os.O_RDWR)  # held until this process and its workers are gone
    with contextlib.suppress(OSError):  # a file system without locks: then nobody can take it for left behind either
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    settings["tempdir"] = folder
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)


def remove_left_folders() -> None:
    """Remove the folders that no process holds."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
