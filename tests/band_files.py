"""A folder whose TIFFs hold different bands of one scene: three of them in their own order, or all five."""

import numpy as np
import tifffile

SETS = {3: (2, 0, 1), 5: (0, 1, 2, 3, 4)}


def bands_of(number, shape=(40, 48)):
    """Five bands (5, h, w) uint16 of scene `number`."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = [(k + 1) * (500 + 300 * np.sin((x + 9 * number) / (5 + k)) * np.cos(y / (6 + k))) for k in range(5)]
    return (np.stack(waves) + rng.normal(0, 20, (5, *shape))).clip(1, None).astype(np.uint16)


def write(path, values):
    """Bands (bands, h, w) as a tiled TIFF."""
    extra = [0] * (len(values) - 1)
    tifffile.imwrite(path, np.moveaxis(values, 0, -1), photometric="minisblack", extrasamples=extra, tile=(16, 16))


def write_scenes(folder, count=6, sets=SETS):
    """Scenes 0.tif, 1.tif and so on, in turn with the bands of each set."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write(folder / f"{number}.tif", bands_of(number)[list(list(sets.values())[number % len(sets)])])
    return folder
