"""A run's folder: made for a fresh run, checked for a resumed one. A sweep's is made the same way."""

import os
import shutil
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from launch.run.config import RunConfig, differences, write_config
from launch.state.checkpoint import checkpoints, newest_valid
from vim_backbone.errors import UserError
from vim_backbone.files import write_text

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LAUNCHER = ".launcher"
FREE = {"model.recompute"}
"""Fields that a resumed run can change under any prefix: they take time or memory, and change no weight."""


@dataclass
class Start:
    """How a run starts."""

    checkpoint: Path | None = None
    """Where it goes on from; None for a fresh run."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user: damaged checkpoints, fields that changed."""


def open_run(config: RunConfig, fixed: Iterable[str]) -> Start:
    """Make or check the folder of the run, on the main process.

    Args:
        fixed: prefixes of dotted fields that a resumed run cannot change, such as "model.".

    Raises:
        UserError: a run is there already, or there is nothing to resume, or what is there has another architecture.
    """
    folder = config.folder
    if config.resume is True:
        return _resumed(config, folder, tuple(fixed))
    again = _restarted_by_launcher(folder)
    if (again or config.resume == "auto") and checkpoints(folder / CHECKPOINTS):
        return _resumed(config, folder, tuple(fixed))
    make_folder(folder, "run", CONFIG, overwrite=config.overwrite or config.resume == "auto" or again)
    (folder / CHECKPOINTS).mkdir()
    write_config(config, folder / CONFIG)
    write_text(folder / LAUNCHER, _launcher())
    return Start()


def make_folder(folder: Path, kind: str, mark: str, overwrite: bool) -> None:
    """Make an empty folder for a run or a sweep, in place of an earlier one where that is allowed.

    Args:
        kind: "run" or "sweep".
        mark: a file that only a folder of this kind has; without it nothing is deleted.

    Raises:
        UserError: something is there, or the folder cannot be made.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UserError(
                f"{folder} holds a {kind} already: add --resume to go on, --overwrite to replace it, or --name"
            )
        if not (folder / mark).exists():
            raise UserError(
                f"{folder} is no {kind}'s folder (it has no {mark}): it is not deleted, choose another --name"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error


def _resumed(config: RunConfig, folder: Path, fixed: tuple[str, ...]) -> Start:
    if not folder.is_dir():
        raise UserError(f"nothing to resume: {folder} does not exist; start without --resume")
    if not checkpoints(folder / CHECKPOINTS):
        raise UserError(f"nothing to resume: {folder / CHECKPOINTS} has no checkpoint; start with --overwrite instead")
    changed = differences(config, folder / CONFIG)
    for name, (before, now) in changed.items():
        if name.startswith(fixed) and name not in FREE:
            raise UserError(
                f"{folder} was trained with {name} = {before}, not {now}: resume with the same architecture, "
                "or start another --name"
            )
    newest, damaged = newest_valid(folder / CHECKPOINTS)
    if newest is None:
        raise UserError(f"nothing to resume: {'; '.join(damaged)}; start with --overwrite instead")
    write_text(folder / LAUNCHER, _launcher())
    control = {"resume", "overwrite", "debug", "out"}
    notes = [f"{line}: going on from {newest.name}" for line in damaged]
    notes += [f"resumed with another {k}: {old} -> {new}" for k, (old, new) in changed.items() if k not in control]
    return Start(newest, notes)


def _restarted_by_launcher(folder: Path) -> bool:
    """Whether the launcher that began the run in this folder has started its processes again (`--max_restarts`)."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not (folder / LAUNCHER).exists():
        return False
    return (folder / LAUNCHER).read_text(encoding="utf-8") == _launcher()


def _launcher() -> str:
    """What is true of this run of the launcher alone."""
    parent = psutil.Process().parent()
    return f"{socket.gethostname()} {parent.pid} {parent.create_time()}" if parent else ""
