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

TEXT_LIMIT = 1_000_000
"""Bytes of a file of settings, at most."""


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


def refuse_what_is_no_file(path: Path) -> None:
    """Raise UserError for a folder, a device or a pipe, at which a reader may wait for ever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no plain file'}: give a file")


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a plain file of UTF-8, a byte-order mark left out.

    Raises UserError, which quotes nothing of the file, for what is no such file or has more than `limit` bytes.
    """
    refuse_what_is_no_file(path)
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > limit:
        raise UserError(f"{path} has more than {limit / 1e6:g} MB: is it the right file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 (byte {error.start}): is it the right file?") from error


def read_json(path: Path, limit: int = TEXT_LIMIT) -> Any:
    """The content of a JSON file. Raises UserError, which quotes nothing of the file."""
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"cannot read {path}: no JSON, {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"cannot read {path}: JSON nested too deeply, or a number too long") from error


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
