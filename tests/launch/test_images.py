"""Every kind of picture becomes RGB or is refused by name; every kind of source hands its pictures out."""

import io

import numpy as np
import pytest
from PIL import Image

from launch.data.images import BadPictureError, to_rgb


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
