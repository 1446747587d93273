"""What a run reports while it goes: metrics.jsonl, trackers, and a progress bar or plain lines on the main process."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator

from launch.run.config import RunConfig, plain
from launch.run.progress import ProgressReport, user_console
from launch.run.tracking import send_picture
from vim_backbone.errors import UserError, escaped, first_line
from vim_backbone.files import append_lines, explain, json_line, write_text

Item = TypeVar("Item")

METRICS = "metrics.jsonl"
LOG = "log.jsonl"
"""Every line of the run, with the time and the step at which it was written."""


class RunLog:
    """Metrics and progress of one run; silent on all processes but the main one."""

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        total_steps: int,
        start_step: int,
        work: Callable[[int], float] = float,
    ) -> None:
        """`work`: of the first so many steps, in any unit; the time that is left goes with it."""
        self.accelerator = accelerator
        self.active = accelerator.is_main_process
        self.console = user_console(quiet=not self.active)
        self._folder = config.folder
        self._step = start_step
        self._started = False
        self._refused: set[str] = set()
        """Trackers that did not take a picture."""
        try:
            accelerator.init_trackers("tracking", config={"config": json.dumps(plain(config))})
        except Exception as error:  # each tracker raises its own classes
            names = ", ".join(config.trackers)
            raise UserError(f"trackers is {names}: {first_line(error)}; set it up, or take it out") from error
        self._progress = ProgressReport(self.console, "step", total_steps, start_step, work)

    def __enter__(self) -> "RunLog":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__()
        if value is not None:
            with suppress(OSError):  # the reason may be the disk itself
                self._note(f"ended: {first_line(value) or type(value).__name__}")
        if value is None or self.accelerator.num_processes == 1:
            self.accelerator.end_training()
            return
        for tracker in self.accelerator.trackers:  # to take the group apart would wait for what the others never send
            tracker.finish()

    def say(self, line: str) -> None:
        """Print one line above the progress bar, on the main process, and note it in the run's log.

        To a terminal that was closed nothing is printed.
        """
        with suppress(OSError):
            self.console.print(line, markup=False)
        self._note(line)

    def _note(self, line: str) -> None:
        if self.active:
            row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": self._step, "line": escaped(line)}
            append_lines(self._folder / LOG, json_line(row | ({} if self._started else {"start": True})))
            self._started = True

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write one row to metrics.jsonl and the trackers."""
        if self.active:
            append_lines(self._folder / METRICS, json_line({"step": step} | values))
        self.accelerator.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a picture file in the trackers that take pictures; say once of a tracker that it does not take one.

        For the main process alone.
        """
        for tracker in self.accelerator.trackers:
            try:
                send_picture(tracker, step, name, path)
            except Exception as error:  # each tracker raises its own classes, and a lost picture ends no run
                if tracker.name not in self._refused:
                    self._refused.add(tracker.name)
                    self.say(f"tracker {tracker.name} takes no picture: {first_line(error)}; all are in {path.parent}")

    def progress(self, step: int, latest: dict[str, float]) -> None:
        """Move the bar, with the latest metrics beside it; without a terminal, print a line now and then."""
        self._step = step
        shown = f"loss {latest['loss']:.4f}  {latest['images_per_second']:.1f} images/s" if latest else ""
        self._progress.update(step, shown)


class Throughput:
    """Rates since they were last read: images and tokens a second over all processes, and the share spent waiting."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.images, self.tokens, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def waiting(self, batches: Iterator[Item]) -> Item:
        """The next batch, its time noted as waiting."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def read(self) -> dict[str, float]:
        """images_per_second, tokens_per_second, data_wait_share."""
        seconds = time.perf_counter() - self.since
        rates = {
            "images_per_second": self.images / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait_share": self.waited / seconds,
        }
        self._reset()
        return rates


def forget_after(path: Path, step: int) -> list[str]:
    """Drop rows of a metrics file that come after `step`, so that a resumed run writes none twice.

    Half a row at the end, from a run that was killed while it wrote, goes too, as does any line that is no row.

    Returns:
        Lines for the user, on what was no row.

    Raises:
        UserError: the file cannot be read or written.
    """
    rows = _rows(path)
    if not rows:
        return []
    kept = [json_line(row) for row in rows if row is not None and row["step"] <= step]
    write_text(path, "".join(kept))
    odd = sum(row is None for row in rows[:-1])
    return [f"{odd} lines of {path} are no rows of metrics and are left out"] if odd else []


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with a step of a file such as metrics.jsonl, also while it is written; none where there is no such file.

    A line that is no row is left out. Raises UserError for a file that cannot be read.
    """
    return [row for row in _rows(path) if row is not None]


def _rows(path: Path) -> list[dict[str, Any] | None]:
    """A row for each line, None for a line that is none; nothing where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {explain(error)}; move it away") from error
    return [_row(line) for line in lines]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes): of the GPU's allocator, else the process's resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
