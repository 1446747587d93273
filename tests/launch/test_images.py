"""Every kind of picture becomes RGB or is refused by name; every kind of source hands its pictures out."""

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from launch.data.images import ORIENTATION, BadPictureError, open_picture, to_rgb, upright_size
from vim_backbone.images import reason

MORE = int(os.environ.get("FUZZ", "0"))
"""Examples of each fuzzer, in place of a number for CI."""


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


def spread(shape=(40, 50)):
    """Floats from 0 to 1, and the 8-bit levels that these are."""
    values = np.linspace(0, 1, shape[0] * shape[1]).reshape(shape).astype(np.float32)
    return values, values * 255


@given(
    st.sampled_from([1.0, 255.0, 65535.0, 3.0, 4095.0, 1e-4, 1e9, 1e37]),
    st.sampled_from([0.0, -0.5, -1.0, -30.0]),
    st.lists(st.tuples(st.integers(0, 1999), st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38])), max_size=2),
)
@settings(max_examples=MORE or 60)
def test_floats_keep_their_contrast_whatever_their_range_and_strays(scale, offset, strays):
    values, want = spread()
    pixels = ((values + np.float32(offset)) * np.float32(scale)).ravel()
    for index, stray in strays:
        pixels[index] = stray
    got = rgb(opened(Image.fromarray(pixels.reshape(values.shape)), "tiff"))[..., 0]
    kept = np.ones(pixels.size, bool)
    kept[[index for index, _ in strays]] = False
    assert np.abs(got - want).ravel()[kept].max() <= 3


def test_floats_at_the_edge_of_a_range():
    values, want = spread()
    for top in (1.0001, 254.0, 255.9):  # within a hundredth of a range is in it
        got = rgb(opened(Image.fromarray(values * np.float32(top)), "tiff"))[..., 0]
        assert np.abs(got - want * top / (255 if top > 2 else 1)).max() <= 1.5
    dim = rgb(opened(Image.fromarray(values * np.float32(0.1)), "tiff"))[..., 0]
    assert np.abs(dim - want * 0.1).max() <= 1  # dark, as it is meant
    integers = (values * 4095 - 2000).astype(np.int32)
    assert np.abs(rgb(opened(Image.fromarray(integers), "tiff"))[..., 0] - want).max() <= 1
    assert (rgb(opened(Image.fromarray(values * 0), "tiff")) == 0).all()
    assert (rgb(opened(Image.fromarray(values * 0 - 7), "tiff")) == 128).all()  # black would be wrong
    for single in (0.5, 1.0):
        got = rgb(opened(Image.fromarray(np.full((1, 1), single, np.float32)), "tiff"))
        assert (got == round(single * 255)).all()
    with pytest.raises(BadPictureError, match="no pixel of it is a number"):
        to_rgb(opened(Image.fromarray(values * np.nan), "tiff"), 1)


def test_large_pictures_take_little_more_than_themselves(tmp_path):
    """Peak memory of another process, in bytes a pixel: Pillow holds 4 of floats and of colours."""
    side = 5000
    Image.fromarray(np.zeros((side, side), np.float32)).save(tmp_path / "float.tif")
    Image.new("RGB", (side, side)).save(tmp_path / "rgb.tif")
    Image.new("RGBA", (side, side)).save(tmp_path / "rgba.tif")
    code = (
        "import resource, sys; from launch.data.images import open_picture, to_rgb\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); to_rgb(open_picture(sys.argv[1]), 100); print(peak() - before)"
    )
    for name, most in (("float.tif", 12), ("rgb.tif", 6), ("rgba.tif", 11)):
        result = subprocess.run([sys.executable, "-c", code, tmp_path / name], capture_output=True, check=True)
        assert int(result.stdout) / side**2 < most, name


def test_transparent_level_of_16_bit_grey():
    levels = np.array([[0, 1000], [1000, 65535]], np.uint16)
    picture = opened(Image.fromarray(levels), "png", transparency=1000)
    assert picture.mode.startswith("I;16")
    assert rgb(picture)[..., 0].tolist() == [[0, 255], [255, 255]]


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


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
def test_camera_orientation(photo, kind, value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    picture = opened(photo(), kind, exif=exif)
    want = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    assert upright_size(picture) == want.shape[1::-1]
    assert np.array_equal(rgb(picture), want)


@pytest.mark.parametrize(("kind", "value"), [(2, b"6\0\0\0"), (3, b"\0\0\0\0"), (3, b"\0\x09\0\0"), (4, b"\xff" * 4)])
def test_orientation_that_means_nothing(photo, kind, value):
    """Text, and numbers that are none of the eight."""
    count = 2 if kind == 2 else 1
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI", ORIENTATION, kind, count) + value + b"\0" * 4
    assert np.array_equal(rgb(opened(photo(), "png", exif=exif)), np.asarray(photo()))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_reject_no_picture(photo):
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0junk" * 9):
        assert np.array_equal(rgb(opened(photo(), "png", exif=exif)), np.asarray(photo()))


def test_too_large_is_refused_before_it_is_decoded():
    with pytest.raises(BadPictureError, match=r"4 megapixels, over max_megapixels 1"):
        to_rgb(opened(Image.new("1", (2000, 2000))), 1)


def encoded(kind, mode):
    """A small picture as the bytes of a file."""
    y, x = np.mgrid[:24, :32]
    ramp = Image.fromarray((x * 8).astype(np.uint8))
    image = Image.merge("RGB", [ramp, ramp, Image.fromarray((y * 10).astype(np.uint8))]).convert(mode)
    if mode == "I;16":  # over the whole range, as the reader takes it
        image = Image.fromarray(np.asarray(image) * 257)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


GOOD = [
    encoded(kind, mode)
    for kind, modes in {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "P", "1", "I;16"), "WEBP": ("RGB",),
                        "TIFF": ("RGB", "F", "I", "LA"), "GIF": ("P",), "BMP": ("RGB",), "PPM": ("RGB",),
                        "JPEG2000": ("RGB",), "AVIF": ("RGB",), "QOI": ("RGB",)}.items()
    for mode in modes
]  # fmt: skip


@given(
    st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), max_size=8), st.floats(0, 1)
)
@settings(max_examples=MORE or 200)
@pytest.mark.filterwarnings("ignore")  # Pillow's on damaged metadata
def test_damaged_files_are_pictures_or_refused_on_one_line(content, changes, kept):
    damaged = bytearray(content)
    for place, value in changes:
        damaged[min(place, place % len(damaged))] = value
    damaged = bytes(damaged[: len(damaged) - int((1 - kept) * len(damaged)) if kept < 0.5 else None])
    try:
        picture = to_rgb(open_picture(io.BytesIO(damaged)), 0.1)
    except Exception as error:  # as the readers take it
        line = reason(error)
        assert line
        assert len(line.splitlines()) == 1
    else:
        assert picture.mode == "RGB"
        assert picture.width * picture.height <= 100_000
        assert np.asarray(picture).dtype == np.uint8
    if not changes and kept >= 0.5:
        assert np.asarray(picture).std() > 20, "a whole one is a picture, and not black"
