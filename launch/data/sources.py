"""Where pictures come from: folders, built-in photographs, `datasets`.

A source hands out undecoded bytes, so that a picture that cannot be decoded is one bad picture and not a crash.
"""

import glob
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import datasets
import fsspec
from datasets.distributed import split_dataset_by_node

from launch.data.bad_pictures import Named, escaped
from launch.data.images import BadPictureError
from launch.data.pictures import Picture
from launch.data.reading import SUFFIXES, open_bytes, open_file
from vim_backbone.errors import UserError, first_line

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}
"""End of a file's name -> what `datasets` reads it with."""
FAIR = 8
"""Files of a stream for each reader from which on they are dealt out whole, though some get one more than others."""


class ImageSource(Named, Protocol):
    """Pictures by index, undecoded."""

    def open(self, index: int) -> Picture:
        """Picture `index`, opened but not decoded. Raises OSError or BadPictureError."""
        ...


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


class HubDataset:
    """The image column of a map-style `datasets.Dataset`, undecoded."""

    def __init__(self, data: datasets.Dataset, column: str, prefix: str = "") -> None:
        self.data = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """Row number, after the prefix."""
        return f"{self.prefix}row {index}"

    def open(self, index: int) -> Picture:
        """The row's picture, opened but not decoded."""
        return open_cell(self.data[index][self.column])


def open_source(source: str, *, split: str, column: str | None, streaming: bool) -> "Source":
    """The pictures that `source` names: by index, or as a stream of undecoded cells when streaming.

    Args:
        source: "photos" for the built-in photographs, a folder, file(s) of BUILDERS (globs allowed), or "hf:NAME" for
            anything that `datasets.load_dataset` takes, the only one that may use the network.
        split: split of a data set.
        column: image column; the first one of type Image when None.

    Raises:
        UserError: nothing there, no pictures, or a data set without the split or column.
    """
    if source == "photos":
        return ImageFiles(photograph_paths())
    path = Path(source).expanduser()
    if source.startswith("hf:"):
        return _dataset(source[3:], None, split, column, streaming)
    if path.is_dir():
        left_out: Counter[str] = Counter()
        return ImageFiles(files_below(path, left_out), path, left_out)
    if path.suffix.lower() in BUILDERS:
        return _dataset(BUILDERS[path.suffix.lower()], _matches(path), split, column, streaming)
    what = "is no folder and no data set" if path.exists() else "does not exist"
    raise UserError(f"data.source {source} {what}: give a folder, {', '.join(BUILDERS)} files, 'photos', or 'hf:NAME'")


def _matches(pattern: Path) -> list[str]:
    """The file of that very name, else those that the pattern matches, which may lie in a folder with brackets."""
    if pattern.exists():
        return [str(pattern)]
    files = sorted(glob.glob(str(pattern))) or sorted(glob.glob(f"{glob.escape(str(pattern.parent))}/{pattern.name}"))
    if not files:
        raise UserError(f"no file matches data.source {pattern}")
    return files


def files_below(folder: Path, left_out: Counter[str] | None = None) -> list[str]:
    """All picture files below a folder, in sorted order; `left_out` counts the others by the end of their names.

    Raises UserError where there are none.
    """
    paths = picture_paths(folder, left_out)
    if not paths:
        raise UserError(f"no pictures below {folder}: {_what_else(folder)}")
    return paths


def picture_paths(folder: Path, left_out: Counter[str] | None = None) -> list[str]:
    """Picture files below a folder, at any depth and through symbolic links, in sorted order; `left_out` as there.

    Names that begin with a dot, and __MACOSX, are passed over: what file managers and editors leave behind. Raises
    UserError for a folder below it that cannot be read.
    """
    paths = []
    for entry in _walk(os.fspath(folder), ()):
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in SUFFIXES and entry.is_file():
            paths.append(entry.path)
        elif left_out is not None:
            left_out[suffix] += 1
    return sorted(paths, key=lambda path: path.replace(os.sep, "\0"))  # folder by folder, as paths compare


def what_was_left_out(source: "Source") -> list[str]:
    """A line on the files of a folder that are no pictures by the end of their names; none where there are none."""
    left_out = source.left_out if isinstance(source, ImageFiles) else Counter[str]()
    if not left_out:
        return []
    kinds = ", ".join(f"{count} {escaped(suffix) or 'without one'}" for suffix, count in left_out.most_common(5))
    return [f"{left_out.total()} files are left out for their ending: {kinds}"]


def left_behind(name: str) -> bool:
    """Whether file managers and editors leave files or folders of this name beside those that are meant."""
    return name.startswith(".") or name == "__MACOSX"


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[os.DirEntry[str]]:
    """All files below a folder: no file costs a system call of its own, and no object but its entry."""
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
            yield from _walk(entry.path, (*above, place))
        else:
            yield entry


def _what_else(folder: Path) -> str:
    """What to do about a folder without pictures."""
    files = sorted(entry.path for entry in _walk(os.fspath(folder), ()))
    for suffix in BUILDERS:
        if file := next((Path(path) for path in files if path.lower().endswith(suffix)), None):
            return f"it holds data sets, read by data.source '{file.parent}/*{file.suffix}'"
    return f"it has no file ending in {', '.join(sorted(SUFFIXES))}"


def load_split(name: str, split: str, files: list[str] | None = None, streaming: bool = False) -> Any:
    """One split of what `datasets.load_dataset` loads. Raises UserError for what cannot be loaded."""
    saved = Path(name).expanduser()
    try:
        if any((saved / file).is_file() for file in ("state.json", "dataset_dict.json")):  # of Dataset.save_to_disk
            data = datasets.load_from_disk(str(saved))
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
            return data.to_iterable_dataset() if streaming else data
        patterns = [glob.escape(file) for file in files] if files else None  # `datasets` takes names for patterns
        return datasets.load_dataset(name, data_files=patterns, split=split, streaming=streaming)
    except Exception as error:  # `datasets` raises a dozen unrelated classes for what users get wrong
        what = f"{files[0]}{' and others' * (len(files) > 1)}" if files else name
        raise UserError(f"datasets cannot load {what} (split {split!r}): {first_line(error)}") from error


def split_names(name: str) -> list[str]:
    """Splits of what `datasets.load_dataset` or `load_from_disk` loads; none where it does not say."""
    try:
        saved = Path(name).expanduser() / "dataset_dict.json"
        return json.loads(saved.read_text())["splits"] if saved.is_file() else datasets.get_dataset_split_names(name)
    except Exception:  # local folders and old scripts do not say
        return []


def _dataset(name: str, files: list[str] | None, split: str, column: str | None, streaming: bool) -> "Source":
    data = load_split(name, split, files, streaming)
    where, features = files[0] if files else name, data.features or {}
    column = column or next((key for key, feature in features.items() if isinstance(feature, datasets.Image)), None)
    if column is None or (features and not _holds_pictures(features.get(column))):
        got = "has no image column" if column is None else f"has no pictures in column {column}"
        raise UserError(f"{where} {got}: set data.column, one of {sorted(features)}")
    if isinstance(data, datasets.IterableDataset):
        return StreamCells(data, column)
    if not len(data):
        raise UserError(f"{where} has no rows in its split {split!r}: set data.split, or data.source")
    return HubDataset(data, column)


def _holds_pictures(feature: Any) -> bool:
    """Whether a column can be one of pictures: of type Image, of bytes or paths, or of both."""
    if isinstance(feature, dict):
        return set(feature) <= {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in (
        "binary",
        "large_binary",
        "string",
        "large_string",
    )


class StreamCells:
    """A streamed data set as an endless sequence of (name, undecoded cell), shuffled anew each epoch."""

    def __init__(self, data: datasets.IterableDataset, column: str) -> None:
        self.data = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column

    def first(self, count: int) -> list[Any]:
        """The first cells, unshuffled."""
        return [row[self.column] for row in self.data.take(count)]

    def cells(self, seed: int, reader: int, readers: int) -> Iterator[tuple[str, Any]]:
        """Cells of one of the processes that read the stream, whatever the number of its files.

        Readers share no row of an epoch, unless there are fewer rows than readers. Where files are few and cannot be
        dealt out evenly, several readers read the same ones, and each takes its share of the rows. Raises UserError
        for a stream without rows.
        """
        files = self.data.num_shards
        parts = readers if files >= FAIR * readers else math.gcd(files, readers)
        data = self.data.shard(parts, reader % parts, contiguous=False).shuffle(seed=seed, buffer_size=1000)
        if parts < readers:
            data = split_dataset_by_node(data, reader // parts, readers // parts)
        epoch, rows = 0, 0
        while rows or epoch < 2:
            data.set_epoch(epoch)
            # `iter`, because iteration itself would deal the files out once more, to the processes of a loader
            for row, batch in enumerate(data.iter(batch_size=1)):
                yield f"epoch {epoch} row {row}", batch[self.column][0]
                rows += 1
            if not rows:  # fewer rows than readers
                data = self.data.shuffle(seed=seed, buffer_size=1000)
            epoch += 1
        raise UserError("the stream has no rows: set data.split, or data.source")


def open_cell(cell: Any) -> Picture:
    """An undecoded cell of an image column ({"bytes", "path"}) as a picture, opened but not decoded.

    A path may be one of fsspec's, as zip://0.jpg::pictures.zip or hf://.
    """
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        raise BadPictureError("the cell is empty")
    if cell.get("bytes"):
        return open_bytes(cell["bytes"])
    if "://" not in cell["path"]:
        return open_file(cell["path"])
    with fsspec.open(cell["path"], "rb") as file:
        return open_bytes(file.read())  # pyright: ignore[reportAttributeAccessIssue]


Source = ImageSource | StreamCells
"""Pictures by index, or a stream of them."""


def some_pictures(
    source: Source, indices_of: Callable[[int], Iterable[int]], rows: int
) -> Iterator[tuple[str, Callable[[], Picture]]]:
    """Names of pictures, and what opens each: of indices chosen by how many there are, of a stream its first rows."""
    if isinstance(source, StreamCells):
        for row, cell in enumerate(source.first(rows)):
            yield f"row {row}", partial(open_cell, cell)
    else:
        for index in indices_of(len(source)):
            yield source.name(index), partial(source.open, index)


def photograph_paths() -> list[Path]:
    """Files of the built-in photographs. Raises UserError where the packages that carry them are missing."""
    paths: list[Path] = []
    names = {
        "skimage/data": "astronaut.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png retina.jpg rocket.jpg "
        "motorcycle_left.png motorcycle_right.png",
        "sklearn/datasets/images": "china.jpg flower.jpg",
        "matplotlib/mpl-data/sample_data": "grace_hopper.jpg",
    }
    for package, files in names.items():
        spec = find_spec(package.split("/")[0])  # looks the package up without importing it
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parents[1] / package
            paths += [folder / file for file in files.split() if (folder / file).exists()]
    if not paths:
        raise UserError("no built-in photographs: pip install scikit-image scikit-learn matplotlib, or set data.source")
    return paths
