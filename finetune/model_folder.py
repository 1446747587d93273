"""The folder of a fine-tuned model, `model/` of a run: the weights, and config.json with what is needed to use them."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vim_backbone.errors import UserError
from vim_backbone.files import read_json, refuse_what_is_no_file, write_json, write_tensors

MODEL = "model"
WEIGHTS = "model.safetensors"
DESCRIPTION_LIMIT = 20_000_000
"""Bytes of a config.json with the names of all classes, at most."""


def write_model(run_folder: Path, task: str, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the model of a run of the task of this name."""
    folder = run_folder / MODEL
    folder.mkdir(exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / "config.json", {"task": task} | description)


def read_description(run_folder: Path) -> dict[str, Any]:
    """The task's name as `task`, and what the task wrote. Raises UserError where there is no model."""
    path = run_folder / MODEL / "config.json"
    try:
        description = read_json(path, DESCRIPTION_LIMIT)
    except UserError as error:
        raise UserError(f"{run_folder} holds no fine-tuned model: {error}") from error
    if not isinstance(description, dict) or not isinstance(description.get("task"), str):
        raise UserError(f"{run_folder} holds no fine-tuned model: {path} names no task")
    return description


def read_weights(run_folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of the weights, for messages, and its tensors. Raises UserError for one that is missing or damaged."""
    path = run_folder / MODEL / WEIGHTS
    try:
        refuse_what_is_no_file(path)
        return path, load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
