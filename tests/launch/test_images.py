"""Every kind of picture becomes RGB or is refused by name; every kind of source hands its pictures out."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from launch.data.images import BadPictureError, to_rgb
from launch.data.sources import ImageFiles, StreamCells, open_cell, open_source, photograph_paths
from vim_backbone import UserError


def opened(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return Image.open(buffer)


def rgb(image):
    result = to_rgb(image, 100)
    assert result.mode == "RGB"
    return np.asarray(result).astype(int)


def test_grey_16_bit_and_float():
    levels = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    want = np.round(levels / 257.0)
    for kind in ("png", "tiff"):
        assert np.abs(rgb(opened(Image.fromarray(levels), kind))[..., 1] - want).max() <= 1
    dark = np.full((4, 4), 200, np.uint16)  # dark for 16 bits, and not bright for 8
    assert rgb(opened(Image.fromarray(dark))).max() == 1
    grey = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    assert np.array_equal(rgb(opened(grey))[..., 2], np.arange(48).reshape(6, 8))
    unit = Image.fromarray(np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8))
    assert rgb(opened(unit, "tiff")).max() == 255


def test_cmyk_palette_and_transparency(photo):
    cmyk = rgb(opened(photo().convert("CMYK"), "jpeg", quality=95))
    assert np.abs(cmyk - np.asarray(photo())).mean() < 12
    palette = rgb(opened(photo().convert("P")))
    assert np.abs(palette - np.asarray(photo())).mean() < 40
    clear = photo().convert("RGBA")
    clear.putalpha(0)
    assert (rgb(opened(clear)) == 255).all()  # white, not the pixels that hide behind full transparency


def test_first_frame_of_an_animation(photo):
    frames = [photo(shift=s) for s in range(3)]
    animated = opened(frames[0], "webp", save_all=True, append_images=frames[1:], lossless=True)
    assert animated.n_frames == 3
    assert np.array_equal(rgb(animated), np.asarray(frames[0]))


def test_camera_orientation(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned = rgb(opened(photo(), "png", exif=exif))
    assert np.array_equal(turned, np.rot90(np.asarray(photo()), -1))


def test_too_large_is_refused_before_it_is_decoded():
    with pytest.raises(BadPictureError, match=r"4 megapixels, over data\.max_megapixels 1"):
        to_rgb(opened(Image.new("1", (2000, 2000))), 1)


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
    taken = [
        {cell["bytes"] for _, (_, cell) in zip(range(5), source.cells(1, rank, world=2), strict=False)}
        for rank in (0, 1)
    ]
    assert not taken[0] & taken[1]
    assert len(taken[0] | taken[1]) == 10


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
