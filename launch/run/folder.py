"""A run's folder: made for a fresh run, checked for a resumed one. A sweep's is made the same way."""

import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from accelerate import Accelerator

from launch.run.accelerator import on_main
from launch.run.config import RunConfig, differences, write_config
from launch.run.lock import LOCK, FolderLock
from launch.run.metrics import METRICS, forget_after
from launch.state.checkpoint import HIDDEN, NAME, Checkpoint, checkpoints, newest_valid, rotate, tidy
from vim_backbone.errors import UserError
from vim_backbone.files import discard, explain, remove, write_text

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LAUNCHER = ".launcher"
FREE = {"model.recompute"}
"""Fields that a resumed run can change under any prefix: they take time or memory, and change no weight."""
ASIDE = re.compile(r"\..+\.(partial|deleted)")
"""Names of what was being written or deleted when a process was killed."""
CONTROL = ("resume", "overwrite", "debug", "out")
"""Fields that say how a command starts, and nothing of the run."""


@dataclass
class Start:
    """How a run starts."""

    checkpoint: Path | None = None
    """Where it goes on from; None for a fresh run."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user: damaged checkpoints, fields that changed."""


@contextmanager
def run_folder(
    accelerator: Accelerator, config: RunConfig, fixed: Iterable[str], total_steps: int = 0
) -> Iterator[Start]:
    """Open the run's folder on the main process, and keep other runs out of it inside the block. For all processes.

    Args and errors as `open_run`.
    """
    lock = FolderLock(config.folder, "run")

    def open_locked() -> Start:
        prepare_folder(config.folder, "run", CONFIG, config.resume is True)
        lock.acquire()
        return open_run(config, fixed, total_steps)

    try:
        yield on_main(accelerator, open_locked)
    finally:
        lock.release()


def open_run(config: RunConfig, fixed: Iterable[str], total_steps: int = 0) -> Start:
    """Make or check the folder of the run, on the main process, which has its lock.

    Args:
        fixed: prefixes of dotted fields that a resumed run cannot change, such as "model."; the first are named first.
        total_steps: steps of the whole run; 0 for one that does not train.

    Raises:
        UserError: a run is there already, or there is nothing to resume, or what is there has another architecture.
    """
    folder = config.folder
    prepare_folder(folder, "run", CONFIG, config.resume is True)
    try:
        tidy(folder / CHECKPOINTS)
        if config.resume is True:
            return _resumed(config, folder, tuple(fixed), total_steps)
        again = _restarted_by_launcher(folder)
        if (again or config.resume == "auto") and checkpoints(folder / CHECKPOINTS):
            return _resumed(config, folder, tuple(fixed), total_steps)
        make_folder(folder, "run", CONFIG, overwrite=config.overwrite or config.resume == "auto" or again)
        _write_config(config)
        (folder / CHECKPOINTS).mkdir()
        write_text(folder / LAUNCHER, _launcher())
    except OSError as error:
        raise UserError(f"cannot use {error.filename or folder}: {explain(error)}; choose another --out") from error
    return Start()


def prepare_folder(folder: Path, kind: str, mark: str, resume: bool) -> None:
    """Make the folder where it is missing; one that is there must be of a run or sweep, or empty.

    Raises UserError where it cannot be made, is something else, or is missing and was to be resumed.
    """
    if resume and not folder.is_dir():
        raise UserError(f"nothing to resume: {folder} does not exist; start without --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = not os.path.lexists(folder / mark) and not all(_is_leftover(path) for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error
    if foreign and not resume:
        raise UserError(f"{folder} is no {kind}'s folder (it has no {mark}): it is not deleted, choose another --name")


def _is_leftover(path: Path) -> bool:
    """Whether a process that was killed before it had marked its folder may have left this in it."""
    if path.name == CHECKPOINTS and path.is_dir():
        return all(NAME.fullmatch(inner.name) or HIDDEN.fullmatch(inner.name) for inner in path.iterdir())
    return path.name in (LOCK, LAUNCHER) or ASIDE.fullmatch(path.name) is not None


def make_folder(folder: Path, kind: str, mark: str, overwrite: bool) -> None:
    """Empty a folder for a run or a sweep but for its lock, where that is allowed or it holds only leftovers.

    A kill on the way leaves a folder that the same command empties. Links are deleted, never what they point to.

    Args:
        kind: "run" or "sweep".
        mark: a file that every folder of this kind has.

    Raises:
        UserError: something is there, or it cannot be deleted.
    """
    prepare_folder(folder, kind, mark, resume=False)
    entries = sorted(path for path in folder.iterdir() if path.name != LOCK)
    whole = os.path.lexists(folder / mark) or checkpoints(folder / CHECKPOINTS)
    if whole and not overwrite:
        raise UserError(f"{folder} holds a {kind} already: add --resume to go on, --overwrite to replace it, or --name")
    try:
        # checkpoints first, so that none is gone on from; the mark last, so that the folder is known for what it is
        for path in sorted(entries, key=lambda path: (path.name == mark, path.name != CHECKPOINTS)):
            (remove if ASIDE.fullmatch(path.name) else discard)(path)
    except OSError as error:
        raise UserError(f"cannot delete {error.filename}: {error.strerror}; choose another --name") from error


def _resumed(config: RunConfig, folder: Path, fixed: tuple[str, ...], total_steps: int) -> Start:
    if not checkpoints(folder / CHECKPOINTS):
        raise UserError(f"nothing to resume: {folder / CHECKPOINTS} has no checkpoint; start with --overwrite instead")
    changed = {k: both for k, both in differences(config, folder / CONFIG).items() if k not in CONTROL}
    refused = [name for each in fixed for name in changed if name.startswith(each) and name not in FREE]
    if refused:
        name, (before, now) = refused[0], changed[refused[0]]
        raise UserError(
            f"{folder} was trained with {name} = {before}, not {now}: resume with the same architecture, "
            "or start another --name"
        )
    newest, damaged = newest_valid(folder / CHECKPOINTS)
    if newest is None:
        raise UserError(f"nothing to resume: {'; '.join(damaged)}; start with --overwrite instead")
    step = Checkpoint(newest).state["step"]
    if 0 < total_steps < step:
        raise UserError(f"the run has {total_steps} steps, {newest} is of step {step}: give more, or another --name")
    with suppress(OSError):
        rotate(newest, config.keep_checkpoints, config.keep_every)  # what a kill left undone
    notes = [f"{line}: going on from {newest.name}" for line in damaged]
    notes += [f"resumed with another {name}: {old} -> {new}" for name, (old, new) in changed.items()]
    notes += forget_after(folder / METRICS, step)
    if changed:
        earlier = folder / f"config-to-step-{step:08d}.yaml"
        if (
            step and not earlier.exists()
        ):  # what is there already trained up to this step, the one since then no further
            write_text(earlier, (folder / CONFIG).read_text(encoding="utf-8"))
        _write_config(config)
    write_text(folder / LAUNCHER, _launcher())
    return Start(newest, notes)


def _write_config(config: RunConfig) -> None:
    """Every setting; read again it neither resumes nor deletes anything by itself."""
    write_config(replace(config, resume=False, overwrite=False), config.folder / CONFIG)


def _restarted_by_launcher(folder: Path) -> bool:
    """Whether the launcher that began the run in this folder has started its processes again (`--max_restarts`)."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not (folder / LAUNCHER).exists():
        return False
    return (folder / LAUNCHER).read_text(encoding="utf-8", errors="replace") == _launcher()


def _launcher() -> str:
    """What is true of this run of the launcher alone."""
    parent = psutil.Process().parent()
    return f"{socket.gethostname()} {parent.pid} {parent.create_time()}" if parent else ""
