"""One process at a time in the folder of a run or a sweep, on one host and over a disk that hosts share."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from vim_backbone.errors import UserError
from vim_backbone.files import explain

LOCK = ".lock"
BEAT = 5.0
"""Seconds between the holder's signs of life."""
STALE = 30.0
"""Seconds without one after which a holder on another host is dead, where the disk's own lock does not tell."""
LEASE = 150.0
"""Seconds that a file server may keep the lock of a host that died (NFS: 90 by default)."""

_handles: set[int] = set()


def _leave_to_parent() -> None:
    """A lock of `flock` lasts while any process has the file open: processes that are forked have it not."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


class FolderLock:
    """Held from `acquire` to `release`, or to the death of the process, however it dies.

    `flock` on FOLDER/.lock keeps others out, and the kernel frees it. Disks that hosts share pass it on (NFS), keep it
    to each host, or have none; therefore the file also says who holds it, and its time changes every BEAT seconds.
    Who finds the name of another host there, and the lock free, waits STALE seconds for such a change.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        """Args: kind: "run" or "sweep"."""
        self.folder = folder
        self.path = folder / LOCK
        self.kind = kind
        self._handle: int | None = None
        self._done = threading.Event()

    def acquire(self) -> None:
        """Take the lock. Raises UserError where another process has it, or the folder cannot be written."""
        began, first = time.monotonic(), None
        while True:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise UserError(f"cannot write in {self.folder}: {explain(error)}; choose another --out") from error
            try:
                locked = _flock(handle)
                holder, sign = _holder(handle), (os.fstat(handle).st_mtime_ns, os.fstat(handle).st_ino)
                first = first or sign
                waited = time.monotonic() - began
                if locked and not _is_at(handle, self.path):
                    continue  # its last holder has just deleted it
                if _is_free(locked, holder, waited):
                    self._take(handle)
                    handle = None
                    return
                if holder is None or holder["boot"] == _boot() or sign != first or waited >= LEASE:
                    raise UserError(self._refusal(holder))
            finally:
                if handle is not None:
                    os.close(handle)
            if sign == first and waited < 1:
                line = f"waiting whether the {self.kind} in {self.folder} still goes on on {holder['host']}"
                print(line, file=sys.stderr, flush=True)  # noqa: T201
            time.sleep(1.0)

    def release(self) -> None:
        """Let another process have the folder; without the lock, do nothing."""
        if self._handle is None:
            return
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        _handles.discard(self._handle)
        os.close(self._handle)
        self._handle = None

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _take(self, handle: int) -> None:
        process = psutil.Process()
        holder = {"host": socket.gethostname(), "boot": _boot(), "pid": process.pid, "began": process.create_time(),
                  "inode": os.fstat(handle).st_ino}  # fmt: skip
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(holder).encode() + b"\n", 0)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {explain(error)}") from error
        self._handle = handle
        _handles.add(handle)
        self._done.clear()
        self._thread = threading.Thread(target=self._beat, args=(handle,), daemon=True, name="folder-lock")
        self._thread.start()

    def _beat(self, handle: int) -> None:
        while not self._done.wait(BEAT):
            with contextlib.suppress(OSError):  # the disk is away for a while
                os.utime(handle)

    def _refusal(self, holder: dict[str, Any] | None) -> str:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        return f"{self.folder} is in use by {who}: wait for its {self.kind} or stop it, or choose another --name"


def _is_free(locked: bool | None, holder: dict[str, Any] | None, waited: float) -> bool:
    """Whether nobody has the lock. `locked`: this process got the kernel's, None where the disk has no such locks."""
    if locked is False:
        return False
    if holder is None:
        return True
    if holder["boot"] != _boot():
        return waited >= STALE
    return locked is True or not _is_alive(holder)


def _flock(handle: int) -> bool | None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK) else None
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> dict[str, Any] | None:
    """Who holds the lock by what the file says, None where it says nothing or is a copy of another folder's."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        record = {key: kind(holder[key]) for key, kind in
                 (("host", str), ("boot", str), ("pid", int), ("began", float), ("inode", int))}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if record["inode"] == os.fstat(handle).st_ino else None


def _is_alive(holder: dict[str, Any]) -> bool:
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["began"]) < 1
    except (psutil.Error, ValueError, OverflowError):
        return False


def _boot() -> str:
    """The start of this machine, which processes share whose locks and ids are the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"
