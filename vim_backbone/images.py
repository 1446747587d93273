"""Any picture becomes 8-bit RGB, or is refused with the reason."""

from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from vim_backbone.errors import escaped, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "TIFF", "GIF", "BMP", "DIB", "PPM", "QOI")
"""What is opened, whatever a file is called: nothing that starts another program, as EPS does."""
ORIENTATION = 0x0112
TURNS = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)
"""Orientation (Exif 2.32, 4.6.4) -> what makes a picture upright."""
RANGES = (1.0, 255.0, 65535.0)
"""Highest values of pictures whose type names none, from 0."""
STRIP = 1 << 22
"""Pixels that are converted at a time, to bound memory."""


class BadPictureError(Exception):
    """One picture that cannot be used; the message says why."""


@cache
def suffixes() -> frozenset[str]:
    """Ends of the names of FORMATS, in lower case; the first call imports all of Pillow's formats."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def reason(error: BaseException) -> str:
    """Why a picture cannot be used, on one line."""
    text = escaped(first_line(error))
    return "no picture format that can be read, or an empty file" if "cannot identify image file" in text else text


def open_picture(file: str | Path | IO[bytes]) -> Image.Image:
    """A picture of one of FORMATS, opened but not decoded. Raises OSError for anything else."""
    return Image.open(file, formats=FORMATS)


def to_rgb(image: Image.Image, max_megapixels: float, span: tuple[float, float] | None = None) -> Image.Image:
    """Any picture as 8-bit RGB: first frame, upright, more than 8 bits scaled down, transparency over white.

    `span` are the values of more than 8 bits that become black and white; None for those of their type or `range_of`.

    Raises BadPictureError for one that is too large or without a number in it, and PIL's errors for one that is
    damaged.
    """
    check_size(image, max_megapixels)
    image.seek(0)
    image.load()
    image = upright(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image, span)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def check_size(image: Image.Image, max_megapixels: float) -> None:
    """Raise BadPictureError for a picture of more than `max_megapixels`, before it is decoded."""
    check_megapixels(image.height, image.width, max_megapixels)


def check_megapixels(height: int, width: int, max_megapixels: float) -> None:
    """Raise BadPictureError where so many pixels are over `max_megapixels` millions."""
    megapixels = width * height / 1e6
    if megapixels > max_megapixels:
        raise BadPictureError(f"{megapixels:.0f} megapixels, over max_megapixels {max_megapixels:g}")


def orientation(image: Image.Image) -> int:
    """How the camera was held, 1 .. 8; 1, upright, where the picture says nothing that can be understood."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata of a picture that may be good
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """The picture as it is to be looked at; its metadata are left alone, because not all can be written again."""
    turn = TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = image.info
    return turned


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """Bands (bands, h, w) as stored, upright: what TURNS does to a picture."""
    if orientation >= 5:
        values = values.swapaxes(1, 2)
    return values[:, :: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the upright picture, without decoding it."""
    return (image.height, image.width) if orientation(image) >= 5 else image.size


def _to_8_bit(image: Image.Image, span: tuple[float, float] | None) -> Image.Image:
    """Grey levels of more than 8 bits to 8, in strips; of 16-bit ones, a level that is transparent becomes white."""
    span = span or ((0.0, 65535.0) if image.mode.startswith("I;16") else value_range(image))
    clear: Any = image.info.get("transparency")
    grey = Image.new("L", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        (strip,) = levels(values[None], span)
        if isinstance(clear, int):
            strip[values == clear] = 255
        grey.paste(Image.fromarray(strip), (0, top))
    return grey


def levels(bands: np.ndarray, span: tuple[float, float]) -> list[np.ndarray]:
    """Bands (bands, h, w) as levels 0 .. 255, an array (h, w) each; what is no number becomes black."""
    low, high = span
    planes = []
    for values in bands:
        finite = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
        planes.append(((finite.clip(low, high) - low) * (255.0 / (high - low))).round().astype(np.uint8))
    return planes


def value_range(image: Image.Image) -> tuple[float, float]:
    """The values of black and white in a picture of floats or 32-bit integers, whose type names no range."""
    step = max(1, image.height * image.width // STRIP)  # of a large picture so many rows are looked at
    lines = [np.asarray(image.crop((0, y, image.width, y + 1))) for y in range(0, image.height, step)]
    return range_of(np.concatenate(lines))


def range_of(values: np.ndarray) -> tuple[float, float]:
    """The values of black and white among values of any shape.

    It is 0 .. 1, 0 .. 255 or 0 .. 65535, whichever first holds all but a thousandth of the pixels. Where there are
    negative values, or none as high as a sixteenth of the range, it is that of the pixels but a thousandth at either
    end. NaN and infinity count for nothing. Raises BadPictureError where there is nothing else.
    """
    values = values.astype(np.float64).ravel()
    values = np.sort(values[np.isfinite(values)])
    if not len(values):
        raise BadPictureError("no pixel of it is a number")
    few = max(1, len(values) // 1000) if len(values) > 2 else 0
    low, high = float(values[few]), float(values[len(values) - 1 - few])
    if low == high:
        low, high = float(values[0]), float(values[-1])
    top = next((t for t in RANGES if high <= 1.01 * t), None)
    if top is not None and low >= -0.01 * top and (high >= top / 16 or low == high):
        return 0.0, top
    return (low, high) if low < high else (low - 1.0, high + 1.0)
