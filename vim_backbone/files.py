"""Writing files so that a reader, a crash or a full disk never meets half of one."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
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

    The file has the rights that the umask and the folder give. What a killed process left beside is cleared first.
    Raises UserError where the disk is full or refuses, with any earlier file at `path` untouched.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        remove(aside)
        aside.mkdir()  # a folder, because safetensors in its turn writes beside the file that it is given
        file = aside / path.name
        file.touch()
        rights = file.stat().st_mode
        write(file)
        if file.stat().st_mode != rights:  # safetensors puts a file there that its owner alone can read
            file.chmod(rights & 0o777)
        flush(file)
        os.replace(file, path)
        aside.rmdir()
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            remove(aside)
        raise UserError(f"cannot write {path}: {explain(error)}") from error


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON, atomically; nan and inf, which JSON lacks, become null."""
    text = json.dumps(_without_nan(data), indent=2, allow_nan=False)
    write_atomically(path, lambda aside: _write_text(aside, text + "\n"))


def json_line(data: Any) -> str:
    """Plain data as one line of JSON; nan and inf, which JSON lacks, become null."""
    return json.dumps(_without_nan(data), allow_nan=False) + "\n"


def _without_nan(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_text(path: Path, text: str) -> None:
    """Write text, atomically."""
    write_atomically(path, lambda aside: _write_text(aside, text))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda aside: save_file(contiguous, aside, metadata={"format": "pt"} | (metadata or {})))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """As `remove`, but out of place in one step, so that a kill leaves no half of it there."""
    aside = path.with_name(f".{path.name}.deleted")
    remove(aside)
    with suppress(FileNotFoundError):
        os.replace(path, aside)
        remove(aside)


def flush(path: Path) -> None:
    """Have a file, or names in a folder, written to disk; Windows opens no folder, and flushes what may be written."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_lines(path: Path, text: str) -> None:
    """Add lines to a file, on lines of their own where a killed process left half of one."""
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
            text = "\n" + text
        file.write(text.encode("utf-8", "backslashreplace"))


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
