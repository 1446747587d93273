"""Files whose rows are known without reading them, so that a stream can go on in the middle of an epoch.

The numbers of rows, put through the shuffling of `datasets` in place of the pictures, say in which order the rows come;
then only the parts of files with rows that are still to come are read.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.iterable_dataset import ArrowExamplesIterable


class ParquetRows:
    """The column of pictures of a parquet file.

    As of the other kinds, `groups` are the numbers of rows of its parts, each of which is read at once: the row groups.
    """

    def __init__(self, path: str, column: str) -> None:
        self.path = path
        self.column = column

    @cached_property
    def groups(self) -> list[int]:
        """As its footer has them."""
        with self._open() as file:
            metadata = pq.read_metadata(file)
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    def read(self, group: int) -> pa.ChunkedArray | pa.Array:
        """The pictures of a row group."""
        with self._open() as file, pq.ParquetFile(file) as opened:
            return opened.read_row_group(group, columns=[self.column])[self.column]

    def _open(self) -> Any:
        return fsspec.open(self.path, "rb")


class ArrowRows:
    """A local Arrow file, of the format for streams or for files; its parts are the record batches."""

    def __init__(self, path: str, column: str) -> None:
        self.path = path
        self.column = column

    @cached_property
    def groups(self) -> list[int]:
        """Record batches; what they hold stays on disk."""
        return [batch.num_rows for batch in self._batches()]

    def read(self, group: int) -> pa.ChunkedArray | pa.Array:
        """The pictures of a record batch."""
        return next(batch[self.column] for number, batch in enumerate(self._batches()) if number == group)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(self.path) as file:
            try:
                yield from pa.ipc.open_stream(file)
            except pa.ArrowInvalid:
                opened = pa.ipc.open_file(file)
                yield from (opened.get_batch(number) for number in range(opened.num_record_batches))


class SavedRows:
    """What `save_to_disk` wrote, mapped into memory."""

    def __init__(self, data: datasets.Dataset, column: str) -> None:
        self.data = data.with_format("arrow", columns=[column])
        self.column = column

    @cached_property
    def groups(self) -> list[int]:
        """A thousand rows each."""
        return [min(1000, len(self.data) - start) for start in range(0, len(self.data), 1000)]

    def read(self, group: int) -> pa.ChunkedArray | pa.Array:
        """The pictures of a thousand rows."""
        start = sum(self.groups[:group])
        return self.data[start : start + self.groups[group]][self.column]


RowFile = ParquetRows | ArrowRows | SavedRows


def numbered(files: Sequence[RowFile]) -> datasets.IterableDataset:
    """The stream of these files with numbers in place of pictures: of the file, and of the row in it."""

    def tables(numbers: list[int]) -> Iterator[tuple[Any, pa.Table]]:
        for number in numbers:
            row = 0
            for index, length in enumerate(files[number].groups):
                rows = np.arange(row, row + length)
                yield (number, index), pa.table({"file": np.full(length, number), "row": rows})
                row += length

    rows = ArrowExamplesIterable(tables, {"numbers": list(range(len(files)))})
    return datasets.IterableDataset(rows).with_format("arrow")


def order_of(stream: datasets.IterableDataset, epoch: int) -> np.ndarray:
    """(rows, 2): file and row of each picture of an epoch of a stream that `numbered` made."""
    stream.set_epoch(epoch)
    parts = [np.stack([batch["file"], batch["row"]], 1) for batch in stream.iter(batch_size=1000)]
    return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)


def cells_at(files: Sequence[RowFile], order: np.ndarray) -> Iterator[Any]:
    """The undecoded cells of these rows, in this order. A part of a file is read once, and none without such rows."""
    numbers = np.unique(order[:, 0]).tolist()
    parts = [(number, group) for number in numbers for group in range(len(files[number].groups))]
    ends = np.cumsum([files[number].groups[group] for number, group in parts])
    first_rows = np.zeros(len(files), np.int64)
    first_rows[numbers] = np.cumsum([0, *(sum(files[number].groups) for number in numbers)])[:-1]
    rows = first_rows[order[:, 0]] + order[:, 1]  # counted over all these files
    part_of = np.searchsorted(ends, rows, side="right")
    by_part = np.argsort(part_of, kind="stable")
    sorted_parts = part_of[by_part]
    pending: dict[int, Any] = {}
    for row, part in zip(rows.tolist(), part_of.tolist(), strict=True):
        if row not in pending:
            number, group = parts[part]
            chosen = rows[by_part[slice(*np.searchsorted(sorted_parts, (part, part + 1)))]]
            first = ends[part] - files[number].groups[group]
            column = files[number].read(group).take(pa.array(chosen - first))
            whole: Any = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            pending |= zip(chosen.tolist(), datasets.Image().cast_storage(whole).to_pylist(), strict=True)
        yield pending.pop(row)
