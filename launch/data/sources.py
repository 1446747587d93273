"""Where pictures come from: folders, lists, built-in photographs, data sets, and several of these with weights.

A source hands out undecoded bytes, so that a picture that cannot be decoded is one bad picture and not a crash.
"""

import bisect
import itertools
import math
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import datasets
import fsspec
import numpy as np

from launch.data.bad_pictures import Named
from launch.data.data_sets import BUILDERS, HubDataset, data_set_of, image_column, is_url, open_cell, suffix_of
from launch.data.folders import ImageFiles, files_below
from launch.data.order import Passes, Turns
from launch.data.pictures import Picture
from launch.data.streams import MixedStreams, Stream, StreamCells
from vim_backbone.errors import UserError, escaped, first_line, require

LIST = ".txt"
"""End of the name of a list of pictures."""


class ImageSource(Named, Protocol):
    """Pictures by index, undecoded."""

    def open(self, index: int) -> Picture:
        """Picture `index`, opened but not decoded. Raises OSError or BadPictureError."""
        ...


class ListedPictures:
    """Pictures that a list names, by path or by URL."""

    def __init__(self, places: list[str]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """Path or URL."""
        return escaped(self.places[index])

    def open(self, index: int) -> Picture:
        """The picture, opened but not decoded."""
        return open_cell({"path": self.places[index]})


class TitledPictures:
    """Pictures whose names begin with the title of their source."""

    def __init__(self, source: ImageSource, title: str) -> None:
        self.source = source
        self.title = title

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Title and name in the source."""
        return f"{self.title}: {self.source.name(index)}"

    def open(self, index: int) -> Picture:
        """The picture, opened but not decoded."""
        return self.source.open(index)


class Picked:
    """Some pictures of a source."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Name in the source."""
        return self.source.name(int(self.indices[index]))

    def open(self, index: int) -> Picture:
        """The picture, opened but not decoded."""
        return self.source.open(int(self.indices[index]))


class MixedPictures:
    """Several sources, each with its share of the pictures; their indices follow one another."""

    def __init__(self, parts: list[TitledPictures], weights: list[float]) -> None:
        self.parts = parts
        self.weights = weights
        self.ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def indices(self, index: int) -> tuple[int, range]:
        """Number of the source of picture `index`, and the indices of all its pictures."""
        number = bisect.bisect_right(self.ends, index)
        return number, range(self.ends[number] - len(self.parts[number]), self.ends[number])

    def name(self, index: int) -> str:
        """Title of the source, and name in it."""
        number, among = self.indices(index)
        return self.parts[number].name(index - among.start)

    def open(self, index: int) -> Picture:
        """The picture, opened but not decoded."""
        number, among = self.indices(index)
        return self.parts[number].open(index - among.start)


Source = ImageSource | Stream
"""Pictures by index, or a stream of them."""


def length_of(source: Source) -> int | None:
    """Number of pictures; None for a stream."""
    return None if isinstance(source, Stream) else len(source)


def parts_of(source: Source) -> tuple[list[ImageSource | StreamCells], list[float]]:
    """The sources that one is mixed of, or itself, and their weights."""
    if isinstance(source, (MixedPictures, MixedStreams)):
        return list(source.parts), source.weights
    return [source], [1.0]


def shares_of(source: ImageSource) -> tuple[list[int], list[float]]:
    """Number of pictures, and weight, of each source that one is mixed of, or of itself."""
    if isinstance(source, MixedPictures):
        return [len(part) for part in source.parts], source.weights
    return [len(source)], [1.0]


def passes_over(source: ImageSource, seed: int) -> Passes:
    """The order in which a run of this seed takes the pictures."""
    return Passes(*shares_of(source), seed)


def stand_ins(source: ImageSource, index: int) -> range:
    """Indices of the pictures that can stand in for a bad one: those of the same source."""
    return source.indices(index)[1] if isinstance(source, MixedPictures) else range(len(source))


@dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """One of several sources of pictures."""

    source: str
    """As data.source."""
    weight: float = 1.0
    """Its share of the pictures that are drawn is this, divided by the sum of all weights."""
    split: str | None = None
    """Split of a data set; data.split when not given."""
    column: str | None = None
    """Image column of a data set; data.column when not given."""

    @property
    def title(self) -> str:
        """What its pictures' names begin with."""
        return escaped(" ".join([self.source, *filter(None, (self.split, self.column))]))


def open_sources(sources: Sequence[WeightedSource], *, split: str, column: str | None, streaming: bool) -> Source:
    """Several sources in one, each with its share; split and column of those that have none of their own.

    Raises UserError as `open_source`, for a weight that is not positive, a source that is listed twice, and for streams
    among others.
    """
    for entry in sources:
        good = 0 < entry.weight < math.inf
        require(good, f"weight of {entry.title} in data.sources", entry.weight, "it must be positive")
    titles = [entry.title for entry in sources]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise UserError(f"data.sources has {twice[0]} twice: list it once, with the sum of the weights")
    opened = [
        open_source(entry.source, split=entry.split or split, column=entry.column or column, streaming=streaming)
        for entry in sources
    ]
    if len(opened) == 1:
        return opened[0]
    streams = [title for title, part in zip(titles, opened, strict=True) if isinstance(part, Stream)]
    if streams and len(streams) < len(opened):
        other = next(title for title in titles if title not in streams)
        raise UserError(
            f"data.sources mixes the stream {streams[0]} with {other}, which cannot be streamed: set data.streaming "
            "false, or leave one kind out"
        )
    weights = [entry.weight for entry in sources]
    if streams:
        parts = [part for part in opened if isinstance(part, StreamCells)]
        return MixedStreams([part.named(f"{title}: ") for title, part in zip(titles, parts, strict=True)], weights)
    pictures = [part for part in opened if not isinstance(part, Stream)]
    return MixedPictures([TitledPictures(part, title) for title, part in zip(titles, pictures, strict=True)], weights)


def open_source(source: str, *, split: str, column: str | None, streaming: bool) -> Source:
    """The pictures that `source` names: by index, or as a stream of undecoded cells when streaming.

    Args:
        source: "photos" for the built-in photographs, a folder, a list (LIST) of paths and URLs, or a data set as
            `data_set_of` has it. hf:NAME and URLs may use the network.
        split: split of a data set.
        column: image column; the first one of type Image when None.

    Raises:
        UserError: nothing there, no pictures, or a data set without the split or column.
    """
    if source == "photos":
        return ImageFiles(photograph_paths())
    place = data_set_of(source, split)
    path = Path(source).expanduser()
    if place is not None:
        data = place.load(streaming)
        column = image_column(data, place.title, column)
        if isinstance(data, datasets.IterableDataset):
            return StreamCells(data, column, place.rows(column))
        if not len(data):
            raise UserError(f"{place.title} has no rows in its split {place.split!r}: set data.split, or data.source")
        return HubDataset(data, column)
    if path.is_dir():
        left_out: Counter[str] = Counter()
        return ImageFiles(files_below(path, left_out), path, left_out)
    if suffix_of(source) == LIST and (is_url(source) or path.exists()):
        return ListedPictures(read_list(source if is_url(source) else str(path)))
    what = "is no folder and no data set" if path.exists() or is_url(source) else "does not exist"
    raise UserError(f"data.source {source} {what}: give a folder, {', '.join(BUILDERS)} files, 'photos', or 'hf:NAME'")


def read_list(place: str) -> list[str]:
    """Pictures of a text file, a path or URL a line; paths start at the folder of the list.

    Raises UserError where it cannot be read or names nothing.
    """
    try:
        with fsspec.open(place, "rt", encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]  # pyright: ignore[reportGeneralTypeIssues]
    except Exception as error:  # file systems raise classes of their own
        raise UserError(f"cannot read data.source {place}: {first_line(error)}") from error
    folder = posixpath.dirname(place) if is_url(place) else os.path.dirname(place)
    places = [line if is_url(line) else os.path.join(folder, os.path.expanduser(line)) for line in lines if line]
    if not places:
        raise UserError(f"data.source {place} names no pictures: it must have a path or URL on each line")
    return places


def what_was_left_out(source: "Source") -> list[str]:
    """A line on the files of a folder that are no pictures by the end of their names; none where there are none."""
    left_out = Counter[str]()
    for part in parts_of(source)[0]:
        inner = part
        while isinstance(inner, (TitledPictures, Picked)):
            inner = inner.source
        left_out += inner.left_out if isinstance(inner, ImageFiles) else Counter[str]()
    if not left_out:
        return []
    kinds = ", ".join(f"{count} {escaped(suffix) or 'without one'}" for suffix, count in left_out.most_common(5))
    return [f"{left_out.total()} files are left out for their ending: {kinds}"]


def some_pictures(
    source: Source, count: int, indices_of: Callable[[int, int], Iterable[int]]
) -> Iterator[tuple[str, Callable[[], Picture]]]:
    """Names of pictures, and what opens each: `indices_of(length, count)`, or of a stream its first rows.

    Of several sources each has its share of the pictures.
    """
    parts, weights = parts_of(source)
    for part, share in zip(parts, Turns(weights).before(count), strict=True):
        if isinstance(part, StreamCells):
            for row, cell in enumerate(part.first(share)):
                yield f"{part.prefix}row {row}", partial(open_cell, cell)
        else:
            for index in indices_of(len(part), share):
                yield part.name(index), partial(part.open, index)


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
