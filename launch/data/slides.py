"""Whole slides that are no plain TIFF, by openslide: the part around a view, of the level that holds its detail."""

from pathlib import Path

import numpy as np
from PIL import Image

from launch.data.images import BadPictureError, check_megapixels
from launch.data.pictures import Box, Picture, surplus, whole_box, window

SUFFIXES = frozenset({".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif"})
"""What begins as a TIFF, a JPEG or a text, and is told by its name alone; .svs is a TIFF that tifffile reads."""


class SlidePicture(Picture):
    """A slide in 8-bit RGB, cut to where the scanner says that something is."""

    bands = 3
    dtype = np.dtype(np.uint8)
    windowed = True

    def __init__(self, path: Path) -> None:
        try:
            import openslide
        except (ImportError, OSError) as error:  # the second where the library under the package is missing
            packages = "openslide-python openslide-bin"
            raise BadPictureError(f"{path.suffix} is read by openslide: pip install {packages}") from error
        try:
            self.slide = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise BadPictureError(f"it is no {path.suffix} that openslide reads") from error
        properties, (width, height) = self.slide.properties, self.slide.dimensions
        bounds = {"x": 0, "y": 0, "width": width, "height": height}
        x, y, width, height = (int(properties.get(f"openslide.bounds-{name}", bounds[name])) for name in bounds)
        self.corner = (x, y)
        self.size = (height, width)
        self.background = f"#{properties.get('openslide.background-color', 'FFFFFF')}"

    def close(self) -> None:
        """Close its file."""
        self.slide.close()

    def values(
        self, max_megapixels: float, box: Box | None = None, size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, Box]:
        """The pixels around the box, of the coarsest level that holds it in full detail, over the background."""
        box = box or whole_box(*self.size)
        level = self.slide.get_best_level_for_downsample(max(1.0, surplus(box, size)) * 1.001)
        scale = self.slide.level_downsamples[level]
        near = (box[0] / scale, box[1] / scale, box[2] / scale, box[3] / scale)
        shape = (max(1, int(self.size[0] / scale)), max(1, int(self.size[1] / scale)))
        left, top, right, bottom = window(near, shape, size)
        check_megapixels(bottom - top, right - left, max_megapixels)
        place = (round(self.corner[0] + left * scale), round(self.corner[1] + top * scale))
        region = self.slide.read_region(place, level, (right - left, bottom - top))
        ground = Image.new("RGB", region.size, self.background)
        ground.paste(region, mask=region.getchannel("A"))
        return np.moveaxis(np.asarray(ground), -1, 0), (near[0] - left, near[1] - top, near[2] - left, near[3] - top)
