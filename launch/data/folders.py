"""Folders of pictures: which files are taken, in which order, and what is left out."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from launch.data.data_sets import BUILDERS
from launch.data.pictures import Picture
from launch.data.reading import SUFFIXES, open_file
from vim_backbone.errors import UserError, escaped
from vim_backbone.listing import files_ending, walk


class ImageFiles:
    """Picture files, named by their path below `root`."""

    def __init__(
        self, paths: Iterable[str | Path], root: Path | None = None, left_out: Counter[str] | None = None
    ) -> None:
        """`left_out`: files beside them, by the end of their names."""
        self.paths = [os.fspath(path) for path in paths]  # a third of the room of a Path
        self.root = root and os.path.join(root, "")
        self.left_out = left_out or Counter()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path below the root, or the file's name."""
        path = self.paths[index]
        return escaped(path.removeprefix(self.root) if self.root else os.path.basename(path))

    def open(self, index: int) -> Picture:
        """The file, opened but not decoded."""
        return open_file(self.paths[index])


def files_below(folder: Path, left_out: Counter[str] | None = None) -> list[str]:
    """All picture files below a folder, in sorted order; `left_out` counts the others by the end of their names.

    Raises UserError where there are none.
    """
    paths = picture_paths(folder, left_out)
    if not paths:
        raise UserError(f"no pictures below {folder}: {_what_else(folder)}")
    return paths


def picture_paths(folder: Path, left_out: Counter[str] | None = None) -> list[str]:
    """Picture files below a folder; `left_out` as there. As `files_ending` takes them."""
    return files_ending(folder, SUFFIXES, left_out)


def _what_else(folder: Path) -> str:
    """What to do about a folder without pictures."""
    files = sorted(entry.path for entry in walk(os.fspath(folder)))
    for suffix in BUILDERS:
        if file := next((Path(path) for path in files if path.lower().endswith(suffix)), None):
            return f"it holds data sets, read by data.source '{file.parent}/*{file.suffix}'"
    return f"it has no file ending in {', '.join(sorted(SUFFIXES))}"
