"""A stream that is resumed goes on as if it had been read from the start, and reads nothing of what is through."""

import itertools
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.data.row_files import ParquetRows
from launch.data.sources import open_source

COUNTS = (700, 90, 1300, 40, 0, 1500, 350)
GROUPS = (100, 250, 30, 400)


@pytest.fixture(autouse=True)
def _no_pause_at_the_end_of_a_stream(monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def tables(counts):
    """A table of cells for each file, and the lengths of its parts, which differ."""
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    for part, count in enumerate(counts):
        cells = [{"bytes": f"{part}.{row}".encode(), "path": None} for row in range(count)]
        table = datasets.Dataset.from_dict({"label": [0] * count, "photo": cells}, features=features).data.table
        lengths = itertools.islice(itertools.cycle(GROUPS), part, None)
        yield table.combine_chunks(), lengths


def written(folder, kind, counts=COUNTS):
    """A source of this kind."""
    if kind == "saved":
        parts = [datasets.Dataset(table) for table, _ in tables(counts) if len(table)]
        datasets.concatenate_datasets(parts).save_to_disk(str(folder / "saved"))
        return str(folder / "saved")
    for part, (table, lengths) in enumerate(tables(counts)):
        path, start = folder / f"part-{part:02d}.{kind}", 0
        writer = pq.ParquetWriter if kind == "parquet" else pa.ipc.new_stream
        with writer(str(path), table.schema) as file:
            while start < len(table):
                length = next(lengths)
                file.write_table(table.slice(start, length))
                start += length
    return str(folder / f"part-*.{kind}")


def published(folder):
    """The source of parquet files in a folder as a data set of the Hub has them; the empty one is left out."""
    written(folder, "parquet")
    (folder / "of-hub/data").mkdir(parents=True)
    for path in folder.glob("*.parquet"):
        if pq.read_metadata(path).num_rows:
            path.rename(folder / f"of-hub/data/train-{path.name.removeprefix('part-')}")
    return f"hf:{folder}/of-hub"


def opened(source):
    return open_source(source, split="train", column=None, streaming=True)


def read(source, count, *args, **options):
    cells = opened(source).cells(7, *args, **options)
    return [(name, cell["bytes"]) for name, cell in itertools.islice(cells, count)]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "hf:"])
def test_a_resumed_stream_is_that_of_the_start(tmp_path, kind, monkeypatch):
    source = published(tmp_path) if kind == "hf:" else written(tmp_path, kind)
    for reader, readers in ((0, 1), (4, 5)):
        whole = read(source, 9000, reader, readers)
        assert {name.split(" row")[0] for name, _ in whole} >= {"epoch 0", "epoch 1"}
        bad = {name for name, _ in whole[5::11]}
        for used in (1, 450, 7300):
            for known in (bad, ()):
                start = [place for place, (name, _) in enumerate(whole) if name not in known][used - 1] + 1
                resumed = read(source, 300, reader, readers, used=used, bad=known)
                assert resumed == whole[start : start + 300]
    stream = opened(source)
    assert stream.files is not None
    monkeypatch.setattr(stream, "files", None)  # as of kinds whose rows are not known
    cells = itertools.islice(stream.cells(7, 0, 1, used=450), 300)
    assert [name for name, _ in cells] == [name for name, _ in read(source, 300, 0, 1, used=450)]


def test_one_file_with_parts_of_different_lengths(tmp_path):
    source = written(tmp_path, "parquet", (3333,))
    whole = read(source, 3800, 0, 1)
    assert read(source, 1000, 0, 1, used=2800) == whole[2800:]


def test_more_readers_than_rows(tmp_path):
    source = written(tmp_path, "parquet", (3,))
    whole = read(source, 12, 4, 5)
    assert read(source, 5, 4, 5, used=4) == whole[4:9]


def test_nothing_is_read_of_what_is_through(tmp_path, monkeypatch):
    source = written(tmp_path, "parquet", (500,) * 40)  # `datasets` reads ten files at a time
    whole = read(source, 20_000, 0, 1)
    files = opened(source).files
    to_come = set()
    for _, content in whole[16_000:]:
        number, row = map(int, content.split(b"."))
        to_come.add((number, next(g for g in range(999) if sum(files[number].groups[: g + 1]) > row)))
    through = [number for number in range(40) if number not in {number for number, _ in to_come}]
    assert len(through) >= 20
    for number in through:  # its pictures, but not its footer
        content = bytearray(Path(files[number].path).read_bytes())
        content[4:1000] = bytes(996)
        Path(files[number].path).write_bytes(content)
    parts = []
    original = ParquetRows.read

    def counted(self, group):
        parts.append(([file.path for file in files].index(self.path), group))
        return original(self, group)

    monkeypatch.setattr(ParquetRows, "read", counted)
    assert read(source, 4000, 0, 1, used=16_000) == whole[16_000:]
    assert sorted(parts) == sorted(to_come)  # each once


def test_a_file_that_cannot_be_counted_is_read(tmp_path, monkeypatch):
    source = written(tmp_path, "parquet", (30, 30))
    whole = read(source, 50, 0, 1)

    def refuse(path):
        raise OSError(path)

    monkeypatch.setattr(pq, "read_metadata", refuse)
    assert read(source, 10, 0, 1, used=40) == whole[40:]
