"""Checkpoints: the same files whatever the strategy and the number of processes, whole or absent, checked by sha256.

A folder `step-00001000/` has model.safetensors, optimizer.safetensors (tensor `PARAMETER/KEY`), ema.safetensors where
averaging is on, state.json, and manifest.json with the sha256 and size of each. Nothing is pickled.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from launch.state.host_copies import finish_copies
from launch.state.optim_state import restore_state, whole_state
from launch.state.sharding import WeightAverage, fill, shape_of, whole_tensors
from vim_backbone.errors import UserError
from vim_backbone.files import discard, explain, flush, remove, write_json, write_tensors

NAME = re.compile(r"step-(\d{8,})")
HIDDEN = re.compile(r"\.(step-\d{8,})\.(partial|deleted)")
"""What a killed process leaves beside the checkpoints: one that was being written, one that was being deleted."""
FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
NEEDED = ("model.safetensors", "optimizer.safetensors", STATE)
"""Files of every checkpoint."""


@dataclass
class TrainState:
    """Everything that a run is: what must be written to go on as if never stopped.

    `optimizer` is the plain one, or DeepSpeed's ZeRO optimizer around it.
    """

    model: nn.Module
    optimizer: Any
    ema: WeightAverage | None = None
    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Snapshot:
    """A run at one step, apart from it: tensors in CPU memory and plain data."""

    step: int
    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def snapshot(state: TrainState, keep: bool = True) -> Snapshot:
    """Copy the state; only the processes that `keep` get tensors. For all processes."""
    files = {
        "model.safetensors": whole_tensors(state.model, keep),
        "optimizer.safetensors": whole_state(state.model, state.optimizer, keep),
    }
    if state.ema is not None:
        with state.ema.in_place():
            files["ema.safetensors"] = whole_tensors(state.model, keep)
    finish_copies()
    # through JSON, so that nothing in it goes on changing while another thread writes
    extra = json.loads(json.dumps(state.extra))
    return Snapshot(state.step, files, {"format": FORMAT, "step": state.step, "torch": torch.__version__} | extra)


def write_snapshot(snapshot: Snapshot, folder: Path, keep: int, keep_every: int = 0) -> Path:
    """Write a checkpoint aside, flush it to disk, rename it into place, then delete what need not be kept.

    Args:
        folder: is made where only it is missing, in a run's folder that is there.
        keep: newest checkpoints that stay, this one among them.
        keep_every: checkpoints of steps that this divides stay too; 0 for none.

    Raises:
        UserError: the disk is full, or refuses; the earlier checkpoints are left as they are.
    """
    final = folder / f"step-{snapshot.step:08d}"
    aside = folder / f".{final.name}.partial"
    earlier = folder / f".{final.name}.deleted"
    try:
        folder.mkdir(exist_ok=True)
        remove(aside)
        aside.mkdir()
        for name, tensors in snapshot.files.items():
            write_tensors(aside / name, tensors)
        write_json(aside / STATE, snapshot.state)
        write_json(aside / MANIFEST, {path.name: _identity(path) for path in sorted(aside.iterdir())})
        flush(aside)
        remove(earlier)
        with suppress(FileNotFoundError):
            os.replace(final, earlier)  # `tidy` puts it back after a kill here
        os.replace(aside, final)
        flush(folder)
    except (OSError, UserError) as error:
        with suppress(OSError):
            remove(aside)
        cause = explain(error) if isinstance(error, OSError) else str(error)
        if not folder.parent.is_dir():
            raise UserError(f"checkpoint at step {snapshot.step} not saved: {folder.parent} was deleted") from error
        raise UserError(f"checkpoint at step {snapshot.step} not saved: {cause}; {_remaining(folder)}") from error
    with suppress(OSError):  # what cannot be deleted now is tried again when the run starts again
        remove(earlier)
        rotate(final, keep, keep_every)
    return final


def _remaining(folder: Path) -> str:
    try:
        newest, _ = newest_valid(folder)
    except UserError as error:
        return str(error)
    return f"{newest} is intact, go on from it with --resume" if newest else "no earlier checkpoint is whole"


def rotate(newest: Path, keep: int, keep_every: int) -> None:
    """Delete checkpoints before `newest`, but for whole ones up to `keep` with it.

    Later ones stay: they were damaged or missing when the run went on from before them, or are no work of this run.
    """
    whole = 1
    for path in reversed([path for path in checkpoints(newest.parent) if _number(path) < _number(newest)]):
        if keep_every and _number(path) % keep_every == 0:
            continue
        try:
            stays = whole < keep and verify(path, cached=True) is None
        except UserError:
            continue
        if stays:
            whole += 1
        else:
            discard(path)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were put in place, oldest first. Raises UserError where the folder may not be read."""
    return sorted((path for path in _entries(folder) if NAME.fullmatch(path.name)), key=_number)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; resume as the user who may") from error


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def tidy(folder: Path) -> None:
    """Clear what a killed process left half-written or half-deleted; one that was still whole is put back."""
    for path in _entries(folder):
        if (name := HIDDEN.fullmatch(path.name)) is None:
            continue
        final = folder / name[1]
        if name[2] == "deleted" and not final.exists() and verify(path) is None:
            os.replace(path, final)
        else:
            remove(path)


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and a line for each newer one that is damaged.

    Raises UserError where one may not be read, which is no damage.
    """
    damaged = []
    for path in reversed(checkpoints(folder)):
        wrong = verify(path)
        if wrong is None:
            return path, damaged
        damaged.append(f"{path} is damaged ({wrong})")
    return None, damaged


def verify(path: Path, cached: bool = False) -> str | None:
    """Verify a checkpoint: what is wrong with it, None where every file has the size and sha256 that were written.

    Args:
        cached: of a file that this process has summed up and that was not touched since, the sum is not taken again.

    Raises:
        UserError: permission is missing.
    """
    try:
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            written = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in manifest.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"{MANIFEST} cannot be read: {' '.join(str(error).split())}"
        if missing := [name for name in NEEDED if name not in written]:
            return f"{MANIFEST} names no {missing[0]}"
        for name, (digest, size) in written.items():
            if Path(name).name != name:
                return f"{MANIFEST} names {name!r}, which is no file's name"
            if not (path / name).is_file():
                return f"{name} is missing"
            if (actual := (path / name).stat().st_size) != size:
                return f"{name} has {actual} bytes, {size} were written"
            if _identity(path / name, cached)["sha256"] != digest:
                return f"{name} has another sha256 than was written"
    except PermissionError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; resume as the user who may, or move {path} away to go on "
            "from an earlier checkpoint"
        ) from error
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except NotADirectoryError:
        return "it is no folder"
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        return f"it cannot be read: {explain(error) if isinstance(error, OSError) else error}"
    return None


class Checkpoint:
    """One checkpoint, read tensor by tensor. Raises UserError naming the file that is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {path / STATE}: {' '.join(str(error).split())}") from error
        if not isinstance(self.state, dict):
            raise UserError(f"{path / STATE} is no JSON object: delete {path} to go on from an earlier checkpoint")
        if self.state.get("format") != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {self.state.get('format')}, this code reads {FORMAT}: "
                "resume it with the version of the code that wrote it"
            )
        step = self.state.get("step")
        if type(step) is not int or step < 0:
            raise UserError(
                f"{path / STATE} has step {step!r}, no whole number: delete {path} to go on from an earlier checkpoint"
            )

    def load(
        self, state: TrainState, prepare: Callable[[TrainState], nn.Module] = lambda state: state.model
    ) -> nn.Module:
        """Fill the state, and return what `prepare` returns. For all processes.

        Args:
            prepare: hands model and optimizer over to a strategy, in the middle: DeepSpeed copies the weights when it
                makes its optimizer, and only then is there an optimizer to fill.
        """
        if state.ema is not None:
            with state.ema.in_place():
                self._fill(state.model, "ema.safetensors")
        self._fill(state.model, "model.safetensors")
        prepared = prepare(state)
        self._fill_optimizer(state)
        state.step = self.state["step"]
        state.extra = {key: value for key, value in self.state.items() if key not in ("format", "step", "torch")}
        return prepared

    def _fill_optimizer(self, state: TrainState) -> None:
        names, read = self._open("optimizer.safetensors")
        parameters = dict(state.model.named_parameters())
        for name in names:
            if (parameter := name.rpartition("/")[0]) not in parameters:
                raise UserError(f"{self.path}: the optimizer's state is of another model, it has {parameter!r}")
        restore_state(state.model, state.optimizer, names, read)

    def _fill(self, model: nn.Module, file: str) -> None:
        names, read = self._open(file)
        tensors = model.state_dict(keep_vars=True)
        for problem, some in (("lacks", tensors.keys() - set(names)), ("has unknown", set(names) - tensors.keys())):
            if some:
                raise UserError(
                    f"{self.path / file} {problem} tensor {min(some)!r}, {len(some)} in all: is it of another model?"
                )
        for name, value in tensors.items():
            if (shape := tuple(read(name).shape)) != tuple(shape_of(value)):
                raise UserError(
                    f"{self.path / file}: {name} has shape {shape}, the model wants {tuple(shape_of(value))}"
                )
        fill(model, read)

    def _open(self, file: str) -> tuple[list[str], Callable[[str], Tensor]]:
        try:
            opened = safe_open(self.path / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {self.path / file}: {error}") from error
        return list(opened.keys()), opened.get_tensor


_sums: dict[tuple[int, ...], str] = {}
"""sha256 of files that this process has read, by device, inode, size and time of the last change."""


def _identity(path: Path, cached: bool = False) -> dict[str, Any]:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if not cached or key not in _sums:
            _sums[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": _sums[key], "bytes": status.st_size}
