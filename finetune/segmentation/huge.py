"""Maps of pictures larger than memory: window by window at the file's resolution, written tile by tile."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from finetune.pixels import displayed
from finetune.task import MAX_MEGAPIXELS
from launch.data.pictures import Picture
from launch.data.reading import read_pixels
from vim_backbone.errors import UserError
from vim_backbone.preprocessing import Preprocessing

MARGIN = 8
"""A window's side over the margin that it shares with its neighbours, of which it says nothing."""
STEP = 16
"""What divides the sides of tiles in TIFF."""
THUMBNAIL = 1024
"""Longer side of what is drawn of a huge picture, about."""


class HugeMap:
    """Labels of a picture by windows that overlap: each labels its middle, the outermost their outer margins too."""

    def __init__(self, picture: Picture, preprocessing: Preprocessing, window: tuple[int, int]) -> None:
        """A picture, and height and width of the windows that the model takes."""
        self.picture = picture
        self.preprocessing = preprocessing
        self.window = window
        self.tile = tuple(max(STEP, (side - 2 * (side // MARGIN)) // STEP * STEP) for side in window)
        if any(tile > side for tile, side in zip(self.tile, window, strict=True)):
            raise UserError(f"model.img_size is {window}: windows over huge pictures need {STEP} pixels or more")
        self.thumb = max(1, max(picture.size) // THUMBNAIL)
        self.tiles: list[tuple[int, int, np.ndarray, np.ndarray]] = []
        """Top, left, picture (h, w, 3) and labels (h, w) of tiles, of which every `thumb`-th pixel is kept."""

    def write(self, path: Path, classes: np.ndarray, segment: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Write the map as a TIFF of tiles, compressed.

        Args:
            classes: value of each class in the map.
            segment: pixels (1, c, h, w) of a window -> its classes (h, w).

        Returns:
            Pixels of each class.
        """
        import tifffile

        counts = np.zeros(len(classes), np.int64)
        tifffile.imwrite(
            path, self._tiles(classes, segment, counts), shape=self.picture.size, dtype=classes.dtype, tile=self.tile,
            compression="deflate", bigtiff=True, photometric="minisblack",
        )  # fmt: skip
        return counts

    def _tiles(
        self, classes: np.ndarray, segment: Callable[[Tensor], Tensor], counts: np.ndarray
    ) -> Iterator[np.ndarray]:
        (height, width), (rows, columns) = self.picture.size, self.tile
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                h, w = min(rows, height - top), min(columns, width - left)
                y, x = (
                    max(0, min(start - (side - tile) // 2, full - side))
                    for start, side, tile, full in zip(
                        (top, left), self.window, self.tile, self.picture.size, strict=True
                    )
                )
                bottom, right = min(y + self.window[0], height), min(x + self.window[1], width)
                pixels = read_pixels(self.picture, self.preprocessing, MAX_MEGAPIXELS, (x, y, right, bottom))
                labels = segment(pixels[None]).cpu().numpy()[top - y : top - y + h, left - x : left - x + w]
                counts += np.bincount(labels.ravel(), minlength=len(counts))
                self._keep(top, left, pixels[:, top - y : top - y + h, left - x : left - x + w], labels)
                tile = np.zeros(self.tile, classes.dtype)
                tile[:h, :w] = classes[labels]
                yield tile

    def _keep(self, top: int, left: int, pixels: Tensor, labels: np.ndarray) -> None:
        step = self.thumb
        rows, columns = slice(-top % step, None, step), slice(-left % step, None, step)
        picture = displayed(pixels[:, rows, columns], self.preprocessing).permute(1, 2, 0).numpy() / 255
        self.tiles.append((-(-top // step), -(-left // step), picture, labels[rows, columns].copy()))

    def thumbnail(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture (h, w, 3) in [0, 1] and labels (h, w), small; after `write`."""
        height, width = (-(-side // self.thumb) for side in self.picture.size)
        picture, labels = np.zeros((height, width, 3)), np.zeros((height, width), np.int64)
        for top, left, part, classes in self.tiles:
            box = (slice(top, top + part.shape[0]), slice(left, left + part.shape[1]))
            picture[box], labels[box] = part, classes
        return picture, labels
