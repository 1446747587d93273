"""Data sets that `datasets` reads: where they are, their splits and columns, and their cells as pictures."""

import glob
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import datasets
import fsspec
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.parquet.parquet import Parquet

from launch.data.images import BadPictureError
from launch.data.pictures import Picture
from launch.data.reading import open_file
from launch.data.row_files import ArrowRows, ParquetRows, RowFile, SavedRows
from vim_backbone.errors import UserError, first_line, nearest

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}
"""End of a file's name -> what `datasets` reads it with."""


@dataclass(frozen=True)
class DataSet:
    """A data set of pictures, in files or on the Hub."""

    name: str
    """What `datasets.load_dataset` takes, or the folder that `save_to_disk` wrote."""
    files: list[str] | None
    """Paths or URLs, where it is not known by its name."""
    split: str
    """The split that is read."""
    apart: bool = False
    """Whether the files are of this split alone; `datasets` then calls it train."""

    @property
    def title(self) -> str:
        """What to call it in messages."""
        return self.files[0] if self.files else self.name

    @property
    def archive(self) -> bool:
        """Whether it is an archive of pictures in folders."""
        return self.files is not None and self.name == "imagefolder"

    def rows(self, column: str) -> Sequence[RowFile] | None:
        """The files of a stream whose rows are known without reading them, in its order; None for other kinds."""
        if saved_by_datasets(Path(self.name)):
            saved = datasets.load_from_disk(self.name)
            return [SavedRows(saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved, column)]
        try:
            builder = datasets.load_dataset_builder(**self._arguments)
            files = list((builder.config.data_files or {}).get(self._split, []))
        except Exception:  # as in `load`; what cannot be counted is read
            return None
        if isinstance(builder, Parquet):
            return [ParquetRows(file, column) for file in files]
        if isinstance(builder, Arrow) and not any(map(is_url, files)):
            return [ArrowRows(file, column) for file in files]
        return None

    @property
    def _split(self) -> str:
        """What `datasets` calls the split."""
        return "train" if self.apart else self.split

    @property
    def _arguments(self) -> dict[str, Any]:
        # `datasets` takes names for patterns
        patterns = [file if is_url(file) else glob.escape(file) for file in self.files or []] or None
        # of an archive with a folder for each class `datasets` 5.2 takes the name of its own folder for the class
        more = {"drop_labels": True} if self.archive else {}
        return {"path": self.name, "data_files": patterns} | more

    def load(self, streaming: bool = False) -> Any:
        """The split. Raises UserError for what cannot be loaded."""
        try:
            if saved_by_datasets(Path(self.name)):
                data = datasets.load_from_disk(self.name)
                data = data[self.split] if isinstance(data, datasets.DatasetDict) else data
                return data.to_iterable_dataset() if streaming else data
            return datasets.load_dataset(**self._arguments, split=self._split, streaming=streaming)
        except Exception as error:  # `datasets` raises a dozen unrelated classes for what users get wrong
            what = f"{self.title}{' and others' * (len(self.files or []) > 1)}"
            cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
            why = first_line(cause or error)
            raise UserError(f"datasets cannot load {what} (split {self.split!r}): {why}") from error


def data_set_of(source: str, split: str) -> DataSet | None:
    """The data set that `source` names, None where it is none.

    Args:
        source: hf:NAME, a folder of `save_to_disk`, files of BUILDERS, by path, glob or URL. In these, {split} is the
            name of the split, which then has files of its own.
        split: the split to read.

    Raises:
        UserError: no file matches.
    """
    if source.startswith("hf:") and not is_url(source):
        name = source[3:]
        return DataSet(str(Path(name).expanduser()) if saved_by_datasets(Path(name)) else name, None, split)
    path = Path(source).expanduser()
    if saved_by_datasets(path):
        return DataSet(str(path), None, split)
    builder = BUILDERS.get(suffix_of(source))
    if builder is None or path.is_dir():
        return None
    place = source.replace("{split}", split)
    files = [place] if is_url(place) else _matches(Path(place).expanduser())
    return DataSet(builder, files, split, "{split}" in source)


def first_split(source: str, names: list[str]) -> str | None:
    """The first of these splits that a data set has; None where it has none of them."""
    if "{split}" in source:
        places = {name: source.replace("{split}", name) for name in names}
        return next((name for name, place in places.items() if is_url(place) or _glob(Path(place).expanduser())), None)
    data = data_set_of(source, names[0])
    available = [] if data is None else split_names(data)
    return next((name for name in names if name in (available or names[:1])), None)


def split_names(data: DataSet) -> list[str]:
    """All splits of a data set; none where it does not say."""
    saved = Path(data.name) / "dataset_dict.json"
    try:
        if saved.is_file():
            return json.loads(saved.read_text())["splits"]
        return ["train"] if data.files else datasets.get_dataset_split_names(data.name)
    except Exception:  # local folders and old scripts do not say
        return []


def saved_by_datasets(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return any((folder.expanduser() / file).is_file() for file in ("state.json", "dataset_dict.json"))


def is_url(place: str) -> bool:
    """Whether it is one of fsspec's URLs, as https://HOST/FILE or zip://FILE::ARCHIVE."""
    return "://" in place


def suffix_of(place: str) -> str:
    """The end of the name of a file or URL, in small letters."""
    return PurePosixPath(place.split("::")[0].split("?")[0] if is_url(place) else place).suffix.lower()


def image_column(data: Any, title: str, column: str | None) -> str:
    """Pretraining's column of pictures: the one that is named, else the first of type Image. Raises UserError."""
    features = data.features or {}
    column = column or next((key for key, feature in features.items() if is_image(feature)), None)
    if column is None or (features and not holds_pictures(features.get(column))):
        problem = "has no image column" if column is None else f"has no pictures in column {column}"
        raise UserError(f"{title} {problem}: set data.column, one of {sorted(features)}")
    return column


def column_of(
    features: Mapping[str, Any],
    title: str,
    field: str,
    column: str | None,
    kind: str,
    fits: Callable[[Any], bool],
    more: str = "",
) -> str:
    """A column of labelled data: the one that is named, else the first that fits.

    Args:
        field: of the config, after `data.`.
        kind: of columns that fit, in words.
        more: ends the line of the error.

    Raises:
        UserError: there is none, or the one that is named does not fit.
    """
    chosen = column or next((key for key, feature in features.items() if fits(feature)), None)
    if chosen is not None and fits(features.get(chosen)):
        return chosen
    if column is not None and column not in features:
        hint = nearest(column, features)
        raise UserError(f"{title} has no column {column!r} of type {kind}: set data.{field}; {hint}")
    problem = f"{column!r} is none" if column else f"none of {sorted(features)} is one"
    raise UserError(f"{title} needs a column of type {kind}, {problem}: set data.{field}{more}")


def is_image(feature: Any) -> bool:
    """Whether a column is of type Image."""
    return isinstance(feature, datasets.Image)


def holds_classes(feature: Any) -> bool:
    """Whether a column is one of classes, with their names."""
    return isinstance(feature, datasets.ClassLabel)


def holds_text(feature: Any) -> bool:
    """Whether a column is one of text."""
    return getattr(feature, "dtype", "") in ("string", "large_string")


class HubDataset:
    """The image column of a map-style `datasets.Dataset`, undecoded."""

    def __init__(self, data: datasets.Dataset, column: str, prefix: str = "") -> None:
        self.data = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.rows = self.data.with_format("arrow")  # as Python's objects a row takes four times as long
        self.column = column
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """Row number, after the prefix."""
        return f"{self.prefix}row {index}"

    def cell(self, index: int) -> Any:
        """The row's picture as it is stored, {"bytes", "path"}."""
        return self.rows[index][self.column][0].as_py()

    def open(self, index: int) -> Picture:
        """The row's picture, opened but not decoded."""
        return open_cell(self.cell(index))


@dataclass(frozen=True)
class Cell:
    """The picture in one row, where a file could be."""

    source: HubDataset
    index: int
    parent: str
    """The data set."""

    @property
    def name(self) -> str:
        """Split and row number."""
        return self.source.name(self.index)

    def __str__(self) -> str:
        return f"{self.parent} {self.name} (column {self.source.column})"

    @property
    def file(self) -> IO[bytes]:
        """The file in it. Raises OSError or BadPictureError."""
        return file_of(self.source.cell(self.index))


class Cells(Sequence[Cell]):
    """The pictures in the rows of a data set, as a list of files would be."""

    def __init__(self, source: HubDataset, title: str) -> None:
        self.source = source
        self.title = title

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        """A row."""
        return Cell(self.source, range(len(self))[index], self.title)


def holds_pictures(feature: Any) -> bool:
    """Whether a column can be one of pictures: of type Image, of bytes or paths, or of both."""
    if isinstance(feature, dict):
        return set(feature) <= {"bytes", "path"}
    return is_image(feature) or holds_text(feature) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def open_cell(cell: Any) -> Picture:
    """An undecoded cell of an image column ({"bytes", "path"}) as a picture, opened but not decoded.

    A path may be one of fsspec's, as zip://0.jpg::pictures.zip or hf://.
    """
    path = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else None
    return open_file(path if path and not is_url(path) else file_of(cell))  # some formats are known by their path alone


def file_of(cell: Any) -> IO[bytes]:
    """The file that an undecoded cell holds or names, in memory. Raises OSError or BadPictureError."""
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        raise BadPictureError("the cell is empty")
    if cell.get("bytes"):
        return io.BytesIO(cell["bytes"])
    with fsspec.open(cell["path"], "rb") as file:
        return io.BytesIO(file.read())  # pyright: ignore[reportAttributeAccessIssue]


def _matches(pattern: Path) -> list[str]:
    """The file of that very name, else those that the pattern matches, which may lie in a folder with brackets."""
    if pattern.exists():
        return [str(pattern)]
    files = _glob(pattern)
    if not files:
        raise UserError(f"no file matches data.source {pattern}")
    return files


def _glob(pattern: Path) -> list[str]:
    return sorted(glob.glob(str(pattern))) or sorted(glob.glob(f"{glob.escape(str(pattern.parent))}/{pattern.name}"))
