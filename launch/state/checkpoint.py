"""Checkpoints: the same files whatever the strategy and the number of processes, whole or absent, checked by sha256.

A folder `step-00001000/` has model.safetensors, optimizer.safetensors (tensor `PARAMETER/KEY`), ema.safetensors where
averaging is on, state.json, and manifest.json with the sha256 and size of each. Nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from launch.state.optim_state import restore_state, whole_state
from launch.state.sharding import WeightAverage, fill, shape_of, whole_tensors
from vim_backbone.errors import UserError
from vim_backbone.files import explain, write_json, write_tensors

NAME = re.compile(r"step-(\d{8})")
FORMAT = 1
MANIFEST = "manifest.json"


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
    # through JSON, so that nothing in it goes on changing while another thread writes
    extra = json.loads(json.dumps(state.extra))
    return Snapshot(state.step, files, {"format": FORMAT, "step": state.step, "torch": torch.__version__} | extra)


def write_snapshot(snapshot: Snapshot, folder: Path, keep: int, keep_every: int = 0) -> Path:
    """Write a checkpoint aside, flush it to disk, rename it into place, then delete what need not be kept.

    Args:
        keep: newest checkpoints that stay.
        keep_every: checkpoints of steps that this divides stay too; 0 for none.

    Raises:
        UserError: the disk is full, or refuses; the earlier checkpoints are left as they are.
    """
    final = folder / f"step-{snapshot.step:08d}"
    aside = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, tensors in snapshot.files.items():
            write_tensors(aside / name, tensors)
        write_json(aside / "state.json", snapshot.state)
        write_json(aside / MANIFEST, {path.name: _identity(path) for path in sorted(aside.iterdir())})
        _flush(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _flush(folder)
    except (OSError, UserError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        cause = explain(error) if isinstance(error, OSError) else str(error)
        whole = checkpoints(folder)
        remaining = f"{whole[-1]} is intact, go on from it with --resume" if whole else "no earlier checkpoint exists"
        raise UserError(f"checkpoint at step {snapshot.step} not saved: {cause}; {remaining}") from error
    for old in checkpoints(folder)[:-keep]:
        if not (keep_every and int(old.name[5:]) % keep_every == 0):
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were put in place, oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name)) if folder.is_dir() else []


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and a line for each newer one that is damaged."""
    damaged = []
    for path in reversed(checkpoints(folder)):
        wrong = damage(path)
        if wrong is None:
            return path, damaged
        damaged.append(f"{path} is damaged ({wrong})")
    return None, damaged


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None where every file has the size and sha256 that were written down."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, written in manifest.items():
            if not (path / name).exists():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != written["bytes"]:
                return f"{name} has {size} bytes, {written['bytes']} were written"
            if _identity(path / name) != written:
                return f"{name} has another sha256 than was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


class Checkpoint:
    """One checkpoint, read tensor by tensor. Raises UserError naming the file that is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path / 'state.json'}: {error}") from error
        if self.state.get("format") != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {self.state.get('format')}, this code reads {FORMAT}: "
                "resume it with the version of the code that wrote it"
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
        state.step = int(self.state["step"])
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


def _identity(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
