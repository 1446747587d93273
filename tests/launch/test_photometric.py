"""Colours of TIFFs of every photometric interpretation, small as Pillow reads them and large by window."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

import launch.data.tiff
from launch.data.folders import ImageFiles
from launch.data.images import BadPictureError
from launch.data.reading import open_bytes, open_file, read_pixels
from pretrain.bands import gather
from vim_backbone.preprocessing import RGB, Preprocessing

H, W = 48, 64
RAMP = np.tile(np.arange(W, dtype=np.uint8) * 4, (H, 1))
BOX = (8, 16, 40, 48)


@pytest.fixture(params=["whole", "window"])
def way(request, monkeypatch):
    """Read by Pillow where it can, or as a picture too large for that."""
    if request.param == "window":
        monkeypatch.setattr(launch.data.tiff, "WHOLE", 0)
    return request.param


def saved(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def nodata(text):
    return {"extratags": [(42113, "s", 0, text, True)]}


def few_bits(levels, bits, white_is_0=False):
    """A TIFF of 1 to 4 bits by hand: neither library writes them all."""
    fields = np.stack([levels[:, i :: 8 // bits].astype(np.int64) << (8 - bits * (i + 1)) for i in range(8 // bits)])
    data = fields.sum(0).astype(np.uint8).tobytes()
    entries = [(256, 4, W), (257, 4, H), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_0 else 1), (273, 4, 8),
               (277, 3, 1), (278, 4, H), (279, 4, len(data))]  # fmt: skip
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries))
    return head + b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)


def palette():
    colours = np.stack([np.arange(256), 255 - np.arange(256), np.full(256, 70)])
    return colours, saved(RAMP, photometric="palette", colormap=(colours * 257).astype(np.uint16), **nodata("0"))


def over_white(colours, alpha):
    return (colours.astype(float) * alpha + 255.0 * (255 - alpha)) / 255


def flat(*samples):
    return np.full((H, W, len(samples)), samples, np.uint8)


def one_colour(*rgb):
    return np.full((3, H, W), 0) + np.array(rgb)[:, None, None]


CASES = {
    "white is 0": (saved(RAMP, photometric="miniswhite"), 255 - RAMP),
    "white is 0, 16 bits": (saved(RAMP.astype(np.uint16) * 257, photometric="miniswhite"), 255 - RAMP),
    "white is 0, 1 bit": (few_bits(RAMP >> 7, 1, white_is_0=True), 255 * (RAMP < 128)),
    "1 bit": (few_bits(RAMP >> 7, 1), 255 * (RAMP >= 128)),
    "2 bits": (few_bits(RAMP >> 6, 2), (RAMP >> 6) * 85),
    "4 bits": (few_bits(RAMP >> 4, 4), (RAMP >> 4) * 17),
    "4 bits, white is 0": (few_bits(RAMP >> 4, 4, white_is_0=True), (15 - (RAMP >> 4)) * 17),
    "a map of colours, nodata": (palette()[1], palette()[0][:, RAMP]),
    "YCbCr": (saved(flat(76, 85, 255), photometric="ycbcr"), one_colour(254, 0, 0)),
    "CMYK": (saved(flat(0, 255, 0, 0), photometric="separated"), one_colour(255, 0, 255)),
    "alpha": (saved(flat(200, 100, 0, 51), photometric="rgb", extrasamples=["unassalpha"]), one_colour(244, 224, 204)),
    "alpha, nodata": (
        saved(flat(200, 100, 0, 51), photometric="rgb", extrasamples=["unassalpha"], **nodata("255")),
        one_colour(244, 224, 204),
    ),
    "associated alpha": (
        saved(flat(40, 20, 0, 51), photometric="rgb", extrasamples=["assocalpha"]), one_colour(244, 224, 204)
    ),
    "grey and alpha": (
        saved(np.stack([RAMP, np.full_like(RAMP, 100)], -1), photometric="minisblack", extrasamples=["unassalpha"],
              planarconfig="contig"),
        over_white(RAMP, 100),
    ),
    "alpha, 16 bits": (
        saved(flat(200, 100, 0, 51).astype(np.uint16) * 257, photometric="rgb", extrasamples=["unassalpha"]),
        one_colour(244, 224, 204),
    ),
    "32 bits": (saved(RAMP.astype(np.uint32) * 16843009, photometric="minisblack"), RAMP / 252 * 255),
    "signed 8 bits": (saved((RAMP.astype(int) - 128).astype(np.int8), photometric="minisblack"), RAMP / 252 * 255),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_colours_are_those_that_were_written(case, way):
    content, want = CASES[case]
    want = np.broadcast_to(want, (3, H, W))
    with open_bytes(content) as picture:
        assert np.abs(read_pixels(picture, RGB, 1).numpy() - want).max() <= 1.01
        left, top, right, bottom = BOX
        part = read_pixels(picture, RGB, 1, BOX).numpy()
        assert np.abs(part - want[:, top:bottom, left:right]).max() <= 1.01
        assert picture.windowed == (case != "YCbCr"), "by window a picture may be larger than memory"


def test_colours_that_are_not_read_are_named(way):
    for photometric in ("cielab", "icclab"):
        content = saved(flat(128, 128, 128), photometric=photometric)
        with pytest.raises(BadPictureError, match=f"its colours are {photometric.upper()}, which are not read"):
            read_pixels(open_bytes(content), RGB, 1)
    floats = saved(RAMP.astype(np.float32), photometric="miniswhite")
    with pytest.raises(BadPictureError, match="white as 0, and values of float32"):
        read_pixels(open_bytes(floats), RGB, 1)


@pytest.mark.parametrize("case", ["white is 0", "4 bits", "a map of colours, nodata", "YCbCr"])
def test_statistics_are_of_the_colours_that_a_run_reads(case, tmp_path):
    content, want = CASES[case]
    (tmp_path / "picture.tif").write_bytes(content)
    measured, _ = gather(ImageFiles([tmp_path / "picture.tif"]), 1, 0, None, None, 1)
    assert measured.bands is None
    assert measured.mean == pytest.approx(np.broadcast_to(want, (3, H, W)).mean((1, 2)), abs=0.5)


def test_nodata_of_white_as_0_and_of_few_bits(way):
    inverse = saved(RAMP, photometric="miniswhite", **nodata("0"))
    for content in (inverse, saved(RAMP, photometric="minisblack", **nodata("0"))):
        pixels = read_pixels(open_bytes(content), RGB, 1).numpy()
        assert (pixels[:, :, 0] == np.array([[124], [116], [104]])).all()
        assert (pixels[0] == pixels[1])[:, 1:].all()


def test_16_bit_png_with_transparency_over_a_range():
    imagecodecs = pytest.importorskip("imagecodecs", reason="writes and reads PNG of 16-bit colours")
    for samples in (2, 4):
        values = np.full((20, 30, samples), 2000, np.uint16)
        values[..., -1] = 13107  # a fifth
        content = imagecodecs.png_encode(values)
        with open_bytes(content) as picture:
            assert picture.bands == samples
            assert np.array_equal(picture.values(1)[0], np.moveaxis(values, -1, 0))
            pixels = read_pixels(picture, Preprocessing(range=((0.0,), (4000.0,))), 1).numpy()
        assert np.abs(pixels - (127.5 / 5 + 255 * 4 / 5)).max() <= 1


@pytest.mark.parametrize("value", range(1, 9))
def test_16_bit_png_is_turned_upright(value, tmp_path, photo):
    imagecodecs = pytest.importorskip("imagecodecs", reason="reads PNG of 16-bit colours")
    colours = np.asarray(photo(20, 30))
    content = imagecodecs.png_encode(colours.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = value
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    content = content[:33] + chunk + content[33:]
    want = read_pixels(open_bytes(content), RGB, 1).numpy()  # by Pillow
    bands = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, bands=(0, 1, 2), dtype="uint16")
    with open_bytes(content) as picture:
        assert picture.size == want.shape[1:]
        assert np.array_equal(read_pixels(picture, bands, 1).numpy() // 257, want)


@pytest.mark.parametrize("text", ["-3.40282346638529e+38", "0.1", "-3.4028234663852886e+38"])
def test_nodata_of_floats_is_rounded_as_the_values_are(text):
    values = np.linspace(0.2, 0.9, H * W, dtype=np.float32).reshape(1, H, W)
    values[0, :5] = np.float32(float(text))
    settings = Preprocessing(
        mean=(0.5,), std=(0.25,), bands=(0,), dtype="float32", range=((0.0,), (1.0,)), nodata=float(text)
    )
    for content in (saved(values, **nodata(text)), saved(values)):
        pixels = read_pixels(open_bytes(content), settings, 1).numpy()
        assert (pixels[0, :5] == 0.5).all()
        assert np.array_equal(pixels[0, 5:], values[0, 5:])


def test_of_a_strip_that_is_all_of_a_picture_a_crop_maps_its_part(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "one.tif", values, photometric="rgb", byteorder=">")
    tifffile.imwrite(tmp_path / "packed.tif", values, photometric="rgb", rowsperstrip=700, compression="zlib")
    monkeypatch.setattr(launch.data.tiff, "WHOLE", 0)
    with open_file(tmp_path / "one.tif") as picture:
        with monkeypatch.context() as patch:
            patch.setattr(tifffile.FileHandle, "read", lambda *_: pytest.fail("the strip is read"))
            part = read_pixels(picture, RGB, 0.1, (200, 300, 400, 500)).numpy()
        assert np.array_equal(part, np.moveaxis(values[300:500, 200:400], -1, 0))
    with open_file(tmp_path / "packed.tif") as picture, pytest.raises(BadPictureError, match="over max_megapixels"):
        read_pixels(picture, RGB, 0.1, (200, 300, 400, 500))
    cut = (tmp_path / "one.tif").read_bytes()[:-5000]
    (tmp_path / "cut.tif").write_bytes(cut)
    with open_file(tmp_path / "cut.tif") as picture, pytest.raises(BadPictureError, match="truncated"):
        read_pixels(picture, RGB, 1, (200, 300, 400, 500))
