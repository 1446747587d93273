"""Views and batches: crop, flip and what the objective adds, keyed by (seed, epoch, picture), exact on resume."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from launch.data.bad_pictures import MAX_TRIES, first_usable
from launch.data.cache import Cache
from launch.data.crops import random_crop
from launch.data.data_sets import open_cell
from launch.data.loading import loader_of
from launch.data.pictures import Box, Picture
from launch.data.reading import read_pixels
from launch.data.resize import Resizer
from launch.data.sources import ImageSource, Source, WeightedSource, open_source, open_sources, shares_of, stand_ins
from launch.data.statistics import NodataField, RangeField, preprocessing_of
from launch.data.streams import Stream, StreamReader
from launch.run.randomness import generator
from pretrain.stages import Item, Size, Stage, StageSampler, stage_at
from vim_backbone.errors import require
from vim_backbone.images import reason
from vim_backbone.preprocessing import Preprocessing


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Pictures, and how a training view is cut from one."""

    source: str = "photos"
    """A folder of pictures (any depth), a .txt list of paths and URLs, .parquet, .arrow, .tar or .zip file(s) by path,
    glob or URL, a folder of `save_to_disk`, hf:NAME for `datasets.load_dataset`, or photos (built in)."""
    sources: list[WeightedSource] | None = None
    """Several sources in place of `source`, as [{source: a, weight: 2}, {source: b}]: each has its weight's share of
    the pictures that are drawn."""
    split: str = "train"
    """Split of a data set."""
    column: str | None = None
    """Image column of a data set; the first one when not given."""
    streaming: bool = False
    """Read a data set as a stream, without a copy on disk."""
    sizes: Literal["fixed", "native"] = "fixed"
    """fixed: every view has model.img_size. native: a view keeps the shape and resolution of its crop and is only
    scaled down, to the area of model.img_size; the views are packed into one row of patches, without padding."""
    batch_by: Literal["views", "patches"] = "views"
    """views: a step has batch_size views. patches: with native sizes, as many whole views as have no more patches than
    batch_size views of the largest area, so that steps cost alike."""
    min_scale: float = 0.2
    """Smallest share of a picture's area that a random crop takes."""
    flip: bool = True
    """Mirror half of the crops left to right."""
    resize: Resizer = "pillow"
    """What resizes a crop: pillow, or torch, which takes a quarter of the time, moves the crop to whole pixels and
    differs from Pillow by a level of 255; for a GPU that waits for data."""
    workers: int | None = None
    """Processes that read and decode pictures, for each training process; 0 reads in the training process. null: its
    share of the cores but one, 2 to 16."""
    cache: Cache = "none"
    """device: pictures of one size, of up to 128 px a side, are decoded once and stay on the device as bytes; the views
    of a batch are drawn and cut there, all at once and otherwise than by readers."""
    max_bad_share: float = 0.5
    """Share of the pictures that may be unreadable or too large before the run fails."""
    max_megapixels: float = 200.0
    """Most pixels of a picture that are decoded for a view, in millions."""
    crop_megapixels: float | None = None
    """Most pixels that a random crop takes, in millions; null: as many as the picture has. For slides and scenes, whose
    detail a view of the whole would lose: 1 gives crops of up to 1000 x 1000."""
    bands: list[int] | None = None
    """Bands of a file that are the model's channels, in this order, counted from 0; null: those of `statistics`, else
    8-bit RGB."""
    range: RangeField = None
    """Values that become 0 and 1: [lowest, highest], type (of the files' type) or percentiles (of `statistics`); null:
    type for 8 bits, else percentiles. With 8-bit RGB, the values of more bits that become black and white."""
    nodata: NodataField = None
    """Value of pixels that hold nothing, or nan; null: what the file, or `statistics`, says."""
    statistics: str | None = None
    """File of `python -m pretrain.bands`, which says bands, range, mean, deviation and nodata."""

    def __post_init__(self) -> None:
        require(self.sources != [], "data.sources", self.sources, "list one or more, or leave it out")
        alone = self.sources is None or self.source == DataConfig.source
        require(alone, "data.source", self.source, "give it or data.sources, not both")
        require(0.0 < self.min_scale <= 1.0, "data.min_scale", self.min_scale, "it must lie in (0, 1]")
        require((self.workers or 0) >= 0, "data.workers", self.workers, "it cannot be negative")
        require(0.0 <= self.max_bad_share <= 1.0, "data.max_bad_share", self.max_bad_share, "it must lie in [0, 1]")
        require(self.max_megapixels > 0, "data.max_megapixels", self.max_megapixels, "it must be positive")
        require((self.crop_megapixels or 1) > 0, "data.crop_megapixels", self.crop_megapixels, "it must be positive")
        sets = self.preprocessing.channel_sets
        for wrong, remedy in (
            (self.streaming, "a stream is not kept; set data.streaming false"),
            (self.sizes == "native", "its views have one size; set data.sizes fixed"),
            (sets is not None, "its pictures have the same bands; set data.cache none"),
            (self.crop_megapixels is not None, "its pictures are small; leave data.crop_megapixels out"),
            (self.resize != "pillow", "it has a resizer of its own; leave data.resize out"),
        ):
            require(not (self.cache == "device" and wrong), "data.cache", self.cache, remedy)

    def open(self) -> Source:
        """The pictures. Raises UserError where a source is not there, or cannot be mixed with the others."""
        options = {"split": self.split, "column": self.column, "streaming": self.streaming}
        return open_source(self.source, **options) if self.sources is None else open_sources(self.sources, **options)

    @property
    def title(self) -> str:
        """The source, or several with their weights, in words."""
        entries = self.sources or []
        return ", ".join(f"{entry.title} x {entry.weight:g}" for entry in entries) or self.source

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Bands, range, normalisation and nodata. Raises UserError where they do not fit."""
        return preprocessing_of(self.statistics, self.bands, self.range, self.nodata)


def source_field(text: str) -> str:
    """The field of `DataConfig` that an argument of a command is: a source, or a list of several."""
    return "sources" if text.lstrip().startswith("[") and not Path(text).exists() else "source"


class Sample(NamedTuple):
    """One training view."""

    image: Tensor | None
    """(c, h, w) uint8, uint16 or float32; None where no picture could be used."""
    extra: Tensor
    """What the objective adds to it."""
    name: str
    """The picture it was cut from."""
    bad: list[tuple[str, str]]
    """Pictures passed over on the way, with the reason."""


class Batch(NamedTuple):
    """Views of one forward pass; a tuple, whose tensors a loader pins."""

    images: Tensor | list[Tensor] | None
    """(b, c, h, w) as the samples, or a list of (c, h, w) where they differ; None where a sample had to be given up."""
    extras: Tensor | list[Tensor]
    """What the objective adds to each, stacked, or a list."""
    names: list[str]
    """Pictures the views were cut from."""
    bad: list[tuple[str, str]]
    """Pictures passed over, with the reason."""


@dataclass(frozen=True)
class View:
    """Cuts training views out of pictures."""

    img_size: tuple[int, int]
    """Height and width in pixels; of native sizes, their product is the largest area."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    data: DataConfig
    draw_extra: Callable[[tuple[int, int], torch.Generator], Tensor]
    """What the objective adds to a view of so many rows and columns of patches (`Objective.draw`)."""

    @property
    def native(self) -> bool:
        """Whether views differ in size."""
        return self.data.sizes == "native"

    def sized(self, img_size: Size) -> "View":
        """The same for another size."""
        if img_size == self.img_size:
            return self
        side = self.img_size[0] // self.grid[0]
        return replace(self, img_size=img_size, grid=(img_size[0] // side, img_size[1] // side))

    @property
    def packed(self) -> bool:
        """Whether views differ in shape, in size or in bands."""
        return self.native or self.data.preprocessing.channel_sets is not None

    @property
    def sizes(self) -> str:
        """In words."""
        return f"{'native sizes up to ' if self.native else ''}{self.img_size[0]} x {self.img_size[1]}"

    def draw(self, picture: Picture, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A view of a picture, as `read_pixels` gives it, and what the objective adds to it.

        What can be read at a lower resolution (the scales of a JPEG, the levels of a TIFF, tiles) is read at the lowest
        that holds the crop in full detail.
        """
        cut = self.plan(picture.size, rng)
        return self.read(picture, cut), cut.extra

    def plan(self, picture_size: tuple[int, int], rng: torch.Generator) -> "Cut":
        """What is drawn for a view of a picture of this height and width, before it is read."""
        # of fixed sizes first: the order of the draws is part of what a seed means
        extra = None if self.native else self.draw_extra(self.grid, rng)
        box, size = self._crop(picture_size, rng)
        mirror = bool(self.data.flip and torch.rand((), generator=rng) < 0.5)
        if extra is None:
            side = self.img_size[0] // self.grid[0]
            extra = self.draw_extra((size[0] // side, size[1] // side), rng)
        return Cut(box, size, mirror, extra)

    def patches(self, picture_size: tuple[int, int], rng: torch.Generator) -> int:
        """Patches of the view that `plan` draws of native sizes."""
        side, (height, width) = self.img_size[0] // self.grid[0], self._crop(picture_size, rng)[1]
        return (height // side) * (width // side)

    def _crop(self, picture_size: tuple[int, int], rng: torch.Generator) -> tuple[Box, Size]:
        """Box in the picture, and size of the view."""
        data, (height, width) = self.data, picture_size
        most = np.inf if data.crop_megapixels is None else data.crop_megapixels * 1e6
        box = random_crop(width, height, data.min_scale, rng, most)
        if not self.native:
            return box, self.img_size
        return box, native_size((box[3] - box[1], box[2] - box[0]), self.img_size, self.grid)

    def read(self, picture: Picture, cut: "Cut") -> Tensor:
        """A crop of a picture, resized and maybe mirrored, (c, h, w). Raises as `read_pixels`."""
        data = self.data
        view = read_pixels(picture, data.preprocessing, data.max_megapixels, cut.box, cut.size, data.resize)
        return view.flip(-1) if cut.mirror else view


class Cut(NamedTuple):
    """How a view is cut out of a picture."""

    box: Box
    """In pixels of the picture."""
    size: tuple[int, int]
    """Height and width of the view."""
    mirror: bool
    """Left to right."""
    extra: Tensor
    """What the objective adds to the view."""


def native_size(crop: tuple[float, float], img_size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width for a crop of this height and width: its own, scaled down to the area of `img_size` at most.

    Whole patches on each side, never more of them than `grid` has, and two at least, one to hide and one to see.
    """
    side, most = img_size[0] // grid[0], grid[0] * grid[1]
    scale = min(1.0, (img_size[0] * img_size[1] / (crop[0] * crop[1])) ** 0.5)
    rows, columns = (max(1, round(length * scale / side)) for length in crop)
    while rows * columns > most:  # rounded up, or thinner than a patch: shorten the longer side
        rows, columns = (min(rows, most) - 1, columns) if rows >= columns else (rows, min(columns, most) - 1)
    if rows * columns == 1:
        rows, columns = (2, 1) if crop[0] > crop[1] else (1, 2)
    return rows * side, columns * side


class Views(Dataset[Sample]):
    """Views of an indexed source; item (epoch, index) is the same wherever and whenever it is drawn.

    A third number of an item is the size of the view, where it is another one than `view.img_size`.
    """

    def __init__(self, source: ImageSource, view: View, seed: int) -> None:
        self.source = source
        self.view = view
        self.seed = seed

    def __getitem__(self, item: tuple[int, int] | Item) -> Sample:
        """A bad picture is replaced by the next good one of the source."""
        epoch, index = item[:2]
        view = self.view.sized(item[2]) if len(item) == 3 else self.view

        def read(candidate: int, attempt: int) -> tuple[Tensor, Tensor]:
            del attempt  # what stands in is cut with the same draws
            with self.source.open(candidate) as picture:
                return view.draw(picture, generator(self.seed, epoch, index))

        sample, number, bad = first_usable(self.source, index, read, stand_ins(self.source, index))
        if sample is None:
            return Sample(None, torch.empty(0), "", bad)
        return Sample(*sample, self.source.name(number), bad)


class StreamedViews(IterableDataset["Batch | None"]):
    """Batches of a stream. Exact on resume with the same numbers of processes and workers: what was used is skipped.

    `skip` batches are passed over without decoding and come out as None; pictures of `already_bad` count for nothing,
    as they did when they were first met.
    """

    def __init__(
        self,
        cells: Stream,
        view: View,
        seed: int,
        stages: Sequence[Stage],
        skip: int,
        already_bad: frozenset[str],
    ) -> None:
        self.cells = cells
        self.view = view
        self.seed = seed
        self.stages = stages
        self.skip = skip
        self.already_bad = already_bad

    def __iter__(self) -> Iterator["Batch | None"]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        plan = self.stages[0].plan
        reader, readers = plan.rank * workers + worker, plan.world * workers
        # the loader takes batch k from worker k % workers
        skipped = range(worker, self.skip, workers)
        used = sum(self._stage_of(number).plan.micro_batch for number in skipped)
        who = f"rank {plan.rank} worker {worker} "
        already_bad = {name.removeprefix(who) for name in self.already_bad if name.startswith(who)}
        cells = StreamReader(self.cells, self.seed, reader, readers, used, already_bad)
        named = ((f"{who}{place}", cell) for place, cell in cells)
        yield from itertools.repeat(None, len(skipped))
        for number in itertools.count(worker + len(skipped) * workers, workers):
            stage = self._stage_of(number)
            view, samples = self.view.sized(stage.img_size), []
            for _ in range(stage.plan.micro_batch):
                samples.append(sample_of(named, view, (self.seed, plan.rank, worker, cells.used)))
                cells.used += 1
            yield collate(samples, view.packed)

    def _stage_of(self, batch: int) -> Stage:
        return stage_at(self.stages, batch // self.stages[0].plan.accumulation)


def sample_of(named: Iterator[tuple[str, Any]], view: View, key: tuple[int, ...]) -> Sample:
    """A view of the next cell that can be used, drawn with the generator of the key; none after MAX_TRIES bad ones."""
    bad: list[tuple[str, str]] = []
    for name, cell in named:
        try:
            with open_cell(cell) as picture:
                return Sample(*view.draw(picture, generator(*key)), name, bad)
        except Exception as error:  # a decoder may raise anything on damaged data
            bad.append((name, reason(error)))
            if len(bad) >= MAX_TRIES:
                break
    return Sample(None, torch.empty(0), "", bad)


def build_loader(
    source: Source,
    view: View,
    seed: int,
    stages: Sequence[Stage],
    start_batch: int = 0,
    already_bad: Collection[str] = (),
    sampler: Sampler[list[Item]] | None = None,
) -> Iterable[Batch | None]:
    """Batches of this process, each for one forward pass, from number `start_batch` on.

    On a stream, the batches already used come first, as None.

    Args:
        already_bad: names of the pictures that an earlier part of the run found to be bad.
        sampler: which pictures of an indexed source each batch has; those of `StageSampler` when None.
    """
    loader = partial(loader_of, seed=seed, workers=view.data.workers, ahead=4)
    if isinstance(source, Stream):
        streamed = StreamedViews(source, view, seed, stages, start_batch, frozenset(already_bad))
        return cast("Iterable[Batch | None]", loader(streamed, collate=unchanged, batch_size=None))
    counts, weights = shares_of(source)
    sampler = sampler or StageSampler(counts, seed, stages, start_batch, weights)
    collated = partial(collate, packed=view.packed)
    return cast("Iterable[Batch | None]", loader(Views(source, view, seed), collate=collated, batch_sampler=sampler))


def unchanged(batch: Any) -> Any:
    """What a reader gives whole batches through."""
    return batch


def collate(views: list[Sample], packed: bool) -> Batch:
    """Samples to a batch, of lists where their shapes differ."""
    names, bad = [sample.name for sample in views], [entry for sample in views for entry in sample.bad]
    images, extras = [sample.image for sample in views if sample.image is not None], [sample.extra for sample in views]
    if len(images) < len(views):
        return Batch(None, [], names, bad)  # given up; the training process says so
    return Batch(images, extras, names, bad) if packed else Batch(torch.stack(images), torch.stack(extras), names, bad)
