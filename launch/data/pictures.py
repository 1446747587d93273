"""An opened picture of any format: its size, bands and type, and the part of it that a view needs."""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import numpy as np
from PIL import Image, ImageFile

from launch.data.images import (
    STRIP,
    BadPictureError,
    check_megapixels,
    levels,
    orientation,
    range_of,
    to_rgb,
    turned,
    upright,
    upright_size,
)
from vim_backbone.preprocessing import is_nodata, type_range

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge, in pixels."""
MEAN_COLOUR = (124, 116, 104)
"""ImageNet's, which pixels that hold nothing get in RGB."""
DARK = 1 / 16
"""Share of its range that a picture of 16 bits must reach for its type's range to be meant, as 12 bits in 16 do not."""
WINDOW = 256
"""Side of the windows in which a large picture is sampled."""
ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class Picture(ABC):
    """One picture, opened but not decoded."""

    size: tuple[int, int]
    """Height and width, upright."""
    bands: int
    dtype: np.dtype
    """Type of the file's values."""
    nodata: float | None = None
    """What the file says that pixels without a value have."""
    windowed: bool = False
    """Whether a box of it is read without the rest."""
    alpha: Literal["straight", "associated"] | None = None
    """What the last band is to the others, where it is their opacity; associated: they are multiplied with it."""

    @abstractmethod
    def values(
        self, max_megapixels: float, box: Box | None = None, size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, Box]:
        """The pixels around a box of the picture, in the file's type.

        Args:
            max_megapixels: most pixels that are decoded, in millions.
            box: in pixels of the picture; all of it when None.
            size: height and width that the box is wanted in: a scale at which the file holds it in full detail may be
                read in place of the full one.

        Returns:
            (bands, h, w), and where the box lies in them.

        Raises:
            BadPictureError: too large; any other error: damaged.
        """

    def rgb(
        self,
        max_megapixels: float,
        box: Box | None = None,
        size: tuple[int, int] | None = None,
        span: "Span" = None,
        nodata: float | None = None,
    ) -> tuple[Image.Image, Box]:
        """As `values`, in 8-bit RGB.

        Args:
            span: lowest and highest of values of more than 8 bits; "type" for those of their type, None for the same
                where the picture reaches into them.
            nodata: value of pixels that hold nothing, beside the file's own.

        Raises:
            BadPictureError: it has other bands than a colour has, or would be black.
        """
        self.require_colours()
        values, near = self.values(max_megapixels, box, size)
        if values.dtype != np.uint8 and not isinstance(span, tuple):
            # of the whole picture, or each crop would have a contrast of its own
            sample, _ = self.split(self.sample(max_megapixels))
            span = value_span(sample[:, ~self.missing(sample, nodata)], span)
        height, width = values.shape[1:]
        pixels = np.empty((height, width, 3), np.uint8)
        rows = max(1, STRIP // width)  # at a time, to bound memory
        for top in range(0, height, rows):
            pixels[top : top + rows] = self._eight_bits(values[:, top : top + rows], span, nodata)
        return Image.fromarray(pixels), near

    def _eight_bits(self, values: np.ndarray, span: "Span", nodata: float | None) -> np.ndarray:
        """Values (bands, h, w) as RGB (h, w, 3)."""
        values, opacity = self.split(values)
        missing = self.missing(values, nodata)
        if isinstance(span, tuple) and values.dtype != np.uint8:
            values = np.stack(levels(values, span))
        if opacity is not None and opacity.min() < 1:  # over white
            values = (255 - (255 - values.astype(np.float32)) * opacity).round().astype(np.uint8)
        pixels = np.moveaxis(values if len(values) == 3 else np.repeat(values, 3, 0), 0, -1)
        return pixels if not missing.any() else np.where(missing[..., None], np.array(MEAN_COLOUR, np.uint8), pixels)

    def split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Values (bands, ...) as those of the colours, not multiplied with it, and their opacity in [0, 1], if any."""
        if self.alpha is None:
            return values, None
        top = type_range(str(self.dtype))[1]
        opacity = (values[-1] / top).clip(0, 1).astype(np.float32)
        if self.alpha == "straight":
            return values[:-1], opacity
        colours = (values[:-1] / np.where(opacity > 0, opacity, 1)).clip(0, top)
        return (colours if self.dtype.kind == "f" else colours.round()).astype(self.dtype), opacity

    def missing(self, values: np.ndarray, nodata: float | None) -> np.ndarray:
        """Which pixels of values (bands, ...) hold nothing in any band, by the file or by `nodata`."""
        missing = np.zeros(values.shape[1:], bool)
        for nothing in (nodata, self.nodata):
            if nothing is not None:
                missing |= is_nodata(values, nothing).all(0) if np.isfinite(nothing) else ~np.isfinite(values).all(0)
        return missing

    def sample(self, max_megapixels: float) -> np.ndarray:
        """Values (bands, n) of all the picture: every one of a small picture, of a large one those of 16 windows."""
        height, width = self.size
        if height * width <= 16 * WINDOW**2:
            return self.values(max_megapixels)[0].reshape(self.bands, -1)
        parts = []
        for y in np.linspace(0, max(0, height - WINDOW), 4).astype(int).tolist():
            for x in np.linspace(0, max(0, width - WINDOW), 4).astype(int).tolist():
                box = (x, y, min(x + WINDOW, width), min(y + WINDOW, height))
                values, near = self.values(max_megapixels, box)
                left, top, right, bottom = (round(edge) for edge in near)
                parts.append(values[:, top:bottom, left:right].reshape(self.bands, -1))
        return np.concatenate(parts, axis=1)

    def require_colours(self) -> None:
        """Raise BadPictureError for bands that RGB would drop."""
        if self.bands - (self.alpha is not None) not in (1, 3):
            raise BadPictureError(
                f"it holds {self.words}, and RGB takes 1 or 3: choose with data.statistics (see python -m "
                "pretrain.bands) and data.bands"
            )

    @property
    def words(self) -> str:
        """What it holds."""
        return f"{self.bands} band{'s' * (self.bands != 1)} of {self.dtype}"

    def close(self) -> None:  # noqa: B027 - an array has nothing to close
        """Close its file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


Span = tuple[float, float] | str | None
"""Lowest and highest value that is meant, "type", or None where the picture is to say."""


def value_span(values: np.ndarray, span: str | None) -> tuple[float, float]:
    """The values that become 0 and 255, where no numbers are given: see `Span`.

    Raises BadPictureError for 16-bit values that would be black.
    """
    if values.dtype == np.bool_:
        return 0.0, 1.0
    if values.dtype != np.uint16:
        if span == "type" and values.dtype.kind in "iu":
            return float(np.iinfo(values.dtype).min), float(np.iinfo(values.dtype).max)
        return range_of(values)
    if span is None:
        refuse_dark(values, 65535)
    return 0.0, 65535.0


def refuse_dark(values: np.ndarray, top: int) -> None:
    """Raise BadPictureError where all values but a thousandth lie in the lowest sixteenth of 16 bits, 0 to `top`."""
    if not values.size:
        return
    place = values.size - 1 - values.size // 1000
    high = int(np.partition(values, place, axis=None)[place])
    if 0 < high < top * DARK:
        share = f"{100 * high / top:.2g} %"
        raise BadPictureError(
            f"its 16-bit values end at {high * (65535 // top)}, {share} of their range, and would be almost black: set "
            "data.range, such as [0, 4095] for 12 bits, or data.range type where it is meant"
        )


def whole_box(height: int, width: int) -> Box:
    """The box that is all of a picture."""
    return 0.0, 0.0, float(width), float(height)


def surplus(box: Box | None, size: tuple[int, int] | None) -> float:
    """Pixels of a box for each one of the height and width that it is wanted in, along the side with fewer."""
    return min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) if box and size else 1.0


def window(box: Box, shape: tuple[int, int], size: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """Whole pixels around a box of a picture of this shape: enough for a bicubic filter that makes it `size`."""
    scale = max(1.0, (box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) if size else 0.0
    margin = math.ceil(4 * scale)
    left, top = max(0, math.floor(box[0]) - margin), max(0, math.floor(box[1]) - margin)
    return left, top, min(shape[1], math.ceil(box[2]) + margin), min(shape[0], math.ceil(box[3]) + margin)


class PillowPicture(Picture):
    """What Pillow opens."""

    def __init__(self, image: Image.Image, file: str | Path | IO[bytes] | None = None) -> None:
        """An opened image, and the file that it was opened from."""
        self.image = image
        self.file = file
        tile = image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.tile else None
        raw_mode = tile[3] if tile else ""
        raw_mode = str(raw_mode[0] if isinstance(raw_mode, tuple) and raw_mode else raw_mode)
        self.deep_colours = image.mode in ("RGB", "RGBA") and ";16" in raw_mode
        """Whether Pillow drops the lower 8 of 16 bits."""
        width, height = upright_size(image)  # of a PNG this decodes, after which no tile is left
        self.size = (height, width)
        grey = {"1": np.uint8, "L": np.uint8, "I": np.int32, "F": np.float32}
        if image.mode in grey or image.mode.startswith("I;16"):
            self.bands, self.dtype = 1, np.dtype(grey.get(image.mode, np.uint16))
        else:
            clear = image.mode in ALPHA or "transparency" in image.info
            grey_levels = image.mode.startswith("L") or raw_mode.startswith("LA")  # the second of 16 bits in PNG
            self.bands = (2 if grey_levels else 4) if clear else 3
            self.alpha = "straight" if clear else None
            self.dtype = np.dtype(np.uint16 if self.deep_colours else np.uint8)

    def close(self) -> None:
        """Close its file; what was decoded stays, which Pillow's own `close` would take away."""
        self.image.__exit__()

    def _draft(self, box: Box | None, size: tuple[int, int] | None, mode: str) -> None:
        """Let a JPEG be decoded at the lowest of its scales (1/2, 1/4, 1/8) that holds the box in full detail."""
        factor = surplus(box, size)
        if factor >= 2:
            self.image.draft(mode, (int(self.image.width / factor), int(self.image.height / factor)))

    def rgb(
        self,
        max_megapixels: float,
        box: Box | None = None,
        size: tuple[int, int] | None = None,
        span: Span = None,
        nodata: float | None = None,
    ) -> tuple[Image.Image, Box]:
        """As `to_rgb` makes it."""
        check_megapixels(*self.size, max_megapixels)
        if nodata is not None or (self.deep_colours and span is not None and span != "type"):
            return super().rgb(max_megapixels, box, size, span, nodata)
        self._draft(box, size, "RGB")
        if self.image.mode.startswith("I;16") and span is None:
            self.image.seek(0)
            refuse_dark(np.asarray(self.image), 65535)
        image = to_rgb(self.image, max_megapixels, None if isinstance(span, str) else span)
        if self.deep_colours and span is None:
            refuse_dark(np.asarray(image), 255)
        return image, self._scaled(box, image.height, image.width)

    def sample(self, max_megapixels: float) -> np.ndarray:
        """All values: it is decoded whole in any case."""
        return self.values(max_megapixels)[0].reshape(self.bands, -1)

    def require_colours(self) -> None:
        """Colours with transparency are colours too."""

    def values(
        self, max_megapixels: float, box: Box | None = None, size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, Box]:
        """The whole picture; of a JPEG, at a fraction of its size where that will do."""
        check_megapixels(*self.size, max_megapixels)
        image = self.image
        if self.deep_colours:
            values = self._all_16_bits()
            if values.ndim != 3 or values.shape[2] != self.bands:
                raise BadPictureError(f"its pixels are {values.shape}, not {self.bands} bands as its header says")
        else:
            self._draft(box, size, "L" if self.bands == 1 else "RGB")
            image.seek(0)
            image.load()
            image = upright(image)
            plain = {(1, "1"): "L", (2, image.mode): "LA", (3, image.mode): "RGB", (4, image.mode): "RGBA"}
            wanted = plain.get((self.bands, image.mode), image.mode)
            values = np.asarray(image if image.mode == wanted else image.convert(wanted))
        values = np.moveaxis(values, -1, 0) if values.ndim == 3 else values[None]
        if self.deep_colours:
            values = turned(values, orientation(self.image))
        return values, self._scaled(box, *values.shape[1:])

    def _all_16_bits(self) -> np.ndarray:
        """Colours of 16 bits (h, w, bands), of which Pillow keeps 8."""
        if self.image.format != "PNG" or self.file is None:
            raise BadPictureError(
                f"its colours have 16 bits, which are read of TIFF, PNG and npy, not of {self.image.format}"
            )
        try:
            import imagecodecs
        except ImportError as error:
            raise BadPictureError("16-bit colours in PNG are read by imagecodecs: pip install imagecodecs") from error
        if isinstance(self.file, (str, Path)):
            return imagecodecs.png_decode(Path(self.file).read_bytes())
        self.file.seek(0)
        return imagecodecs.png_decode(self.file.read())

    def _scaled(self, box: Box | None, height: int, width: int) -> Box:
        """The box in a picture that was decoded at this size."""
        if box is None:
            return whole_box(height, width)
        x, y = width / self.size[1], height / self.size[0]
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y
