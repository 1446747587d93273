"""Checkpoints written beside the training: copied to CPU memory at once, put on disk by a thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from launch.state.checkpoint import Snapshot, write_snapshot
from vim_backbone.errors import UserError


class CheckpointWriter:
    """Writes one snapshot at a time; a second one waits for the first, so that two copies at most are in memory."""

    def __init__(self, folder: Path, keep: int, keep_every: int, asynchronous: bool) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Have the snapshot written. Raises UserError where an earlier one could not be."""
        self.wait()
        self._writing = self._thread.submit(write_snapshot, snapshot, self.folder, self.keep, self.keep_every)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises UserError where it could not be."""
        writing = self._writing
        if writing is not None:
            try:
                writing.result()
            finally:  # not before: a second thread may wait too
                self._writing = None

    def failure(self) -> str | None:
        """Why the last write failed, None while it goes on or when it went well."""
        if self._writing is None or not self._writing.done():
            return None
        error = self._writing.exception()
        if error is not None and not isinstance(error, UserError):
            raise error
        return str(error) if error is not None else None
