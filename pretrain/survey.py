"""The first pictures of a run, read as it would read them: their sizes, bands, values, views, and what is wrong."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from launch.data.data_sets import open_cell
from launch.data.images import BadPictureError, range_of
from launch.data.loading import number_of_workers
from launch.data.pictures import Picture, whole_box
from launch.data.reading import read_pixels, resized
from launch.data.sources import Source, length_of, passes_over, what_was_left_out
from launch.data.streams import Stream, StreamCells, StreamReader
from launch.run.progress import ProgressReport
from launch.run.randomness import generator
from pretrain.data import Cut, View
from vim_backbone.errors import UserError
from vim_backbone.images import reason
from vim_backbone.preprocessing import Preprocessing, as_rgb, to_model, to_pixels

EXAMPLES = 8
"""Pictures that are drawn."""
EPOCHS = 4
"""Epochs whose crops are drawn."""
SIDE = 320
"""Longer side of a whole picture that is drawn."""
MOST_VALUES = 4096
"""Values of a picture that are kept."""
NAMED = 4
"""Pictures that are named for each reason why they cannot be used."""
BANDS = 16
"""Most bands of a picture that are drawn."""


@dataclass
class Looked:
    """A picture that was looked at."""

    name: str
    size: tuple[int, int] = (0, 0)
    """Height and width."""
    kind: str = ""
    """Bands and type, in words; empty where it cannot be opened."""
    channels: int = 0
    """Of the model that it has; 0 where a run cannot use it."""
    problem: str = ""
    """Why a run cannot use it."""
    values: np.ndarray | None = None
    """Some of the values that hold something, (bands, n), in the file's type."""
    cuts: list[Cut] = field(default_factory=list)
    """Of the first epochs."""
    on_page: bool = False
    """Whether it is among the first of those that can, or cannot, be used; only then there are the following."""
    pixels: Tensor | None = None
    """The view of the first epoch (c, h, w), every channel in [0, 1] as the model's range has it."""
    whole: Tensor | None = None
    """All of it (3, h, w) in [0, 1], small."""
    bands: Tensor | None = None
    """Its first bands (bands, h, w), small, in [0, 1], each by its own range, where a run cannot use it."""


@dataclass
class Survey:
    """What was learned of a source."""

    looked: list[Looked]
    """In the order of the run."""
    total: int | None
    """Pictures of the source; None for a stream."""
    notes: list[str]
    """Lines on the source."""
    refusal: str = ""
    """Why a run would end at its start."""

    @property
    def bad(self) -> list[Looked]:
        """Those that a run cannot use."""
        return [each for each in self.looked if each.problem]

    @property
    def on_page(self) -> list[Looked]:
        """Those that are drawn: usable ones first, then others that can be opened."""
        return sorted((each for each in self.looked if each.on_page), key=lambda each: bool(each.problem))[:EXAMPLES]

    def problems(self) -> list[str]:
        """A line for each reason, with how many pictures have it, the most frequent first."""
        names: dict[str, list[str]] = {}
        for each in self.bad:
            names.setdefault(each.problem, []).append(each.name)
        lines = []
        for why, whose in sorted(names.items(), key=lambda item: -len(item[1])):
            others = len(whose) - NAMED
            lines.append(", ".join(whose[:NAMED]) + (f" and {others} others" if others > 0 else "") + f": {why}")
        return lines


Opening = tuple[str, Callable[[], Picture], Callable[[int], list[torch.Generator]]]
"""Name, what opens it, and what its first views are drawn with, after so many usable pictures."""


def openings(source: Source, view: View, seed: int, pictures: int, looked: list[Looked]) -> Iterator[Opening]:
    """The first pictures that a run of one process reads; of a stream, those of its first worker.

    `looked`: those of them that were looked at so far.
    """
    if isinstance(source, Stream):
        readers = max(1, number_of_workers(view.data.workers))
        cells = StreamReader(source, seed, 0, readers)
        for place, cell in cells:
            if isinstance(source, StreamCells) and not place.startswith("epoch 0 "):
                return
            yield place, partial(open_cell, cell), lambda used: [generator(seed, 0, 0, used)]
            cells.used = sum(not each.problem for each in looked)
        return
    passes = passes_over(source, seed)
    for position in range(min(pictures, len(source))):
        _, index = passes[position]

        def keys(used: int, index: int = index) -> list[torch.Generator]:
            del used
            return [generator(seed, epoch, index) for epoch in range(EPOCHS)]

        yield source.name(index), partial(source.open, index), keys


def survey(source: Source, view: View, seed: int, pictures: int, report: ProgressReport | None = None) -> Survey:
    """Read the first pictures of a run, as it would. Raises UserError where none can be read."""
    looked: list[Looked] = []
    counts: Counter[bool] = Counter()
    usable = 0
    for name, opened, keys in islice(openings(source, view, seed, pictures, looked), pictures):
        entry = Looked(name)
        try:
            with opened() as picture:
                look_at(entry, picture, view, keys(usable), counts)
        except Exception as error:  # a decoder may raise anything on damaged data
            entry.problem = entry.problem or reason(error)
        usable += not entry.problem
        looked.append(entry)
        if report is not None:
            report.update(len(looked), report.rate())
    if not any(entry.on_page for entry in looked):
        raise UserError(f"no picture can be read, such as {looked[0].name}: {looked[0].problem}; see data.source")
    return Survey(looked, length_of(source), what_was_left_out(source))


def look_at(entry: Looked, picture: Picture, view: View, keys: list[torch.Generator], counts: Counter[bool]) -> None:
    """Fill the entry of a picture; `counts` has those that are drawn, by whether they are bad.

    Raises what a decoder raises.
    """
    data = view.data
    preprocessing = data.preprocessing
    entry.size, entry.kind = picture.size, picture.words
    entry.cuts = [view.plan(picture.size, key) for key in keys]
    pixels = None
    try:
        pixels = in_range(view.read(picture, entry.cuts[0]), preprocessing)
        entry.channels = len(pixels)
    except BadPictureError as error:
        entry.problem = reason(error)
    entry.values = some_values(picture, data.max_megapixels, preprocessing.nodata)
    bad = bool(entry.problem)
    if counts[bad] < EXAMPLES:
        counts[bad] += 1
        entry.on_page, entry.pixels = True, pixels
        entry.whole, entry.bands = whole(picture, preprocessing, data.max_megapixels, bad)


def in_range(view: Tensor, preprocessing: Preprocessing) -> Tensor:
    """A view (c, h, w) in [0, 1], as the range has it."""
    return to_pixels(to_model(view, torch.device("cpu"), preprocessing), preprocessing)


def some_values(picture: Picture, max_megapixels: float, nodata: float | None) -> np.ndarray:
    """Values of pixels (bands, n) that hold something, evenly spread over those that `sample` reads."""
    values = picture.sample(max_megapixels)
    valid = ~picture.missing(values, nodata)
    if values.dtype.kind == "f":
        valid &= np.isfinite(values).all(0)
    return values[:, valid][:, :: max(1, int(valid.sum()) // MOST_VALUES)]


def whole(
    picture: Picture, preprocessing: Preprocessing, max_megapixels: float, refused: bool
) -> tuple[Tensor | None, Tensor | None]:
    """All of a picture, small, and its bands where a run refuses it; None for what is too large to be read whole."""
    height, width = picture.size
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    box = whole_box(height, width)
    try:
        if not refused:
            return as_rgb(in_range(read_pixels(picture, preprocessing, max_megapixels, box, size), preprocessing)), None
        values, near = picture.values(max_megapixels, box, size)
    except BadPictureError:
        return None, None
    bands = torch.from_numpy(resized(values[:BANDS].astype(np.float32), size, near))
    for band in bands:
        low, high = range_of(band.numpy()) if values.dtype != np.uint8 else (0.0, 255.0)
        band.sub_(low).div_(high - low).clamp_(0, 1)
    return as_rgb(bands), bands
