"""A sweep from its config to its report: what can be known to be wrong is refused before anything runs."""

import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from ray import tune

from finetune.config import FinetuneConfig
from finetune.registry import TASKS
from finetune.sweeping.cluster import ray_session
from finetune.sweeping.config import SweepConfig
from finetune.sweeping.ledger import JOURNAL, Ledger
from finetune.sweeping.progress import Progress
from finetune.sweeping.report import top_lines, write_report
from finetune.sweeping.space import Dimension, combinations, read_space
from finetune.sweeping.trial import arguments
from finetune.sweeping.tuning import build_scheduler, tune_trials
from launch.run.cli import parse
from launch.run.config import differences, field_types, write_config
from launch.run.folder import make_folder, prepare_folder
from launch.run.lock import FolderLock
from launch.run.signals import Stopped, in_main_thread
from launch.run.yaml_files import read_yaml
from vim_backbone.errors import UserError, nearest
from vim_backbone.files import read_text

CONFIG = "sweep.yaml"
SET_BY_SWEEP = ("name", "out", "resume", "overwrite", "checkpoint_every", "keep_checkpoints", "debug")
"""Fields of a run that a sweep sets for each trial."""
CHANGEABLE = (
    "trials",
    "hours",
    "concurrent",
    "retries",
    "resources.",
    "ray.",
    "resume",
    "overwrite",
    "top",
    "debug",
    "out",
)
"""What may differ when a sweep is resumed."""
PATHS = ("backbone", "data.source", "data.statistics")


def sweep(config: SweepConfig) -> Path:
    """Run the sweep, or what is left of it, and return its folder.

    Raises UserError before any work where something asked for cannot be done, and Stopped after an interrupt.
    """
    config, space, base = resolve(config)
    open_folder(config)
    ledger = Ledger(config.folder, config.mode, config.metric, space)
    try:
        storage = check_storage(config.storage or str((config.folder / "trials").resolve()))
        with Progress(config.metric, config.trials or 0) as progress:
            with ray_session(config.ray, config.resources), sigterm_as_sigint():
                tune_trials(config, ledger, base, absolute_paths(config, space), storage, progress)
            for line in write_report(config, ledger):
                progress.say(line)
        entries = ledger.entries()
        remaining = (config.trials or 0) - sum(e.state not in ("waiting", "running") for e in entries)
        if remaining:
            line = f"{remaining} of {config.trials} trials are left: the same command with --resume goes on"
            raise Stopped(signal.SIGINT, line)
        if all(e.state == "failed" for e in entries):
            raise UserError(f"all {len(entries)} trials failed; the last: {entries[-1].error}")
    finally:
        ledger.close()
    return config.folder


@contextmanager
def sigterm_as_sigint() -> Iterator[None]:
    """SIGTERM and SIGHUP stop the sweep as Ctrl-C and SIGUSR1 do, which are all that Ray Tune heeds."""
    if not in_main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, lambda *_: signal.raise_signal(signal.SIGINT)) for n in numbers}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def top_commands(config: SweepConfig) -> list[str]:
    """The commands of the best trials so far, by the sweep's own record of its config."""
    folder = config.folder
    if not (folder / JOURNAL).exists():
        raise UserError(f"there is no sweep in {folder}: run it first")
    saved = parse(SweepConfig, [f"--config={folder / CONFIG}"], "", "")
    saved, space, _ = resolve(replace(saved, out=config.out, top=config.top))
    ledger = Ledger(folder, saved.mode, saved.metric, space)
    try:
        lines = top_lines(saved, ledger)
    finally:
        ledger.close()
    return lines or ["# no trial has come to its end yet"]


def resolve(config: SweepConfig) -> tuple[SweepConfig, list[Dimension], str]:
    """The config with the number of trials filled in, its space, and the text of the base file."""
    config_class = TASKS[config.task].config_class
    types = field_types(config_class)
    for name in [*config.fields, *config.space]:
        where = "fields" if name in config.fields else "space"
        if name not in types:
            raise UserError(f"{where}.{name}: no such field of {config.task}; {nearest(name, types)}")
        if name in SET_BY_SWEEP:
            raise UserError(f"{where}.{name}: the sweep sets it for each trial")
    if both := sorted(config.fields.keys() & config.space.keys()):
        raise UserError(f"{both[0]} stands in fields and in space: choose one")
    space = read_space(config.space, types)
    count = len(combinations(space))
    if config.searcher == "grid":
        if ranges := [d.field for d in space if not d.listed]:
            raise UserError(f"searcher is 'grid': space.{ranges[0]} must be a choice or a grid")
        space = [replace(d, kind="grid") for d in space]
        count = len(combinations(space))
        if config.trials is not None and config.trials > count:
            raise UserError(f"trials is {config.trials}: the grid has {count} combinations")
    if config.trials is None:
        if any(d.kind != "grid" for d in space):
            raise UserError("trials is None: say how many, because the space is not a grid alone")
        config = replace(config, trials=count)
    base = ""
    if config.base is not None:
        try:
            read_yaml(Path(config.base))
            base = read_text(Path(config.base))
        except UserError as error:
            raise UserError(f"base: {error}") from error
    check_values(config, config_class, space)
    build_scheduler(config, space)
    return config, space, base


def check_values(config: SweepConfig, config_class: type[FinetuneConfig], space: list[Dimension]) -> None:
    """Every listed value and both ends of every range are what the task's config takes; local folders exist."""
    first = {d.field: d.values[0] for d in space}
    for d in space:
        for value in d.values:
            argv = arguments(config.fields | first | {d.field: value})
            base = [f"--config={config.base}"] if config.base else []
            try:
                parse(config_class, [*base, *argv], "trial", "")
            except UserError as error:
                raise UserError(f"space.{d.field}, {value!r}: {error}") from error
            if d.field in PATHS:
                require_path(f"space.{d.field}", value)
    for name in PATHS:
        if name in config.fields:
            require_path(f"fields.{name}", config.fields[name])


def require_path(name: str, value: Any) -> None:
    """A local path is there, as far as no pattern is in it; names of the Hub and URLs are for the trials to find."""
    elsewhere = isinstance(value, str) and ("://" in value or value.startswith("hf:"))
    on_the_hub = name.endswith("backbone") and str(value).count("/") == 1 and not str(value).startswith((".", "/", "~"))
    unset = name.endswith("data.statistics") and value is None
    if not unset and not elsewhere and not on_the_hub and not before_pattern(Path(str(value)).expanduser()).exists():
        raise UserError(f"{name} is {value!r}: there is no such folder")


def before_pattern(path: Path) -> Path:
    """A path up to its first part with a wildcard or {split}."""
    return Path(*takewhile(lambda part: not set(part) & set("*?[{"), path.parts))


def absolute_paths(config: SweepConfig, space: list[Dimension]) -> dict[str, str]:
    """Paths that are here, as the sweep names them -> absolute, because a trial runs in a folder of its own."""
    values = [config.fields.get(name) for name in PATHS] + [v for d in space if d.field in PATHS for v in d.values]
    found = {}
    for value in values:
        if isinstance(value, str):
            prefix = "hf:" if value.startswith("hf:") else ""
            path = Path(value.removeprefix(prefix)).expanduser()
            if before_pattern(path).exists():
                found[value] = f"{prefix}{path.resolve()}"
    return found


def open_folder(config: SweepConfig) -> None:
    """Make the sweep's folder, or check that the one to be resumed is of the same sweep."""
    folder = config.folder
    prepare_folder(folder, "sweep", JOURNAL, config.resume is True)
    with FolderLock(folder, "sweep"):  # which the ledger takes again
        _open_locked(config, folder)


def _open_locked(config: SweepConfig, folder: Path) -> None:
    journal = folder / JOURNAL
    if journal.exists() and not journal.stat().st_size and not (folder / CONFIG).exists():
        journal.unlink()  # of a sweep that was killed before it began
    exists = journal.exists()
    if config.resume is True or (config.resume == "auto" and exists):
        if not exists:
            raise UserError(f"nothing to resume: there is no sweep in {folder}; start without --resume")
        for name, (before, now) in differences(config, folder / CONFIG).items():
            if not name.startswith(CHANGEABLE):
                raise UserError(f"{folder} was begun with {name} = {before}, not {now}: choose another --name")
    else:
        make_folder(folder, "sweep", JOURNAL, config.overwrite)
        journal.touch()  # first of all: it shows what the folder is
    write_config(config, folder / CONFIG)


def check_storage(storage: str) -> str:
    """The storage, after a file was written there and deleted. Raises UserError where that does not work."""
    try:
        place = tune.Checkpoint(storage)
        probe = f"{place.path.rstrip('/')}/.probe-{uuid.uuid4().hex}"
        files: Any = place.filesystem
        files.create_dir(place.path, recursive=True)
        with files.open_output_stream(probe) as file:
            file.write(b"")
        files.delete_file(probe)
    except Exception as error:  # each file system raises its own classes
        raise UserError(f"storage {storage} cannot be written: {' '.join(str(error).split())[:200]}") from error
    return storage
