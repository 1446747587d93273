"""Every kind of source hands its pictures out, undecoded."""

import gc
import itertools
import os
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from launch.data.data_sets import BUILDERS, open_cell
from launch.data.images import BadPictureError
from launch.data.sources import open_source, photograph_paths
from launch.data.streams import StreamCells
from vim_backbone import UserError

MORE = int(os.environ.get("FUZZ", "0"))
"""Examples of each fuzzer, in place of a number for CI."""


def test_photographs_come_with_the_packages():
    source = open_source("photos", split="train", column=None, streaming=False)
    assert len(source) == len(photograph_paths()) == 12
    sizes = {source.name(i): source.open(i).rgb(100)[0].size for i in range(len(source))}
    assert sizes["astronaut.png"] == (512, 512)
    assert sizes["china.jpg"] == (640, 427)


def test_folder_of_any_depth(picture_folder):
    source = open_source(str(picture_folder), split="train", column=None, streaming=False)
    assert len(source) == 10
    assert source.name(0) == "deep/er/1.png"
    assert {source.name(i) for i in range(10)} >= {"top/0.jpg", "top/2.webp"}


@pytest.fixture(autouse=True)
def _no_pause_at_the_end_of_a_stream(monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    yield
    gc.collect()  # ends the streams that were not read to their end


@pytest.fixture
def parquet(tmp_path, picture_folder):
    paths = sorted(picture_folder.rglob("*.*"))
    cells = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    for part in range(2):
        rows = {"label": [0] * 5, "photo": cells[part * 5 : part * 5 + 5]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"part-{part}.parquet")
    return str(tmp_path / "part-*.parquet")


def test_parquet_files(parquet):
    source = open_source(parquet, split="train", column=None, streaming=False)
    assert len(source) == 10
    assert source.open(3).rgb(100)[0].size[0] > 40


def test_stream_covers_an_epoch_in_an_order_that_its_seed_decides(parquet):
    source = open_source(parquet, split="train", column="photo", streaming=True)
    assert isinstance(source, StreamCells)

    def first(count, seed):
        cells = source.cells(seed, reader=0, readers=1)
        return [cell["bytes"] for _, (_, cell) in zip(range(count), cells, strict=False)]

    assert len(set(first(10, seed=1))) == 10
    assert first(25, seed=1) == first(25, seed=1)
    assert first(10, seed=1) != first(10, seed=2)
    with pytest.raises(BadPictureError, match="empty"):
        open_cell({"bytes": None, "path": None})


def rows_of_files(folder, counts):
    """Parquet files of so many rows each, and the bytes of all rows."""
    rows = [[f"picture {part}.{row}".encode() for row in range(count)] for part, count in enumerate(counts)]
    features = datasets.Features({"photo": datasets.Image()})
    for part, cells in enumerate(rows):
        data = datasets.Dataset.from_dict({"photo": [{"bytes": c, "path": None} for c in cells]}, features=features)
        data.to_parquet(folder / f"part-{part:02d}.parquet")
    return str(folder / "part-*.parquet"), [cell for cells in rows for cell in cells]


@pytest.mark.parametrize(
    ("counts", "readers"),
    [([7], 1), ([7], 2), ([7], 5), ([3, 4], 4), ([2, 2, 3], 4), ([4, 4, 4, 4], 6), ([2] * 16, 2), ([2] * 17, 2)],
)
def test_readers_share_each_epoch_of_a_stream(tmp_path, counts, readers):
    pattern, rows = rows_of_files(tmp_path, counts)
    source = open_source(pattern, split="train", column="photo", streaming=True)
    readings = [source.cells(1, reader, readers) for reader in range(readers)]
    drawn = {"epoch 0": [], "epoch 1": []}
    for cells in readings:
        for place, cell in cells:
            epoch = place.split(" row")[0]
            if epoch not in drawn:
                break
            drawn[epoch].append(cell["bytes"])
    assert sorted(drawn["epoch 0"]) == sorted(drawn["epoch 1"]) == sorted(rows)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any), st.integers(1, 7))
@settings(max_examples=MORE or 12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_reader_gets_rows_whatever_the_files(counts, readers):
    with tempfile.TemporaryDirectory() as folder:
        pattern, rows = rows_of_files(Path(folder), counts)
        source = open_source(pattern, split="train", column="photo", streaming=True)
        for reader in range(readers):
            cells = [cell["bytes"] for _, cell in itertools.islice(source.cells(1, reader, readers), 2 * len(rows))]
            assert len(cells) == 2 * len(rows)
            assert set(cells) <= set(rows)


def test_data_without_rows_is_refused(tmp_path):
    pattern, _ = rows_of_files(tmp_path, [0, 0])
    with pytest.raises(UserError, match=r"datasets cannot load .*no data"):
        open_source(pattern, split="train", column="photo", streaming=False)
    source = open_source(pattern, split="train", column="photo", streaming=True)
    with pytest.raises(UserError, match="the stream has no rows"):
        next(source.cells(0, 1, 2))


def test_links_are_followed_and_what_editors_leave_is_not_taken(tmp_path, photo):
    below, store = tmp_path / "pictures", tmp_path / "store"
    for path in (below / "a/0.png", store / "deep/1.JFIF", store / "2.jpe", store / "3.avif", store / "4.j2k",
                 below / "a/._0.png", below / ".ipynb_checkpoints/0.png", below / "__MACOSX/0.png"):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        photo().save(path)
    (below / "b").symlink_to(store)
    (below / "a/link.png").symlink_to("../../store/2.jpe")
    (below / "a/gone.png").symlink_to("nowhere.png")
    (below / "a/up").symlink_to("..")  # a cycle
    (store / "note.txt").write_text("no picture")
    source = open_source(str(below), split="train", column=None, streaming=False)
    names = ["a/0.png", "a/link.png", "b/2.jpe", "b/3.avif", "b/4.j2k", "b/deep/1.JFIF"]
    assert [source.name(index) for index in range(len(source))] == names
    assert all(source.open(index).rgb(1)[0].size == (64, 48) for index in range(len(source)))


@pytest.mark.parametrize("suffix", [".eps", ".ps", ".pdf"])
def test_what_is_no_picture_is_not_opened_whatever_it_is_called(tmp_path, photo, suffix, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **options: pytest.fail(f"{command} was started"))
    photo().save(tmp_path / f"x{suffix}")
    (tmp_path / f"x{suffix}").rename(tmp_path / "x.jpg")
    source = open_source(str(tmp_path), split="train", column=None, streaming=False)
    with pytest.raises(OSError, match="cannot identify"):
        source.open(0).rgb(1)
    with pytest.raises(OSError, match="cannot identify"):
        open_cell({"bytes": (tmp_path / "x.jpg").read_bytes()}).rgb(1)


def test_files_of_every_kind_of_data_set(tmp_path, picture_folder):
    paths = sorted(picture_folder.rglob("*.jpg"))
    place = tmp_path / "a [1]"
    place.mkdir()
    with zipfile.ZipFile(place / "pictures.zip", "w") as archive, tarfile.open(place / "pictures.tar", "w") as shards:
        for number, path in enumerate(paths):
            archive.write(path, f"{number}.jpg")
            shards.add(path, f"{number}.jpg")
    cells = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    data = datasets.Dataset.from_dict({"photo": cells}, features=datasets.Features({"photo": datasets.Image()}))
    data.to_parquet(place / "pictures.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    (place / "pictures.arrow").write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    sizes = sorted(Image.open(path).size for path in paths)
    sources = [str(place / f"pictures{kind}") for kind in BUILDERS] + [str(place / "*.parquet"), f"hf:{tmp_path}/saved"]
    for name, streaming in itertools.product(sources, (False, True)):
        source = open_source(name, split="train", column=None, streaming=streaming)
        if streaming:
            opened = [open_cell(cell) for _, cell in itertools.islice(source.cells(0, 0, 1), len(paths))]
        else:
            opened = [source.open(index) for index in range(len(source))]
        assert sorted(picture.rgb(1)[0].size for picture in opened) == sizes, (name, streaming)


def test_lists_of_paths_and_urls(tmp_path, picture_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        "pictures/top/0.jpg",
        "",
        f" {picture_folder}/deep/er/1.png ",
        f"file://{picture_folder}/top/2.webp",
        "gone",
    ]
    (tmp_path / "list.TXT").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    for place in ("list.TXT", f"file://{tmp_path}/list.TXT"):
        source = open_source(place, split="train", column=None, streaming=False)
        assert [source.open(i).rgb(1)[0].size for i in range(3)] == [(60, 40), (59, 41), (58, 42)]
        assert source.name(2) == f"file://{picture_folder}/top/2.webp"
        with pytest.raises(OSError, match="No such file"):
            source.open(3)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"empty.txt names no pictures: it must have a path or URL on each line"):
        open_source("empty.txt", split="train", column=None, streaming=False)
    with pytest.raises(UserError, match=r"cannot read data.source file:///gone.txt: "):
        open_source("file:///gone.txt", split="train", column=None, streaming=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk_and_urls(tmp_path, parquet, streaming):
    rows = datasets.load_dataset("parquet", data_files=parquet, split="train", cache_dir=str(tmp_path / "cache"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "saved"))
    url = f"file://{tmp_path}/part-1.parquet"
    lengths = {}
    for source, split in ((f"{tmp_path}/saved", "train"), (f"{tmp_path}/saved", "test"), (url, "train")):
        opened = open_source(source, split=split, column=None, streaming=streaming)
        if streaming:
            cells = itertools.takewhile(lambda cell: cell[0].startswith("epoch 0"), opened.cells(0, 0, 1))
            lengths[source, split] = len(list(cells))
        else:
            lengths[source, split] = len(opened)
    assert list(lengths.values()) == [10, 1, 5]
    with pytest.raises(UserError, match=r"datasets cannot load .*saved \(split 'val'\)"):
        open_source(f"{tmp_path}/saved", split="val", column=None, streaming=streaming)


def test_a_split_may_have_files_of_its_own(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / split).mkdir()
        rows_of_files(tmp_path / split, [count])
    pattern = f"{tmp_path}/{{split}}/*.parquet"
    assert [len(open_source(pattern, split=split, column="photo", streaming=False)) for split in ("train", "test")] == [
        3,
        2,
    ]
    with pytest.raises(UserError, match=r"no file matches data.source .*/val/\*.parquet"):
        open_source(pattern, split="val", column="photo", streaming=False)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("nowhere", {}, "does not exist: give a folder, .parquet, .arrow, .tar, .zip files, 'photos', or 'hf:NAME'"),
        ("{folder}/README.md", {}, r"README.md is no folder and no data set: give a folder"),
        ("{shards}", {}, r"no pictures below .*: it holds data sets, read by data.source '.*/shards/\*.tar'"),
        ("no-*.parquet", {}, "no file matches"),
        ("{folder}", {}, "no pictures below"),
        ("{parquet}", {"split": "tset"}, "datasets cannot load"),
        ("{parquet}", {"column": "label"}, r"no pictures in column label: set data\.column"),
        ("{parquet}", {"column": "foto"}, r"no pictures in column foto: set data\.column, one of \['label', 'photo'\]"),
    ],
)
def test_sources_that_are_not_there(tmp_path, parquet, source, options, words):
    for name in ("empty", "shards"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty/README.md").write_text("no picture")
    (tmp_path / "shards/0.tar").touch()
    source = source.format(folder=tmp_path / "empty", parquet=parquet, shards=tmp_path / "shards")
    with pytest.raises(UserError, match=words):
        open_source(source, **({"split": "train", "column": None, "streaming": False} | options))


def test_files_come_folder_by_folder(tmp_path):
    """The order is part of what a seed means: as paths compare, a/ before a-b/, and not as their text does."""
    for name in ("a-b/1.jpg", "a/2.jpg", "a/b/3.jpg", "a.jpg", "B/4.JPG", "a/b-c/5.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    source = open_source(str(tmp_path), split="train", column=None, streaming=False)
    expected = ["B/4.JPG", "a/2.jpg", "a/b/3.jpg", "a/b-c/5.jpg", "a-b/1.jpg", "a.jpg"]
    assert [source.name(i) for i in range(len(source))] == expected
