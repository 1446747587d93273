"""A run's folder is one process's at a time: refused while it lives, free when it is dead, on one host or several."""

import errno
import json
import multiprocessing
import os
import signal
import time

import pytest

from launch.run import lock
from launch.run.lock import FolderLock
from tests.waiting import wait_for
from vim_backbone import UserError

context = multiprocessing.get_context("fork")


def hold(folder, ready):
    FolderLock(folder, "run").acquire()
    child = os.fork()  # as a data-loading process, which outlives its parent for a while
    if child == 0:
        time.sleep(60)
        os._exit(0)
    ready.send(child)
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock, and its child."""
    ready, theirs = context.Pipe(duplex=False)
    process = context.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    child = ready.recv()
    yield process
    process.kill()
    process.join()
    os.kill(child, signal.SIGKILL)


def test_a_live_holder_is_named_and_a_dead_one_forgotten(tmp_path, holder):
    words = rf"is in use by process {holder.pid} on .*: wait for its run or stop it, or choose another --name"
    with pytest.raises(UserError, match=words):
        FolderLock(tmp_path, "run").acquire()
    os.kill(holder.pid, signal.SIGSTOP)  # suspended is not dead
    with pytest.raises(UserError, match=words):
        FolderLock(tmp_path, "run").acquire()
    holder.kill()
    holder.join()
    with FolderLock(tmp_path, "run"), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        FolderLock(tmp_path, "run").acquire()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_of_the_disk_the_process_is_looked_for(tmp_path, holder, monkeypatch):
    def unsupported(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
        FolderLock(tmp_path, "run").acquire()
    holder.kill()
    holder.join()
    FolderLock(tmp_path, "run").__enter__().release()


@pytest.fixture
def other_host(tmp_path, monkeypatch):
    """The lock of a holder elsewhere whose disk keeps locks to each host; returns its file."""
    monkeypatch.setattr(lock, "STALE", 2.0)
    path = tmp_path / ".lock"
    path.touch()
    holder = {"host": "node7", "boot": "another", "pid": 12, "began": 0.0, "inode": path.stat().st_ino}
    path.write_text(json.dumps(holder))
    return path


def test_another_host_is_waited_for_and_refused_while_it_shows_signs_of_life(tmp_path, other_host, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: os.utime(other_host))
    with pytest.raises(UserError, match="in use by process 12 on node7"):
        FolderLock(tmp_path, "run").acquire()


def test_a_holder_on_another_host_without_signs_of_life_is_dead(tmp_path, other_host, capfd):
    began = time.monotonic()
    with FolderLock(tmp_path, "run"):
        assert time.monotonic() - began >= 2.0
    assert capfd.readouterr().err.count("still goes on on node7") == 1


def test_the_holder_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with FolderLock(tmp_path, "run"):
        first = (tmp_path / ".lock").stat().st_mtime_ns
        wait_for(lambda: (tmp_path / ".lock").stat().st_mtime_ns != first, "a sign of life")


@pytest.mark.parametrize("content", [b"", b"half a li", b"\xff\x00", b"[]", b"null", b'{"host": "a"}', b"9" * 5000])
def test_an_odd_or_copied_file_holds_nothing(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    FolderLock(tmp_path, "run").__enter__().release()


def test_a_copy_of_a_held_folder_is_free(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with FolderLock(tmp_path / "a", "run"):
        (tmp_path / "b/.lock").write_bytes((tmp_path / "a/.lock").read_bytes())
        FolderLock(tmp_path / "b", "run").__enter__().release()


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write in .*nowhere: No such file or directory"):
        FolderLock(tmp_path / "nowhere", "run").acquire()
