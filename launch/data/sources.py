"""Where pictures come from: folders, built-in photographs, `datasets`.

A source hands out undecoded bytes, so that a picture that cannot be decoded is one bad picture and not a crash.
"""

import glob
import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import datasets
from datasets.distributed import split_dataset_by_node
from PIL import Image

from launch.data.bad_pictures import Named
from launch.data.images import BadPictureError
from vim_backbone.errors import UserError, first_line

SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"])


class ImageSource(Named, Protocol):
    """Pictures by index, undecoded."""

    def open(self, index: int) -> Image.Image:
        """Picture `index`, opened but not decoded. Raises OSError or BadPictureError."""
        ...


class ImageFiles:
    """Picture files, named by their path below `root`."""

    def __init__(self, paths: list[Path], root: Path | None = None) -> None:
        self.paths = paths
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path below the root, or the file's name."""
        path = self.paths[index]
        return str(path.relative_to(self.root)) if self.root else path.name

    def open(self, index: int) -> Image.Image:
        """The file, opened but not decoded."""
        return Image.open(self.paths[index])


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

    def open(self, index: int) -> Image.Image:
        """The row's picture, opened but not decoded."""
        return open_cell(self.data[index][self.column])


def open_source(source: str, *, split: str, column: str | None, streaming: bool) -> "Source":
    """The pictures that `source` names: by index, or as a stream of undecoded cells when streaming.

    Args:
        source: "photos" for the built-in photographs, a folder, parquet file(s) (globs allowed), or "hf:NAME" for
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
    if path.suffix == ".parquet":
        files = sorted(glob.glob(str(path)))
        if not files:
            raise UserError(f"no file matches data.source {source}")
        return _dataset("parquet", files, split, column, streaming)
    if not path.is_dir():
        raise UserError(f"data.source {source} does not exist: give a folder, parquet files, 'photos', or 'hf:NAME'")
    return ImageFiles(files_below(path), path)


def files_below(folder: Path) -> list[Path]:
    """All picture files below a folder, at any depth, in sorted order. Raises UserError where there are none."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"no pictures below {folder}: it has no file ending in {', '.join(sorted(SUFFIXES))}")
    return paths


def load_split(name: str, split: str, files: list[str] | None = None, streaming: bool = False) -> Any:
    """One split of what `datasets.load_dataset` loads. Raises UserError for what cannot be loaded."""
    try:
        return datasets.load_dataset(name, data_files=files, split=split, streaming=streaming)
    except Exception as error:  # `datasets` raises a dozen unrelated classes for what users get wrong
        raise UserError(f"datasets cannot load {files or name} (split {split!r}): {first_line(error)}") from error


def _dataset(name: str, files: list[str] | None, split: str, column: str | None, streaming: bool) -> "Source":
    data = load_split(name, split, files, streaming)
    features = data.features or {}
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    column = column or (images[0] if images else None)
    if column is None or (features and column not in features):
        raise UserError(
            f"{files or name} has no image column {column or ''}: set data.column, one of {sorted(features)}"
        )
    return StreamCells(data, column) if isinstance(data, datasets.IterableDataset) else HubDataset(data, column)


class StreamCells:
    """A streamed data set as an endless sequence of (name, undecoded cell), shuffled anew each epoch."""

    def __init__(self, data: datasets.IterableDataset, column: str) -> None:
        self.data = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column

    def cells(self, seed: int, rank: int, world: int) -> Iterator[tuple[str, Any]]:
        """Cells of this rank (and of this data-loading worker, which `datasets` sees to by itself)."""
        data = self.data.shuffle(seed=seed, buffer_size=1000)
        if world > 1:
            data = split_dataset_by_node(data, rank, world)
        epoch = 0
        while True:
            data.set_epoch(epoch)
            for row, example in enumerate(data):
                yield f"epoch {epoch} row {row}", example[self.column]
            epoch += 1


def open_cell(cell: Any) -> Image.Image:
    """An undecoded cell of an image column ({"bytes", "path"}) as a picture, opened but not decoded."""
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        raise BadPictureError("the cell is empty")
    return Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"])


Source = ImageSource | StreamCells
"""Pictures by index, or a stream of them."""


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
