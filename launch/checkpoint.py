"""Checkpoints: tensors as safetensors, the position as JSON, each folder put in place in one step.

A checkpoint folder `step-00001000/` has model.safetensors, optimizer.safetensors (tensor `PARAMETER/KEY`),
ema.safetensors where averaging is on, and state.json. Nothing is pickled.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import ModelEmaV3  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from vim_backbone.errors import UserError
from vim_backbone.files import explain, write_json, write_tensors
from vim_backbone.pretrained import check_names

NAME = re.compile(r"step-(\d{8})")


@dataclass
class TrainState:
    """Everything that a run is: what must be written to go on as if never stopped."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None = None
    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in the folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name)) if folder.is_dir() else []


def save_checkpoint(state: TrainState, folder: Path, keep: int) -> Path:
    """Write a checkpoint aside, flush it to disk, rename it into place, then delete all but the newest `keep`.

    Raises UserError where the disk is full; the earlier checkpoints are left as they are.
    """
    final = folder / f"step-{state.step:08d}"
    aside = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_tensors(aside / "model.safetensors", state.model.state_dict())
        write_tensors(aside / "optimizer.safetensors", optimizer_tensors(state.model, state.optimizer))
        if state.ema is not None:
            write_tensors(aside / "ema.safetensors", state.ema.module.state_dict())
        write_json(aside / "state.json", {"step": state.step, "torch": torch.__version__} | state.extra)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _flush(folder)
    except (OSError, UserError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        cause = explain(error) if isinstance(error, OSError) else str(error)
        newest = checkpoints(folder)
        kept = f"{newest[-1]} is intact, go on from it with --resume" if newest else "no earlier checkpoint exists"
        raise UserError(f"checkpoint at step {state.step} not saved: {cause}; {kept}") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(state: TrainState, path: Path) -> None:
    """Fill model, optimizer, EMA, step and extra from a checkpoint folder.

    Raises UserError naming the file that is missing or damaged, or the tensor that does not fit the model.
    """
    saved = _read_json(path / "state.json")
    _load_module(state.model, path / "model.safetensors")
    if state.ema is not None:
        _load_module(state.ema.module, path / "ema.safetensors")
    load_optimizer(state.model, state.optimizer, _read(path / "optimizer.safetensors"), path)
    state.step = int(saved["step"])
    state.extra = {key: value for key, value in saved.items() if key not in ("step", "torch")}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named PARAMETER/KEY."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for p, entry in optimizer.state.items()
        for key, value in entry.items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor], path: Path) -> None:
    """Put tensors of `optimizer_tensors` back. Raises UserError naming a parameter that the model lacks."""
    parameters = dict(model.named_parameters())
    for name, value in saved.items():
        parameter, _, key = name.rpartition("/")
        if parameter not in parameters:
            raise UserError(f"{path}: the optimizer's state is of another model, it has {parameter!r}")
        p = parameters[parameter]
        on_device = value.to(p.device) if value.shape == p.shape else value
        optimizer.state[p][key] = on_device


def _load_module(module: nn.Module, path: Path) -> None:
    tensors = _read(path)
    check_names(module.state_dict(), tensors, path)
    module.load_state_dict(tensors)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; delete that checkpoint to go on from the one before") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; delete that checkpoint to go on from the one before") from error


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
