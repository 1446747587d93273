"""Data sets read as streams: which process reads which rows, in which order."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.distributed import split_dataset_by_node

from launch.data.order import Turns
from launch.data.row_files import RowFile, cells_at, numbered, order_of
from launch.run.randomness import seed_of
from vim_backbone.errors import UserError

FAIR = 8
"""Files of a stream for each reader from which on they are dealt out whole, though some get one more than others."""


class StreamCells:
    """A streamed data set as an endless sequence of (name, undecoded cell), shuffled anew each epoch."""

    def __init__(
        self, data: datasets.IterableDataset, column: str, files: Sequence[RowFile] | None = None, prefix: str = ""
    ) -> None:
        """Args:
        files: its files in their order, where their rows are known without reading them.
        prefix: begins the names.
        """
        self.data = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column
        self.files = files if files and len(files) == data.num_shards else None
        self.prefix = prefix

    def named(self, prefix: str) -> "StreamCells":
        """The same, its names beginning with this."""
        return StreamCells(self.data, self.column, self.files, prefix)

    def first(self, count: int) -> list[Any]:
        """The first cells, unshuffled."""
        return [row[self.column] for row in self.data.take(count)]

    def cells(
        self, seed: int, reader: int, readers: int, used: int = 0, bad: Collection[str] = ()
    ) -> Iterator[tuple[str, Any]]:
        """Cells of one of the processes that read the stream, whatever the number of its files.

        Readers share no row of an epoch, unless there are fewer rows than readers. Where files are few and cannot be
        dealt out evenly, several readers read the same ones, and each takes its share of the rows.

        Args:
            seed: of the order.
            reader: number of the process, of so many `readers`.
            used: how many cells are passed over. Where the rows of the files are known, nothing of them is read.
            bad: names of cells that do not count among these.

        Raises:
            UserError: a stream without rows.
        """
        data = dealt(self.data, seed, reader, readers)
        epoch, rows = 0, 0
        if used and self.files and (place := self._place_after(seed, reader, readers, used, bad)):
            epoch, row, order, shared = place
            for rows, cell in enumerate(cells_at(self.files, order[row:]), start=row):
                yield self._name(epoch, rows), cell
            data = shuffled(self.data, seed) if shared else data
            epoch, rows, used = epoch + 1, len(order), 0
        while rows or epoch < 2:
            data.set_epoch(epoch)
            # `iter`, because iteration itself would deal the files out once more, to the processes of a loader
            for row, batch in enumerate(data.iter(batch_size=1)):
                rows += 1
                name = self._name(epoch, row)
                if used:
                    used -= name not in bad
                else:
                    yield name, batch[self.column][0]
            if not rows:  # fewer rows than readers
                data = shuffled(self.data, seed)
            epoch += 1
        raise UserError("the stream has no rows: set data.split, or data.source")

    def _name(self, epoch: int, row: int) -> str:
        return f"{self.prefix}epoch {epoch} row {row}"

    def _place_after(
        self, seed: int, reader: int, readers: int, used: int, bad: Collection[str]
    ) -> tuple[int, int, np.ndarray, bool] | None:
        """Where a reader is after so many cells: the epoch, the row in its order, that order, and whether readers share
        all rows. None where the files do not say.
        """
        assert self.files is not None
        try:
            numbers = numbered(self.files)
            stream, epoch, shared = dealt(numbers, seed, reader, readers), 0, False
            length = len(order_of(stream, epoch))
            if not length:  # fewer rows than readers
                stream, epoch, shared = shuffled(numbers, seed), 1, True
                length = len(order_of(stream, epoch))
            counted = Counter(name.removeprefix(self.prefix).partition(" row ")[0] for name in bad)
            while length and used > (good := max(0, length - counted[f"epoch {epoch}"])):
                used -= good
                epoch += 1
            order = order_of(stream, epoch)
        except (OSError, pa.ArrowException):
            return None
        good_rows = [row for row in range(length) if self._name(epoch, row) not in bad]
        return (epoch, good_rows[used - 1] + 1, order, shared) if 0 < used <= len(good_rows) else None


def dealt(data: datasets.IterableDataset, seed: int, reader: int, readers: int) -> datasets.IterableDataset:
    """The share of one of so many readers, shuffled."""
    files = data.num_shards
    parts = readers if files >= FAIR * readers else math.gcd(files, readers)
    share = shuffled(data.shard(parts, reader % parts, contiguous=False), seed)
    return split_dataset_by_node(share, reader // parts, readers // parts) if parts < readers else share


def shuffled(data: datasets.IterableDataset, seed: int) -> datasets.IterableDataset:
    """In another order each epoch, within a buffer."""
    return data.shuffle(seed=seed, buffer_size=1000)


@dataclass(frozen=True)
class MixedStreams:
    """Several streams, each with its share of the pictures."""

    parts: list[StreamCells]
    weights: list[float]


Stream = StreamCells | MixedStreams


class StreamReader:
    """One of the processes that read a stream, or several in turns: an endless iterator over (name, undecoded cell)."""

    def __init__(
        self, stream: Stream, seed: int, reader: int, readers: int, used: int = 0, bad: Collection[str] = ()
    ) -> None:
        """Args as `StreamCells.cells`."""
        parts, weights = ([stream], [1.0]) if isinstance(stream, StreamCells) else (stream.parts, stream.weights)
        seeds = (seed_of(seed, *([number] if number else [])) % 2**31 for number in range(len(parts)))
        self.turns = Turns(weights)
        self.cells = [
            part.cells(key, reader, readers, skipped, {name for name in bad if name.startswith(part.prefix)})
            for part, key, skipped in zip(parts, seeds, self.turns.before(used), strict=True)
        ]
        self.used = used
        """How many of the cells could be used, which decides whose turn it is. Whoever uses them counts."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        while True:
            number, _ = self.turns.at(self.used)
            yield next(self.cells[number])
