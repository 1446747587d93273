"""What the samples of a TIFF mean: grey from black or from white, colours of a map, of YCbCr, with opacity."""

from typing import Any, Literal

import numpy as np
from PIL import Image

SAMPLES = {"MINISBLACK": (1,), "MINISWHITE": (1,), "RGB": (3,), "PALETTE": (1,), "SEPARATED": (4,), "YCBCR": (3,)}
"""Kinds of colours that are read, and their samples without transparency."""
DECODED = (6, 7, 33003, 33005, 34712)
"""Compressions (JPEG and JPEG 2000) of which YCbCr is decoded to RGB."""


def kind(page: Any) -> str:
    """Name of the photometric interpretation (TIFF 6.0), in capitals; its number where it has none."""
    return str(getattr(page.photometric, "name", page.photometric))


def is_colour(page: Any) -> bool:
    """Whether the samples are those of a colour, perhaps with transparency."""
    samples, extra = SAMPLES.get(kind(page), ()), len(page.extrasamples)
    return page.samplesperpixel - extra in samples and (extra == 0 or opacity(page) is not None)


def opacity(page: Any) -> Literal["straight", "associated"] | None:
    """What the last sample is to grey, or to red, green and blue, where it is their opacity alone."""
    extra = [getattr(value, "value", value) for value in page.extrasamples]
    if kind(page) not in ("MINISBLACK", "RGB") or page.samplesperpixel not in (2, 4) or extra not in ([1], [2]):
        return None
    return "associated" if extra == [1] else "straight"


def raw_ycbcr(page: Any) -> bool:
    """Whether the samples are brightness and colour differences, as they are decoded."""
    return kind(page) == "YCBCR" and int(page.compression) not in DECODED


def inverted(page: Any) -> bool:
    """Whether 0 is white."""
    return kind(page) == "MINISWHITE" and page.samplesperpixel == 1 and page.dtype.kind in "bu"


def steps(page: Any) -> int:
    """How far apart the levels of grey of 2 to 7 bits lie once they are spread over 8."""
    bits = page.bitspersample
    grey = kind(page) in ("MINISBLACK", "MINISWHITE") and isinstance(bits, int) and page.dtype == np.uint8
    return 255 // (2**bits - 1) if grey and 1 < bits < 8 else 1


def plain(values: np.ndarray, page: Any) -> np.ndarray:
    """The samples (bands, h, w) of a picture of one page, as other formats have them: 0 is black, colours are RGB."""
    if kind(page) == "PALETTE" and len(values) == 1 and page.colormap is not None:
        return (page.colormap >> 8).astype(np.uint8)[:, values[0]]
    if raw_ycbcr(page) and len(values) == 3 and values.dtype == np.uint8:
        image = Image.fromarray(np.ascontiguousarray(np.moveaxis(values, 0, -1)), "YCbCr")
        return np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    return plain_levels(values, page) if steps(page) > 1 or inverted(page) else values


def plain_levels(values: np.ndarray, page: Any) -> np.ndarray:
    """Levels of grey, spread and from black to white."""
    values = values * np.uint8(steps(page)) if steps(page) > 1 else values
    if not inverted(page):
        return values
    return ~values  # of unsigned numbers the highest less each


def cmyk_to_rgb(values: np.ndarray) -> Image.Image:
    """Cyan, magenta, yellow and black (4, h, w) of 8 bits, as Pillow makes them RGB."""
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(values, 0, -1)), "CMYK").convert("RGB")
