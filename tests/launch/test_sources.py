"""Every kind of source hands its pictures out, undecoded."""

import datasets
import pytest

from launch.data.images import BadPictureError, to_rgb
from launch.data.sources import ImageFiles, StreamCells, open_cell, open_source, photograph_paths
from vim_backbone import UserError


def test_photographs_come_with_the_packages():
    source = open_source("photos", split="train", column=None, streaming=False)
    assert len(source) == len(photograph_paths()) == 12
    sizes = {source.name(i): to_rgb(source.open(i), 100).size for i in range(len(source))}
    assert sizes["astronaut.png"] == (512, 512)
    assert sizes["china.jpg"] == (640, 427)


def test_folder_of_any_depth(picture_folder):
    source = open_source(str(picture_folder), split="train", column=None, streaming=False)
    assert len(source) == 10
    assert source.name(0) == "deep/er/1.png"
    assert {source.name(i) for i in range(10)} >= {"top/0.jpg", "top/2.webp"}


@pytest.fixture
def parquet(tmp_path, picture_folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    paths = ImageFiles(sorted(picture_folder.rglob("*.*"))).paths
    cells = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    for part in range(2):
        rows = {"label": [0] * 5, "photo": cells[part * 5 : part * 5 + 5]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"part-{part}.parquet")
    return str(tmp_path / "part-*.parquet")


def test_parquet_files(parquet):
    source = open_source(parquet, split="train", column=None, streaming=False)
    assert len(source) == 10
    assert to_rgb(source.open(3), 100).size[0] > 40


def test_stream_covers_an_epoch_in_an_order_that_its_seed_decides(parquet):
    source = open_source(parquet, split="train", column="photo", streaming=True)
    assert isinstance(source, StreamCells)

    def first(count, seed):
        cells = source.cells(seed, rank=0, world=1)
        return [cell["bytes"] for _, (_, cell) in zip(range(count), cells, strict=False)]

    assert len(set(first(10, seed=1))) == 10
    assert first(25, seed=1) == first(25, seed=1)
    assert first(10, seed=1) != first(10, seed=2)
    with pytest.raises(BadPictureError, match="empty"):
        open_cell({"bytes": None, "path": None})


def test_ranks_share_a_stream(parquet):
    source = open_source(parquet, split="train", column="photo", streaming=True)
    columns = [
        {cell["bytes"] for _, (_, cell) in zip(range(5), source.cells(1, rank, world=2), strict=False)}
        for rank in (0, 1)
    ]
    assert not columns[0] & columns[1]
    assert len(columns[0] | columns[1]) == 10


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("nowhere", {}, "does not exist: give a folder, parquet files, 'photos', or 'hf:NAME'"),
        ("no-*.parquet", {}, "no file matches"),
        ("{folder}", {}, "no pictures below"),
        ("{parquet}", {"split": "tset"}, "datasets cannot load"),
        ("{parquet}", {"column": "foto"}, r"no image column foto: set data\.column, one of \['label', 'photo'\]"),
    ],
)
def test_sources_that_are_not_there(tmp_path, parquet, source, options, words):
    (tmp_path / "empty").mkdir()
    source = source.format(folder=tmp_path / "empty", parquet=parquet)
    with pytest.raises(UserError, match=words):
        open_source(source, **({"split": "train", "column": None, "streaming": False} | options))
