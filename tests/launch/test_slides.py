"""Whole slides by openslide: a tiled pyramid that tifffile wrote, by window, beside its pixels."""

import sys

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from launch.data.images import BadPictureError
from launch.data.reading import open_file, read_pixels
from launch.data.slides import SUFFIXES, SlidePicture
from launch.data.sources import open_source
from launch.data.tiff import TiffPicture
from vim_backbone.images import reason
from vim_backbone.preprocessing import RGB

SHAPE = (1024, 2048)


@pytest.fixture
def colours(photo):
    return np.asarray(photo(64, 64).resize(SHAPE[::-1], Image.Resampling.BICUBIC))


@pytest.fixture
def slide(tmp_path, colours):
    """A name that openslide is asked for; what it is, openslide reads from the content."""
    path = tmp_path / "slides/a.NDPI"
    path.parent.mkdir()
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for step in (1, 2, 4):
            reduced = np.asarray(Image.fromarray(colours).reduce(step))
            file.write(reduced, tile=(64, 64), photometric="rgb", compression="deflate", subfiletype=int(step > 1))
    return (tmp_path / "a.tif").rename(path)


def test_a_slide_is_read_by_window_at_the_level_that_holds_the_detail(slide, colours):
    with open_file(slide) as picture:
        assert isinstance(picture, SlidePicture)
        assert (picture.size, picture.bands, picture.dtype, picture.windowed) == (SHAPE, 3, np.uint8, True)
        part, near = picture.values(1, (100, 200, 150, 260))
        left, top, right, bottom = map(int, near)
        assert np.array_equal(part[:, top:bottom, left:right], np.moveaxis(colours[200:260, 100:150], -1, 0))
        for box, size, scale in (
            ((0, 0, 2048, 1024), (256, 512), 4),
            ((0, 0, 999, 999), (400, 400), 2),
            ((100, 100, 200, 200), (64, 64), 1),
            ((1948, 924, 2048, 1024), (99, 99), 1),
        ):
            part, near = picture.values(9, box, size)
            assert near[2] - near[0] == pytest.approx((box[2] - box[0]) / scale)
            assert part.shape[2] <= (box[2] - box[0]) / scale + 40
            view = read_pixels(picture, RGB, 9, box, size).float()
            want = np.asarray(Image.fromarray(colours).resize(size[::-1], Image.Resampling.BICUBIC, box=box))
            assert np.abs(view.numpy() - np.moveaxis(want, -1, 0)).mean() < 2.5
        with pytest.raises(BadPictureError, match=r"2 megapixels, over max_megapixels 1"):
            picture.values(1)


def test_tifffile_and_openslide_give_the_same_view(slide):
    plain = slide.rename(slide.with_suffix(".tif"))
    slide.write_bytes(plain.read_bytes())
    with open_file(slide) as one, open_file(plain) as other:
        assert isinstance(other, TiffPicture)
        assert len(other.levels) == 3
        a, b = (each.values(9, (300, 100, 1500, 900), (200, 300)) for each in (one, other))
    assert a[1] == b[1] == pytest.approx((8, 8, 308, 208), abs=9)
    assert np.array_equal(a[0], b[0])


def test_what_was_not_scanned_is_background_and_left_out(slide, colours, monkeypatch):
    with open(slide, "r+b") as opened, tifffile.TiffFile(opened, mode="r+b", name="a.tif") as file:
        count = file.pages[0].tags["TileByteCounts"]
        count.overwrite([0, *count.value[1:]])
    with open_file(slide) as picture:
        part = read_pixels(picture, RGB, 9, (0, 0, 128, 64)).numpy()
    assert (part[:, :, :64] == 255).all()
    assert np.array_equal(part[:, :, 64:], np.moveaxis(colours[:64, 64:128], -1, 0))
    plain = openslide.OpenSlide.properties
    bounds = {"bounds-x": "256", "bounds-y": "128", "bounds-width": "512", "bounds-height": "640"}
    more = {f"openslide.{key}": value for key, value in bounds.items()}
    monkeypatch.setattr(openslide.OpenSlide, "properties", property(lambda each: dict(plain.__get__(each)) | more))
    with open_file(slide) as picture:
        assert picture.size == (640, 512)
        part = read_pixels(picture, RGB, 9, (10, 20, 110, 100)).numpy()
        assert np.array_equal(part, np.moveaxis(colours[148:228, 266:366], -1, 0))
        half = read_pixels(picture, RGB, 9, (0, 0, 512, 640), (320, 256)).numpy().astype(int)
        want = np.asarray(Image.fromarray(colours[128:768, 256:768]).reduce(2)).astype(int)
        assert np.abs(half - np.moveaxis(want, -1, 0)).mean() < 1


def test_slides_of_a_folder_are_pictures_and_bad_ones_name_why(slide, tmp_path, monkeypatch):
    assert {".mrxs", ".ndpi", ".scn", ".vms", ".bif"} <= SUFFIXES
    source = open_source(str(slide.parent), split="train", column=None, streaming=False)
    assert [source.name(index) for index in range(len(source))] == ["a.NDPI"]
    broken = tmp_path / "b.mrxs"
    Image.new("RGB", (8, 8)).save(broken, "jpeg")  # as the file beside a folder that is missing
    with pytest.raises(BadPictureError) as error:
        open_file(broken)
    assert reason(error.value) == "it is no .mrxs that openslide reads"
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "absent.scn")
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(BadPictureError) as error:
        open_file(slide)
    assert reason(error.value) == ".NDPI is read by openslide: pip install openslide-python openslide-bin"


def test_a_damaged_tile_is_one_bad_picture(slide):
    with open(slide, "rb") as opened, tifffile.TiffFile(opened, name="a.tif") as file:
        offset = file.pages[0].dataoffsets[5]
    content = bytearray(slide.read_bytes())
    content[offset : offset + 40] = bytes(40)
    slide.write_bytes(content)
    with open_file(slide) as picture, pytest.raises(openslide.OpenSlideError):
        read_pixels(picture, RGB, 9)
