"""Features of one picture too large for memory: `python -m launch.embed_large BACKBONE PICTURE OUT.npy`.

The picture is read by window, each patch once, and scanned as one sequence; the features are written by window.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.data.pictures import Picture
from launch.data.reading import open_file, read_pixels
from launch.run.cli import run
from launch.run.progress import ProgressReport, user_console
from vim_backbone import VisionMamba, load
from vim_backbone.block import set_slices
from vim_backbone.errors import UserError, require
from vim_backbone.files import write_atomically
from vim_backbone.images import reason
from vim_backbone.lines import Grid
from vim_backbone.preprocessing import Preprocessing, to_model
from vim_backbone.pretrained import device_of
from vim_backbone.windows import Window, encode_by_window, windows

DTYPES = {"float32": (torch.float32, np.float32), "bfloat16": (torch.bfloat16, np.float16)}
"""Of the weights and of the file."""


class WindowReader:
    """Windows of an open picture as a backbone's input: bands, range and filling as `Transform` has them."""

    def __init__(self, picture: Picture, model: VisionMamba, preprocessing: Preprocessing, side: int) -> None:
        """`side` of the windows in pixels. Raises UserError for a picture that is read only whole."""
        if not picture.windowed:
            raise UserError(
                f"a picture of {picture.size[1]} x {picture.size[0]} pixels in this format is read only whole: save it "
                "as a tiled TIFF, or take python -m launch.embed"
            )
        self.picture, self.config, self.preprocessing = picture, model.config, preprocessing
        self.device = model.pos_embed.device
        self.side = max(1, side // self.config.stride)
        edges = self.side * self.config.stride + self.config.patch_size
        self.max_megapixels = max(edges**2 / 1e6, 1.0)
        self.grid: Grid = self.config.grid(*(self.config.padded(length) for length in picture.size))

    def __call__(self, window: Window) -> Tensor:
        """(1, c, h, w), filled up with 0 beyond the picture. Raises anything that a decoder raises."""
        left, top, right, bottom = window.pixels(self.config)
        height, width = self.picture.size
        box = float(left), float(top), float(min(right, width)), float(min(bottom, height))
        pixels = read_pixels(self.picture, self.preprocessing, self.max_megapixels, box)
        values = to_model(pixels[None], self.device, self.preprocessing)
        return F.pad(values, (0, right - left - values.shape[-1], 0, bottom - top - values.shape[-2]))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Raise UserError with the picture's name for anything that a decoder raises on damaged data."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot use {path}: {reason(error)}") from error


def watched(read: WindowReader, report: ProgressReport, path: Path) -> Callable[[Window], Tensor]:
    """The same, with the progress said after each window."""
    done = itertools.count(1)

    def window(which: Window) -> Tensor:
        with named(path):
            pixels = read(which)
        report.update(next(done), report.rate())
        return pixels

    return window


def write_map(out: Path, patches: Tensor, grid: Grid, side: int, dtype: type[np.floating]) -> None:
    """Patches (1, l, d_model) as an array (rows, columns, d_model) on disk, some rows at a time.

    Where channels are tokens, a place has their mean.
    """
    places = patches.view(*grid, -1, patches.shape[-1])

    def write(aside: Path) -> None:
        file = np.lib.format.open_memmap(aside, "w+", dtype, (*grid, patches.shape[-1]))
        for window in windows(grid, side):
            at = slice(window.top, window.bottom), slice(window.left, window.right)
            file[at] = places[at].float().mean(2).cpu().numpy()
        file.flush()

    write_atomically(out, write)


def arguments_of(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for what cannot be."""
    parser = argparse.ArgumentParser("launch.embed_large", description=__doc__)
    parser.add_argument("backbone", help="folder of a backbone, or its id on the Hub, owner/name")
    parser.add_argument("picture", type=Path, help="a tiled TIFF, a slide or an .npy file")
    parser.add_argument("out", type=Path, help=".npy file to write: (rows, columns, d_model)")
    parser.add_argument("--window", type=int, default=2048, help="side of the windows in pixels")
    parser.add_argument("--slice", type=int, help="tokens that a block scans at a time, for less memory; all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 writes float16")
    parser.add_argument("--revision", help="branch, tag or commit of the backbone on the Hub")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    arguments = parser.parse_args(argv)
    require(arguments.window >= 1, "--window", arguments.window, "it must be at least 1")
    require(arguments.slice is None or arguments.slice >= 1, "--slice", arguments.slice, "it must be at least 1")
    out, picture = arguments.out, arguments.picture
    require(out.suffix == ".npy", "out", str(out), "it must end in .npy")
    require(not out.is_dir(), "out", str(out), "it is a folder; give a file")
    same = out.exists() and picture.exists() and out.samefile(picture)
    require(not same, "out", str(out), "it is the picture; choose another name")
    require(arguments.overwrite or not out.exists(), "out", str(out), "it exists: --overwrite")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out.parent}: {error.strerror}") from error
    return arguments


def main(argv: list[str]) -> None:
    """Read, scan, write, and print the file last."""
    arguments = arguments_of(argv)
    model, transform = load(arguments.backbone, revision=arguments.revision)
    weights, numbers = DTYPES[arguments.dtype]
    model = model.to(device_of(arguments.device), weights)
    remedy = "a pooled scan is taken whole; leave it out"
    require(arguments.slice is None or model.config.scan == "full", "--slice", arguments.slice, remedy)
    set_slices(model, arguments.slice)
    with named(arguments.picture):
        picture = open_file(arguments.picture)
    with picture:
        read = WindowReader(picture, model, transform.preprocessing, arguments.window)
        count = sum(1 for _ in windows(read.grid, read.side))
        with ProgressReport(user_console(), "windows", count, 0) as report:
            _, patches = encode_by_window(model, read.grid, watched(read, report, arguments.picture), read.side)
    write_map(arguments.out, patches, read.grid, read.side, numbers)
    print(arguments.out)  # noqa: T201 - the command's result


if __name__ == "__main__":
    sys.exit(run(main))
