"""What a training view costs by the kind of file: `python -m benchmarks.bands`; one process, files in the page cache.

A JPEG and TIFFs of 12 megapixels, and a pyramid of 10 gigapixels of which crops of a megapixel are cut. Also the memory
that is added by 2,000 views of the pyramid.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tifffile
import torch
from PIL import Image

from launch.data.reading import open_file
from launch.data.statistics import Statistics
from launch.run.randomness import generator
from pretrain.data import DataConfig, View

SHAPE = (3000, 4000)
TILE = 256
BANDS = 4


def scene(bands: int, dtype: str, top: int) -> np.ndarray:
    """(h, w, bands): waves with noise, up to a highest value."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(np.float32)
    waves = [0.5 + 0.4 * np.sin(x / (60 + 9 * k)) * np.cos(y / (50 + 7 * k)) for k in range(bands)]
    noisy = np.stack(waves, -1) + rng.normal(0, 0.02, (*SHAPE, bands)).astype(np.float32)
    return (noisy.clip(0, 1) * top).astype(dtype)


def write_pyramid(path: Path, side: int, colours: np.ndarray) -> None:
    """A BigTIFF of `side` x `side` pixels in JPEG tiles, with levels down to one of fewer than 2,048 pixels."""
    tiles = [colours[y : y + TILE, x : x + TILE] for y in range(0, 2048, TILE) for x in range(0, 2048, TILE)]
    levels = [side >> k for k in range(20) if k == 0 or side >> (k - 1) > 2048]

    def repeated(length: int) -> Iterator[np.ndarray]:
        for number in range((-(-length // TILE)) ** 2):
            yield tiles[number % len(tiles)]

    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number, length in enumerate(levels):
            more: dict[str, Any] = {"subifds": len(levels) - 1} if number == 0 else {"subfiletype": 1}
            file.write(
                repeated(length), shape=(length, length, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="rgb",
                compression="jpeg", **more,
            )  # fmt: skip


def seconds_a_view(path: Path, data: DataConfig, size: int, views: int) -> float:
    """The median of so many views, of which each opens the file."""
    cut = View((size, size), (size // 16, size // 16), data, lambda grid, rng: torch.zeros(0))  # noqa: ARG005
    took = []
    for key in range(views):
        start = time.perf_counter()
        with open_file(path) as picture:
            cut.draw(picture, generator(key))
        took.append(time.perf_counter() - start)
    return float(np.median(took))


def megabytes_added(path: Path, data: DataConfig, size: int, views: int) -> float:
    """Most memory that this process holds in so many views, over that after the first 50."""
    seconds_a_view(path, data, size, 50)
    held = []
    for _ in range(0, views, 50):
        seconds_a_view(path, data, size, 50)
        held.append(psutil.Process().memory_info().rss)
    return (max(held) - held[0]) / 1e6


def main() -> None:
    """Write the files, cut views, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=100_000, help="of the pyramid, in pixels")
    parser.add_argument("--size", type=int, default=224, help="of a view")
    parser.add_argument("--views", type=int, default=40)
    parser.add_argument("--memory_views", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary one when not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        colours, deep = scene(3, "uint8", 255), scene(BANDS, "uint16", 10_000)
        Image.fromarray(colours).save(folder / "rgb.jpg", quality=90)
        tifffile.imwrite(folder / "rgb8.tif", colours, photometric="rgb", tile=(TILE, TILE), compression="zlib")
        extra = {"photometric": "minisblack", "extrasamples": [0] * (BANDS - 1)}
        tifffile.imwrite(folder / "bands16.tif", deep, tile=(TILE, TILE), compression="zlib", **extra)
        write_pyramid(folder / "slide.tif", options.side, colours)
        per_band = [0.0] * BANDS, [10_000.0] * BANDS
        measured = Statistics(
            bands=list(range(BANDS)), dtype="uint16", mean=[5000.0] * BANDS, deviation=[2000.0] * BANDS,
            minimum=per_band[0], maximum=per_band[1], percentiles=list(per_band), nodata=None, pictures=1,
        )  # fmt: skip
        measured.write(folder / "statistics.json")
        plain, bands = DataConfig(), DataConfig(statistics=str(folder / "statistics.json"))
        crops = DataConfig(crop_megapixels=1.0)
        rows = [
            ("JPEG, RGB, 12 megapixels", "rgb.jpg", plain),
            ("TIFF, RGB of 8 bits, 12 megapixels", "rgb8.tif", plain),
            (f"TIFF, {BANDS} bands of 16 bits, 12 megapixels", "bands16.tif", bands),
            (f"TIFF pyramid, RGB, {options.side**2 / 1e6:,.0f} megapixels, crops of one", "slide.tif", crops),
            ("the same, crops of any size", "slide.tif", plain),
        ]
        first = None
        print(f"{'file':60}{'ms a view':>12}{'to the JPEG':>14}")
        for words, file, data in rows:
            took = seconds_a_view(folder / file, data, options.size, options.views)
            first = first or took
            print(f"{words:60}{1000 * took:12.1f}{took / first:14.2f}")
        added = megabytes_added(folder / "slide.tif", crops, options.size, options.memory_views)
        print(f"memory added by {options.memory_views} views of the pyramid: {added:.1f} MB")


if __name__ == "__main__":
    main()
