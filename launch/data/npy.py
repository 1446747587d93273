"""Arrays in .npy files, mapped into memory: a view reads its own part alone."""

from pathlib import Path
from typing import IO

import numpy as np

from launch.data.images import BadPictureError, check_megapixels
from launch.data.pictures import Box, Picture, whole_box, window

MAGIC = b"\x93NUMPY"


class NpyPicture(Picture):
    """An array (h, w), (bands, h, w) or (h, w, bands): of three axes, the shorter one of the first and the last."""

    windowed = True

    def __init__(self, file: str | Path | IO[bytes]) -> None:
        mapped = "r" if isinstance(file, (str, Path)) else None
        array = np.load(file, mmap_mode=mapped, allow_pickle=False)  # a pickle could start any program
        if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "biuf":
            raise BadPictureError(f"it is an array {array.shape} of {array.dtype}: no picture of numbers")
        first = array.ndim == 3 and len(array) < array.shape[-1]
        self.array = array if first else np.moveaxis(np.atleast_3d(array), -1, 0)
        self.bands, self.size = len(self.array), (self.array.shape[1], self.array.shape[2])
        self.dtype = array.dtype.newbyteorder("=")

    def values(
        self, max_megapixels: float, box: Box | None = None, size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, Box]:
        """The part around the box."""
        box = box or whole_box(*self.size)
        left, top, right, bottom = window(box, self.size, size)
        check_megapixels(bottom - top, right - left, max_megapixels)
        part = np.array(self.array[:, top:bottom, left:right], dtype=self.dtype)
        return part, (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
