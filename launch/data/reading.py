"""A file of any format as a `Picture`, and a picture as what a model takes: its bands, their values, at a size."""

import io
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from launch.data import dicom, npy, slides, tiff
from launch.data.dicom import DicomPicture
from launch.data.images import SUFFIXES as PILLOW_SUFFIXES
from launch.data.images import BadPictureError, open_picture
from launch.data.npy import NpyPicture
from launch.data.pictures import Box, Picture, PillowPicture
from launch.data.resize import GAP, Resizer, resized_part
from launch.data.slides import SlidePicture
from launch.data.tiff import TiffPicture
from vim_backbone.errors import UserError
from vim_backbone.preprocessing import Preprocessing, invalid


@dataclass(frozen=True)
class Plugin:
    """What teaches Pillow another format."""

    kind: str
    """Pillow's name of the format."""
    module: str
    package: str
    """What pip installs."""
    suffixes: frozenset[str]

    def teach(self) -> None:
        """Let Pillow know the format. Raises BadPictureError where the package is missing."""
        try:
            module = import_module(self.module)
        except ImportError as error:
            raise BadPictureError(f"{self.kind} is read with {self.package}: pip install {self.package}") from error
        getattr(module, "register_heif_opener", bool)()


HEIF = Plugin("HEIF", "pillow_heif", "pillow-heif", frozenset({".heic", ".heif", ".hif"}))
JXL = Plugin("JXL", "pillow_jxl", "pillow-jxl-plugin", frozenset({".jxl"}))
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
TIFF_SUFFIXES = frozenset({".tif", ".tiff", ".btf", ".tf8", ".svs"})
SUFFIXES = PILLOW_SUFFIXES | TIFF_SUFFIXES | HEIF.suffixes | JXL.suffixes | slides.SUFFIXES | {".dcm", ".npy"}
"""Ends of the names of picture files, in lower case."""


def plugin_of(magic: bytes) -> Plugin | None:
    """What reads a file that begins so, where Pillow alone does not."""
    if magic[4:8] == b"ftyp" and magic[8:12] in HEIF_BRANDS and b"avif" not in magic[:64]:  # AVIF may have these too
        return HEIF
    return JXL if magic.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")) else None


def open_file(file: str | Path | IO[bytes]) -> Picture:
    """A picture of any format, by its content, slides by name. Raises OSError, ValueError or BadPictureError else."""
    if isinstance(file, (str, Path)):
        with open(file, "rb") as opened:
            magic = opened.read(132)
        if Path(file).suffix.lower() in slides.SUFFIXES:
            return SlidePicture(Path(file))
    else:
        magic = file.read(132)
        file.seek(0)
    if magic.startswith(tiff.MAGIC):
        return TiffPicture(file)
    if magic.startswith(npy.MAGIC):
        return NpyPicture(file)
    if magic[128:] == dicom.PREFIX:
        return DicomPicture(file)
    if plugin := plugin_of(magic):
        plugin.teach()
        return PillowPicture(Image.open(file, formats=(plugin.kind,)), file)
    return PillowPicture(open_picture(file), file)


def open_bytes(content: bytes) -> Picture:
    """A picture in memory."""
    return open_file(io.BytesIO(content))


def read_pixels(
    picture: Picture,
    preprocessing: Preprocessing,
    max_megapixels: float,
    box: Box | None = None,
    size: tuple[int, int] | None = None,
    resize: Resizer = "pillow",
) -> Tensor:
    """The pixels of a box (all when None), as (c, h, w) of uint8, uint16 or float32: the input of `to_model`.

    Args:
        preprocessing: which bands, and what is done where they hold nothing.
        max_megapixels: most pixels that are decoded, in millions.
        size: height and width to make of the box; as many pixels as it has when None.
        resize: whose kernel makes them of a picture in RGB; of bands always Pillow's.

    Raises:
        BadPictureError: too large, without the bands, of another type, or with numbers that are none.
    """
    if preprocessing.bands is None:
        limits = preprocessing.range
        span = (limits[0][0], limits[1][0]) if isinstance(limits, tuple) else limits
        image, near = picture.rgb(max_megapixels, box, size, span, preprocessing.nodata)
        if size is not None:
            return resized_part(image, near, size, resize)
        if box is not None:
            image = image.crop((round(near[0]), round(near[1]), round(near[2]), round(near[3])))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    values, near = read_bands(picture, preprocessing, max_megapixels, box, size)
    if size is None:
        left, top, right, bottom = (round(edge) for edge in near)
        return torch.from_numpy(values[:, top:bottom, left:right].copy())
    return torch.from_numpy(resized(values, size, near))


def read_bands(
    picture: Picture,
    preprocessing: Preprocessing,
    max_megapixels: float,
    box: Box | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, Box]:
    """Chosen bands that a file has, around a box, filled where they hold nothing, and where the box lies in them."""
    try:
        preprocessing = preprocessing.of_file(picture.bands)
    except UserError as error:
        raise BadPictureError(str(error)) from error
    bands = preprocessing.bands
    assert bands is not None
    if max(bands) >= picture.bands:
        raise BadPictureError(f"it holds {picture.words}, and band {max(bands)} is wanted (data.bands {list(bands)})")
    if preprocessing.dtype is not None and picture.dtype != preprocessing.dtype:
        raise BadPictureError(f"it holds {picture.words}, the other pictures {preprocessing.dtype}")
    values, near = picture.values(max_megapixels, box, size)
    chosen = values if bands == tuple(range(len(values))) else values[list(bands)]
    missing = invalid(chosen, preprocessing.nodata)
    if picture.nodata is not None and (more := invalid(chosen, picture.nodata)) is not None:
        missing = more if missing is None else missing | more
    if chosen.dtype.kind == "f":
        finite = np.isfinite(chosen) if missing is None else np.isfinite(chosen) | missing
        if not finite.all():
            share = 1 - finite.mean()
            raise BadPictureError(
                f"{share:.2%} of its values are NaN or infinite: set data.nodata nan where they are meant"
            )
    return preprocessing.filled(chosen, missing), near


def resized(
    values: np.ndarray,
    size: tuple[int, int],
    box: Box | None = None,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    reducing_gap: float | None = GAP,
) -> np.ndarray:
    """Bands (c, h, w) of uint8, uint16 or float32, resized band by band to a height and width, by Pillow's filter."""
    made = np.empty((len(values), *size), values.dtype)
    across, down = 1, 1
    if values.dtype != np.uint8 and box is not None and reducing_gap is not None:
        # as Pillow would with its gap, but before every pixel becomes a float of its own
        across, down = (
            max(1, int((end - start) / side / reducing_gap))
            for start, end, side in ((box[0], box[2], size[1]), (box[1], box[3], size[0]))
        )
        box = (box[0] / across, box[1] / down, box[2] / across, box[3] / down)
        reducing_gap = None
    for band, out in zip(values, made, strict=True):
        if band.dtype != np.uint8:
            band = block_means(band, down, across)
        image = Image.fromarray(np.ascontiguousarray(band))
        new = np.asarray(image.resize((size[1], size[0]), resample, box=box, reducing_gap=reducing_gap))
        out[...] = new if out.dtype != np.uint16 else new.round().clip(0, 65535)
    return made


def block_means(band: np.ndarray, down: int, across: int) -> np.ndarray:
    """Means of blocks of so many rows and columns (h, w) -> float32; the last ones repeat the edge."""
    height, width = band.shape
    if height % down or width % across:
        band = np.pad(band, ((0, -height % down), (0, -width % across)), mode="edge")
    rows = band[::down].astype(np.float32)
    for offset in range(1, down):
        rows += band[offset::down]
    means = rows[:, ::across] if across == 1 else sum(rows[:, offset::across] for offset in range(across))
    return np.asarray(means, np.float32) / np.float32(down * across) if down * across > 1 else rows
