"""Writing files so that a reader, a crash or a full disk never meets half of one."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vim_backbone.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, then put it in place in one step.

    Raises UserError where the disk is full or refuses, with any earlier file at `path` untouched.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {explain(error)}") from error


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON, atomically."""
    write_atomically(path, lambda aside: _write_text(aside, json.dumps(data, indent=2) + "\n"))


def write_text(path: Path, text: str) -> None:
    """Write text, atomically."""
    write_atomically(path, lambda aside: _write_text(aside, text))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda aside: save_file(contiguous, aside, metadata={"format": "pt"} | (metadata or {})))


def explain(error: OSError | SafetensorError) -> str:
    """What failed and what to do, in a few words."""
    number = getattr(error, "errno", None)
    if (
        number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        or "os error 28" in str(error)
        or "os error 27" in str(error)
    ):
        return "the disk is full (or a quota or size limit is reached): free space and try again"
    return getattr(error, "strerror", None) or str(error)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
