"""TIFF of any kind, by tifffile: bands, pages, planes and pyramids, of which only the tiles around a view are read."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from launch.data.images import TURNS, BadPictureError, check_megapixels, open_picture, turned
from launch.data.photometric import SAMPLES, cmyk_to_rgb, inverted, is_colour, kind, opacity, plain, raw_ycbcr, steps
from launch.data.pictures import Box, Picture, PillowPicture, Span, surplus, whole_box, window
from vim_backbone.preprocessing import type_range

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How a TIFF begins; the last two are BigTIFF."""
NODATA = 42113
"""GDAL's tag of the value of pixels that hold nothing."""
WHOLE = 1 << 22
"""Pixels up to which Pillow reads colours of 8 bits, as fast whole as by tiles."""
LARGE = 1 << 20
"""Bytes of a strip that is not compressed from which on it is mapped into memory."""
BY_PILLOW = ("bool", "uint8", "uint16", "int32", "float32")
"""Types of grey that Pillow reads as they are."""
MOST_BANDS = 4096


class TiffPicture(Picture):
    """The first series of a TIFF: its pages, or the samples of one, are its bands."""

    def __init__(self, file: str | Path | IO[bytes]) -> None:
        try:
            import tifffile
        except ImportError as error:
            raise BadPictureError("TIFF is read by tifffile: pip install tifffile imagecodecs") from error
        self.source = file
        self.file = tifffile.TiffFile(file)
        try:
            self._read_header()
        except BaseException:
            self.file.close()
            raise

    def _read_header(self) -> None:
        series = self.file.series[0]
        self.levels: list[Any] = list(series.levels)
        self.key: Any = series.keyframe
        height, width = self.key.imagelength, self.key.imagewidth
        self.planes = math.prod(series.shape) // max(1, height * width)
        self.orientation = int(self.key.tags.valueof(274, 1))
        if self.orientation not in TURNS:
            self.orientation = 1
        self.size = (width, height) if self.orientation >= 5 else (height, width)
        self.bands, self.dtype = self.planes, np.dtype(series.dtype or np.uint8)
        if not height or not width or not 1 <= self.bands <= MOST_BANDS or self.dtype.kind not in "biuf":
            raise BadPictureError(f"it is {series.shape} of {self.dtype}: no picture of numbers")
        self.nodata = self.stored_nodata = self._nodata()
        self.alpha = opacity(self.key) if self._colours() else None
        decodable = self.key.compression == 1 or find_spec("imagecodecs") is not None
        self.windowed = self.orientation == 1 and decodable and not raw_ycbcr(self.key)
        if self.planes == 1 and kind(self.key) == "PALETTE" and self.key.colormap is not None:
            self.bands, self.dtype, self.nodata = 3, np.dtype(np.uint8), None  # its nodata is none of its colours
        elif self.planes == 1 and self.nodata is not None:
            self.nodata *= steps(self.key)
            if inverted(self.key):
                self.nodata = type_range(str(self.dtype))[1] - self.nodata

    def _nodata(self) -> float | None:
        text = self.key.tags.valueof(NODATA)
        if text is None:
            return None
        try:
            return float(str(text).strip(" \0"))
        except ValueError as error:
            raise BadPictureError(f"its nodata is {str(text)[:40]!r}, which is no number") from error

    def close(self) -> None:
        """Close its file, and let its header go: objects of tifffile hold each other, megabytes for a slide."""
        self.file.close()
        for holder in (*(level.keyframe for level in self.levels), self.file):
            vars(holder).clear()
        self.levels, self.key = [], None

    @property
    def words(self) -> str:
        """What it holds, alpha named."""
        alpha = sum(getattr(extra, "value", extra) in (1, 2) for extra in self.key.extrasamples)
        return super().words + (", one of them alpha" if alpha and self.bands > 4 else "")

    def rgb(
        self,
        max_megapixels: float,
        box: Box | None = None,
        size: tuple[int, int] | None = None,
        span: Span = None,
        nodata: float | None = None,
    ) -> tuple[Any, Box]:
        """As Pillow makes it where it reads the file faithfully, else from `values`."""
        if self.planes <= 4 and kind(self.key) not in SAMPLES:
            raise BadPictureError(f"its colours are {kind(self.key)}, which are not read: save it as RGB")
        if kind(self.key) == "MINISWHITE" and not inverted(self.key):
            raise BadPictureError(f"it has white as 0, and values of {self.dtype}")
        by_window = self.windowed and self.size[0] * self.size[1] > WHOLE
        if self._by_pillow(span) and nodata is None and self.nodata is None and not by_window:
            if hasattr(self.source, "seek"):
                self.source.seek(0)  # pyright: ignore[reportAttributeAccessIssue]
            try:
                opened = PillowPicture(open_picture(self.source))
            except OSError:
                pass  # a compression or number that it does not know
            else:
                with opened:
                    return opened.rgb(max_megapixels, box, size, span)
        if kind(self.key) == "SEPARATED" and self._colours() and self.dtype == np.uint8:
            values, near = self.values(max_megapixels, box, size)
            return cmyk_to_rgb(values), near
        return super().rgb(max_megapixels, box, size, span, nodata)

    def _colours(self) -> bool:
        """Whether the bands are those of a colour, perhaps with transparency."""
        return self.planes == self.key.samplesperpixel and is_colour(self.key)

    def _by_pillow(self, span: Span) -> bool:
        """Whether Pillow makes the same of it."""
        if not self._colours() or self.bands > 1:
            return self._colours() and self.dtype == np.uint8
        faithful = str(self.dtype) in BY_PILLOW and not (inverted(self.key) and self.dtype == np.uint16)
        return faithful and not (span == "type" and self.dtype == np.int32)

    def require_colours(self) -> None:
        """Grey, or red, green and blue: not three bands of something else."""
        if self.bands == 3 and not self._colours() and self.key.samplesperpixel == 1:
            raise BadPictureError(
                f"it holds 3 pages of {self.dtype}, which need not be red, green and blue: choose with "
                "data.statistics (see python -m pretrain.bands)"
            )
        super().require_colours()

    def values(
        self, max_megapixels: float, box: Box | None = None, size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, Box]:
        """The tiles or strips around the box, of the coarsest level that holds it in full detail."""
        if self.orientation != 1:
            return self._turned(max_megapixels, box)
        factor = surplus(box, size)
        level, x, y = self.levels[0], 1.0, 1.0
        for coarser in self.levels[1:]:
            key = coarser.keyframe
            across, down = self.size[1] / key.imagewidth, self.size[0] / key.imagelength
            same = (
                coarser.dtype == level.dtype
                and math.prod(coarser.shape) == self.planes * key.imagewidth * key.imagelength
            )
            if same and max(x, y) < max(across, down) <= factor * 1.001:
                level, x, y = coarser, across, down
        box = box or whole_box(*self.size)
        near = (box[0] / x, box[1] / y, box[2] / x, box[3] / y)
        shape = (level.keyframe.imagelength, level.keyframe.imagewidth)
        left, top, right, bottom = window(near, shape, size)
        pixels = self._plain(self._read(level, left, top, right, bottom, max_megapixels))
        return pixels, (near[0] - left, near[1] - top, near[2] - left, near[3] - top)

    def _turned(self, max_megapixels: float, box: Box | None) -> tuple[np.ndarray, Box]:
        height, width = self.key.imagelength, self.key.imagewidth
        pixels = self._plain(self._read(self.levels[0], 0, 0, width, height, max_megapixels))
        return turned(pixels, self.orientation), box or whole_box(*self.size)

    def _plain(self, pixels: np.ndarray) -> np.ndarray:
        return plain(pixels, self.key) if self.planes == self.key.samplesperpixel else pixels

    def _read(self, level: Any, left: int, top: int, right: int, bottom: int, max_megapixels: float) -> np.ndarray:
        """(bands, h, w) of one level, segment by segment."""
        key = level.keyframe
        check_megapixels(bottom - top, right - left, max_megapixels)
        pages = list(level.pages)
        planar = key.samplesperpixel if int(key.planarconfig or 1) == 2 else 1
        samples = key.samplesperpixel // planar
        if len(pages) * planar * samples != self.planes or getattr(key, "imagedepth", 1) != 1:
            return self._contiguous(level, left, top, right, bottom)
        out = np.empty((self.planes, bottom - top, right - left), level.dtype)
        length, width = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
        length = min(length, key.imagelength) if not key.is_tiled else length
        across, down = -(-key.imagewidth // width), -(-key.imagelength // length)
        mapped = self._mappable(key)
        if not mapped:
            check_megapixels(length, width, max_megapixels)  # a strip may be all of the picture
        for number, page in enumerate(pages):
            if page is None:
                raise BadPictureError(f"its page {number} is missing")
            for plane in range(planar):
                first = (number * planar + plane) * samples
                for row in range(top // length, -(-bottom // length)):
                    for column in range(left // width, -(-right // width)):
                        y, x = row * length, column * width
                        index = (plane * down + row) * across + column
                        shape = (1, min(length, key.imagelength - y), width, samples)
                        part = self._segment(page, key, index, shape if mapped else None)
                        target = out[
                            first : first + samples,
                            max(0, y - top) : min(bottom, y + length) - top,
                            max(0, x - left) : min(right, x + width) - left,
                        ]
                        if part is None:
                            target[...] = self.stored_nodata
                            continue
                        y0, x0 = max(0, top - y), max(0, left - x)
                        cut = part[0, y0 : y0 + target.shape[1], x0 : x0 + target.shape[2]]
                        if cut.shape != (*target.shape[1:], samples):
                            raise BadPictureError(f"a tile of it is {part.shape[1:]}, not what its header says")
                        target[...] = np.moveaxis(cut, -1, 0)
        return out

    def _mappable(self, key: Any) -> bool:
        """Whether strips are numbers as they stand."""
        plain_numbers = key.compression == 1 and key.predictor == 1 and key.fillorder == 1 and not key.is_tiled
        return plain_numbers and key.bitspersample == 8 * key.dtype.itemsize and isinstance(self.source, (str, Path))

    def _segment(self, page: Any, key: Any, index: int, shape: tuple[int, ...] | None) -> np.ndarray | None:
        """A tile or strip (1, h, w, samples); None for one that is left out because it holds nodata alone.

        With a shape, that of a strip which can be mapped, a large one is.
        """
        if index >= len(page.dataoffsets) or index >= len(page.databytecounts):
            raise BadPictureError(f"its tile {index} is missing")
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
            nothing = self.stored_nodata
            if nothing is None or (key.dtype.kind in "iu" and not within(nothing, key.dtype)):
                raise BadPictureError(f"its tile {index} is empty")
            return None
        if shape is not None and count >= LARGE:
            size = self.file.filehandle.size
            if offset + count > size:
                raise BadPictureError(f"its tile {index} is truncated: {max(0, size - offset)} of {count} bytes")
            stored = key.dtype.newbyteorder(self.file.byteorder)
            return np.memmap(self.source, stored, "r", offset, shape)  # pyright: ignore[reportCallIssue, reportArgumentType]
        self.file.filehandle.seek(offset)
        data = self.file.filehandle.read(count)
        if len(data) < count:
            raise BadPictureError(f"its tile {index} is truncated: {len(data)} of {count} bytes")
        return key.decode(data, index, jpegtables=getattr(page, "jpegtables", None))[0]

    def _contiguous(self, level: Any, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Of a stack that is one block of numbers behind one header, as ImageJ writes it."""
        if level.dataoffset is None:
            raise BadPictureError(f"its {level.shape} are in no order that can be read by window")
        path = getattr(self.file.filehandle, "path", "")
        shape = (self.planes, level.keyframe.imagelength, level.keyframe.imagewidth)
        stored = np.dtype(level.dtype).newbyteorder(self.file.byteorder)
        if level.keyframe.samplesperpixel != 1:
            raise BadPictureError(f"its {level.shape} are in no order that can be read by window")
        if isinstance(self.source, (str, Path)):
            whole = np.memmap(path, stored, "r", level.dataoffset, shape)
        else:
            self.file.filehandle.seek(level.dataoffset)
            whole = np.frombuffer(self.file.filehandle.read(math.prod(shape) * stored.itemsize), stored).reshape(shape)
        return np.array(whole[:, top:bottom, left:right]).astype(level.dtype)


def within(value: float, kind: np.dtype) -> bool:
    """Whether whole numbers of a type have this value."""
    lowest, highest = type_range(str(kind))
    return lowest <= value <= highest and value == int(value)
