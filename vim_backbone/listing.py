"""The files below a folder: which are taken, in which order, and what is left out."""

import os
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

from vim_backbone.errors import UserError


def files_ending(folder: Path, suffixes: Container[str], left_out: Counter[str] | None = None) -> list[str]:
    """Files below a folder with one of these ends, at any depth and through symbolic links, in sorted order.

    Names that begin with a dot, and __MACOSX, are passed over: what file managers and editors leave behind. Raises
    UserError for a folder below it that cannot be read.

    Args:
        suffixes: ends of names, in lower case.
        left_out: counts the other files by the end of their names.
    """
    paths = []
    for entry in walk(os.fspath(folder)):
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in suffixes and entry.is_file():
            paths.append(entry.path)
        elif left_out is not None:
            left_out[suffix] += 1
    return sorted(paths, key=lambda path: path.replace(os.sep, "\0"))  # folder by folder, as paths compare


def left_behind(name: str) -> bool:
    """Whether file managers and editors leave files or folders of this name beside those that are meant."""
    return name.startswith(".") or name == "__MACOSX"


def walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[os.DirEntry[str]]:
    """All files below a folder: no file costs a system call of its own, and no object but its entry.

    `above` are the real paths of the folders that it lies in.
    """
    place = os.path.realpath(folder)
    if place in above:  # a link to a folder that it lies in
        return
    try:
        with os.scandir(folder) as entries:
            inside = [entry for entry in entries if not left_behind(entry.name)]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    for entry in inside:
        if entry.is_dir():
            yield from walk(entry.path, (*above, place))
        else:
            yield entry
