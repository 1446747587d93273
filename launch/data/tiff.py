"""TIFF of any kind, by tifffile: bands, pages, planes and pyramids, of which only the tiles around a view are read."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from launch.data.images import TURNS, BadPictureError, check_megapixels, open_picture
from launch.data.pictures import Box, Picture, PillowPicture, Span, window

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How a TIFF begins; the last two are BigTIFF."""
NODATA = 42113
"""GDAL's tag of the value of pixels that hold nothing."""
WHOLE = 1 << 22
"""Pixels up to which Pillow reads colours of 8 bits, as fast whole as by tiles."""
PHOTOMETRIC = {"MINISBLACK": (1,), "MINISWHITE": (1,), "RGB": (3, 4), "PALETTE": (1,), "SEPARATED": (4,), "YCBCR": (3,)}
"""Samples of the kinds of colours, with transparency."""
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
        self.nodata = self._nodata()
        self.windowed = self.orientation == 1

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
        grey = self.bands == 1 and self.key.photometric.name in ("MINISBLACK", "MINISWHITE")
        windows = grey or (self.key.photometric.name in ("RGB", "YCBCR") and self.bands == 3)
        decodable = self.key.compression == 1 or find_spec("imagecodecs") is not None
        by_window = windows and decodable and self.size[0] * self.size[1] > WHOLE
        plain = self._colours() and nodata is None and self.nodata is None and (grey or self.dtype == np.uint8)
        if plain and not by_window:
            if hasattr(self.source, "seek"):
                self.source.seek(0)  # pyright: ignore[reportAttributeAccessIssue]
            try:
                opened = PillowPicture(open_picture(self.source))
            except OSError:
                pass  # a compression or number that it does not know
            else:
                with opened:
                    return opened.rgb(max_megapixels, box, size, span)
        if self.bands == 1 and self.key.photometric.name == "MINISWHITE":
            raise BadPictureError("it has white as 0, in a TIFF that Pillow does not read")
        return super().rgb(max_megapixels, box, size, span, nodata)

    def _colours(self) -> bool:
        """Whether the bands are those of a colour, perhaps with transparency."""
        extra = [getattr(kind, "value", kind) for kind in self.key.extrasamples]
        samples = PHOTOMETRIC.get(getattr(self.key.photometric, "name", ""), ())
        transparent = self.key.samplesperpixel in (2, 4) and extra in ([1], [2])
        one_page = self.planes == self.key.samplesperpixel
        return one_page and (transparent or (not extra and self.key.samplesperpixel in samples))

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
        full = (0.0, 0.0, float(self.size[1]), float(self.size[0]))
        surplus = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) if box and size else 1.0
        level, x, y = self.levels[0], 1.0, 1.0
        for coarser in self.levels[1:]:
            key = coarser.keyframe
            across, down = self.size[1] / key.imagewidth, self.size[0] / key.imagelength
            same = (
                coarser.dtype == level.dtype
                and math.prod(coarser.shape) == self.planes * key.imagewidth * key.imagelength
            )
            if same and max(x, y) < max(across, down) <= surplus * 1.001:
                level, x, y = coarser, across, down
        box = box or full
        near = (box[0] / x, box[1] / y, box[2] / x, box[3] / y)
        shape = (level.keyframe.imagelength, level.keyframe.imagewidth)
        left, top, right, bottom = window(near, shape, size)
        pixels = self._read(level, left, top, right, bottom, max_megapixels)
        return pixels, (near[0] - left, near[1] - top, near[2] - left, near[3] - top)

    def _turned(self, max_megapixels: float, box: Box | None) -> tuple[np.ndarray, Box]:
        height, width = self.key.imagelength, self.key.imagewidth
        pixels = self._read(self.levels[0], 0, 0, width, height, max_megapixels)
        if self.orientation >= 5:
            pixels = pixels.swapaxes(1, 2)
        down, across = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[
            self.orientation
        ]
        return pixels[:, ::down, ::across], box or (0.0, 0.0, float(self.size[1]), float(self.size[0]))

    def _read(self, level: Any, left: int, top: int, right: int, bottom: int, max_megapixels: float) -> np.ndarray:
        """(bands, h, w) of one level, segment by segment."""
        key = level.keyframe
        check_megapixels(bottom - top, right - left, max_megapixels)
        pages = list(level.pages)
        planar = key.samplesperpixel if int(key.planarconfig or 1) == 2 else 1
        samples = key.samplesperpixel // planar
        if len(pages) * planar * samples != self.planes or getattr(key, "imagedepth", 1) != 1:
            return self._contiguous(level, left, top, right, bottom)
        out = np.empty((self.planes, bottom - top, right - left), self.dtype)
        length, width = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
        length = min(length, key.imagelength) if not key.is_tiled else length
        across, down = -(-key.imagewidth // width), -(-key.imagelength // length)
        for number, page in enumerate(pages):
            if page is None:
                raise BadPictureError(f"its page {number} is missing")
            for plane in range(planar):
                first = (number * planar + plane) * samples
                for row in range(top // length, -(-bottom // length)):
                    for column in range(left // width, -(-right // width)):
                        y, x = row * length, column * width
                        part = self._segment(page, key, (plane * down + row) * across + column)
                        target = out[
                            first : first + samples,
                            max(0, y - top) : min(bottom, y + length) - top,
                            max(0, x - left) : min(right, x + width) - left,
                        ]
                        if part is None:
                            target[...] = self.nodata
                            continue
                        y0, x0 = max(0, top - y), max(0, left - x)
                        cut = part[0, y0 : y0 + target.shape[1], x0 : x0 + target.shape[2]]
                        if cut.shape != (*target.shape[1:], samples):
                            raise BadPictureError(f"a tile of it is {part.shape[1:]}, not what its header says")
                        target[...] = np.moveaxis(cut, -1, 0)
        return out

    def _segment(self, page: Any, key: Any, index: int) -> np.ndarray | None:
        """A tile or strip (1, h, w, samples); None for one that is left out because it holds nodata alone."""
        if index >= len(page.dataoffsets) or index >= len(page.databytecounts):
            raise BadPictureError(f"its tile {index} is missing")
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
            if self.nodata is None:
                raise BadPictureError(f"its tile {index} is empty")
            return None
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
        kind = self.dtype.newbyteorder(self.file.byteorder)
        if level.keyframe.samplesperpixel != 1:
            raise BadPictureError(f"its {level.shape} are in no order that can be read by window")
        if isinstance(self.source, (str, Path)):
            whole = np.memmap(path, kind, "r", level.dataoffset, shape)
        else:
            self.file.filehandle.seek(level.dataoffset)
            whole = np.frombuffer(self.file.filehandle.read(math.prod(shape) * kind.itemsize), kind).reshape(shape)
        return np.array(whole[:, top:bottom, left:right]).astype(self.dtype)
