"""Pictures of any size and format for benchmarks, put together from the built-in photographs, and labels for them.

A picture is a mosaic of photographs, each at its own resolution or below where it has as many pixels: enlarged ones
would be smooth, and noise is not what decoders are made for.
"""

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from PIL import Image, ImageDraw, ImageOps

from launch.data.sources import photograph_paths

FORMATS: dict[str, dict[str, Any]] = {
    "jpeg": {"quality": 90},
    "png": {},
    "webp": {"quality": 90},
    "tiff": {"compression": "tiff_lzw", "tiffinfo": {317: 2}},  # 317: differences of neighbours are compressed
}
"""Name, also as the end of a file's name, and how it is written."""
TILE = 480
"""About the sides of a photograph in a mosaic, in pixels."""
OBJECTS = 5
"""Instances of a picture, for detection."""


@cache
def photographs() -> list[Image.Image]:
    """The built-in ones as RGB."""
    return [Image.open(path).convert("RGB") for path in photograph_paths()]


def mosaic(megapixels: float, number: int) -> Image.Image:
    """Picture `number` of a size, 3:2."""
    draws = random.Random(f"{megapixels} {number}")
    width = round((megapixels * 1e6 * 1.5) ** 0.5)
    height = round(megapixels * 1e6 / width)
    rows, columns = max(1, round(height / TILE)), max(1, round(width / TILE))
    picture = Image.new("RGB", (width, height))
    for row in range(rows):
        for column in range(columns):
            left, top = column * width // columns, row * height // rows
            size = ((column + 1) * width // columns - left, (row + 1) * height // rows - top)
            photograph = draws.choice(photographs())
            middle = (draws.random(), draws.random())
            tile = ImageOps.fit(photograph, size, Image.Resampling.BICUBIC, centering=middle)
            picture.paste(ImageOps.mirror(tile) if draws.random() < 0.5 else tile, (left, top))
    return picture


def write_pictures(folder: Path, kind: str, megapixels: float, count: int) -> list[Path]:
    """`count` pictures in two class folders, those that are there already left as they are; their files."""
    paths = [folder / f"{kind}-{megapixels:g}" / "ab"[i % 2] / f"{i:03d}.{kind}" for i in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            mosaic(megapixels, number).save(path, **FORMATS[kind])
    return paths


def write_maps(folder: Path, megapixels: float, count: int, classes: int) -> list[Path]:
    """A map of labels 0 .. classes - 1 for each of `count` pictures, blocks of like brightness; their files."""
    paths = [folder / f"maps-{megapixels:g}" / f"{i:03d}.png" for i in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = mosaic(megapixels, number).convert("L")
            small = np.asarray(picture.reduce(16)).astype(np.uint16) * classes // 256
            Image.fromarray(small.astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST).save(path)
    return paths


def instances(width: int, height: int, number: int) -> list[dict[str, Any]]:
    """Objects of a picture as a checked COCO file has them: ellipses, with masks."""
    draws = random.Random(number)
    objects = []
    for _ in range(OBJECTS):
        w, h = (max(8, round(side * draws.uniform(0.1, 0.5))) for side in (width, height))
        x, y = draws.randint(0, width - w), draws.randint(0, height - h)
        shape = Image.new("L", (width, height))
        ImageDraw.Draw(shape).ellipse((x, y, x + w - 1, y + h - 1), fill=1)
        rle = coco_mask.encode(np.asfortranarray(np.asarray(shape)))
        objects.append({"bbox": [x, y, w, h], "category_id": 1, "iscrowd": 0, "segmentation": rle})
    return objects
