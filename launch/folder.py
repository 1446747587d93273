"""A run's folder: made for a fresh run, checked for a resumed one."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from launch.checkpoint import checkpoints
from launch.config import RunConfig, differences, write_config
from vim_backbone.errors import UserError

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"


def open_run(config: RunConfig, fixed: Iterable[str]) -> list[str]:
    """Make or check the folder of the run; returns notes about fields changed since the run began.

    Args:
        fixed: prefixes of dotted fields that a resumed run cannot change, such as "model.".

    Raises:
        UserError: a run is there already, or there is nothing to resume, or what is there has another architecture.
    """
    folder = config.folder
    if config.resume:
        return _check_resumable(config, folder, tuple(fixed))
    if folder.is_dir() and any(folder.iterdir()):
        if not config.overwrite:
            raise UserError(
                f"{folder} holds a run already: add --resume to go on, --overwrite to replace it, or --name"
            )
        if not (folder / CONFIG).exists():
            raise UserError(
                f"{folder} is no run's folder (it has no {CONFIG}): it is not deleted, choose another --name"
            )
        shutil.rmtree(folder)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error
    write_config(config, folder / CONFIG)
    return []


def _check_resumable(config: RunConfig, folder: Path, fixed: tuple[str, ...]) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"nothing to resume: {folder} does not exist; start without --resume")
    if not checkpoints(folder / CHECKPOINTS):
        raise UserError(f"nothing to resume: {folder / CHECKPOINTS} has no checkpoint; start with --overwrite instead")
    changed = differences(config, folder / CONFIG)
    for name, (before, now) in changed.items():
        if name.startswith(fixed):
            raise UserError(
                f"{folder} was trained with {name} = {before}, not {now}: resume with the same architecture, "
                "or start another --name"
            )
    control = {"resume", "overwrite", "debug", "out"}
    return [f"{name}: {before} -> {now}" for name, (before, now) in changed.items() if name not in control]
