"""Data sets read as streams: which process reads which rows, in which order."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node

from launch.data.order import Turns
from launch.run.randomness import seed_of
from vim_backbone.errors import UserError

FAIR = 8
"""Files of a stream for each reader from which on they are dealt out whole, though some get one more than others."""


class StreamCells:
    """A streamed data set as an endless sequence of (name, undecoded cell), shuffled anew each epoch."""

    def __init__(self, data: datasets.IterableDataset, column: str, prefix: str = "") -> None:
        """`prefix`: begins the names."""
        self.data = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column
        self.prefix = prefix

    def named(self, prefix: str) -> "StreamCells":
        """The same, its names beginning with this."""
        return StreamCells(self.data, self.column, prefix)

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
                yield f"{self.prefix}epoch {epoch} row {row}", batch[self.column][0]
                rows += 1
            if not rows:  # fewer rows than readers
                data = self.data.shuffle(seed=seed, buffer_size=1000)
            epoch += 1
        raise UserError("the stream has no rows: set data.split, or data.source")


@dataclass(frozen=True)
class MixedStreams:
    """Several streams, each with its share of the pictures."""

    parts: list[StreamCells]
    weights: list[float]


Stream = StreamCells | MixedStreams


class StreamReader:
    """One of the processes that read a stream, or several in turns: an endless iterator over (name, undecoded cell)."""

    def __init__(self, stream: Stream, seed: int, reader: int, readers: int) -> None:
        """Number `reader` of so many `readers`."""
        parts, weights = ([stream], [1.0]) if isinstance(stream, StreamCells) else (stream.parts, stream.weights)
        seeds = (seed_of(seed, *([number] if number else [])) % 2**31 for number in range(len(parts)))
        self.cells = [part.cells(key, reader, readers) for part, key in zip(parts, seeds, strict=True)]
        self.turns = Turns(weights)
        self.used = 0
        """How many of the cells could be used, which decides whose turn it is. Whoever uses them counts."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        while True:
            number, _ = self.turns.at(self.used)
            yield next(self.cells[number])
