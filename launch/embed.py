"""Features of all pictures of a source: `python -m launch.embed BACKBONE SOURCE OUT`; parquet, npy or safetensors.

It lives in launch, which reads pictures, because vim_backbone imports nothing of it.
"""

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all is imported ends this without a traceback

import argparse
import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from launch.data.bad_pictures import reason
from launch.data.first_look import look_at_first
from launch.data.loading import number_of_workers
from launch.data.reading import read_pixels
from launch.data.sources import ImageSource, open_source, what_was_left_out
from launch.data.streams import Stream
from launch.embedding.features import KINDS, Wanted, compute
from launch.embedding.outputs import WRITERS, check_output
from launch.embedding.pages import draw_components, draw_neighbours, nearest_neighbours, thumbnail
from launch.embedding.parts import Parts
from launch.run.cli import run
from launch.run.progress import ProgressReport, user_console
from vim_backbone import Transform, VisionMamba, load
from vim_backbone.errors import UserError, first_line, require
from vim_backbone.folder import WEIGHTS
from vim_backbone.hub import find_backbone
from vim_backbone.preprocessing import read_preprocessing

PART = 256
"""Pictures of a part: what a killed command loses at most."""
ROW_PATCHES = 1 << 16
"""Patches that are packed into one row, at most, but of a picture that has more alone."""
AHEAD = 4
"""Pictures that are read ahead, for each thread that reads."""


class Reader:
    """Pictures of a source as a backbone's input."""

    def __init__(self, source: ImageSource, transform: Transform, max_megapixels: float) -> None:
        self.source, self.transform, self.max_megapixels = source, transform, max_megapixels

    def __call__(self, index: int) -> Tensor:
        """(1, c, h, w). Raises anything that a decoder raises."""
        with self.source.open(index) as picture:
            return self.transform.from_values(read_pixels(picture, self.transform.preprocessing, self.max_megapixels))

    def look(self, index: int) -> Tensor:
        """The picture to look at, small."""
        return thumbnail(self(index), self.transform.preprocessing)


def read_ahead(read: Reader, indices: range, threads: int) -> Iterator[tuple[int, Tensor | str]]:
    """Pictures in their order, each read by one of some threads; the reason in place of one that is bad."""

    def attempt(index: int) -> Tensor | str:
        try:
            return read(index)
        except Exception as error:  # a decoder may raise anything on damaged data
            return reason(error)

    with ThreadPoolExecutor(threads) as pool:
        left = iter(indices)
        waiting: list[tuple[int, Future[Tensor | str]]] = []
        for index in left:
            waiting.append((index, pool.submit(attempt, index)))
            if len(waiting) > AHEAD * threads:
                first, result = waiting.pop(0)
                yield first, result.result()
        yield from ((index, result.result()) for index, result in waiting)


def embed_part(
    model: VisionMamba, pictures: Iterator[tuple[int, Tensor | str]], wanted: Wanted, batch_size: int
) -> tuple[dict[int, dict[str, Tensor]], dict[int, str]]:
    """The features of pictures by index, and why others are bad."""
    features: dict[int, dict[str, Tensor]] = {}
    bad: dict[int, str] = {}
    batch: dict[int, Tensor] = {}

    def flush() -> None:
        if batch:
            device = model.pos_embed.device
            images = [image[0].to(device, non_blocking=True) for image in batch.values()]
            features.update(zip(batch, compute(model, images, wanted), strict=True))
            batch.clear()

    patches = 0
    for index, picture in pictures:
        if isinstance(picture, str):
            bad[index] = picture
            continue
        rows, columns = model.config.grid(*picture.shape[-2:])
        count = rows * columns * model.config.tokens_a_patch(picture.shape[1])
        if len(batch) == batch_size or patches + count > ROW_PATCHES:
            flush()
            patches = 0
        batch[index] = picture
        patches += count
    flush()
    return features, bad


def draw(folder: Path, model: VisionMamba, read: Reader, parts: Parts, samples: int) -> None:
    """Write components.png and neighbours.png of some pictures, spread over the source."""
    indices, pooled = [], []
    for tensors, _ in parts.read(["pooled"]):
        indices += tensors["index"].tolist()
        pooled += [tensors["pooled"]] if len(tensors["index"]) else []
    count = min(samples, len(indices))
    rows = [place * len(indices) // count for place in range(count)]
    chosen = [indices[row] for row in rows]
    images = [read(index).to(model.pos_embed.device) for index in chosen]
    maps = [compute(model, [image[0]], Wanted(("patches",)))[0]["patches"] for image in images]
    names = [read.source.name(index) for index in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [thumbnail(image, read.transform.preprocessing) for image in images]
    draw_components(folder / "components.png", pictures, maps, names)
    if len(indices) > 1:
        cosines, found = nearest_neighbours(torch.cat(pooled), rows)
        places = torch.tensor(indices)[found]
        draw_neighbours(folder / "neighbours.png", chosen, cosines, places, read.look, read.source.name)


def arguments_of(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a number out of range."""
    parser = argparse.ArgumentParser("launch.embed", description=__doc__)
    parser.add_argument("backbone", help="folder of a backbone, or its id on the Hub, owner/name")
    parser.add_argument("source", help="a folder of pictures, .parquet, .arrow, .tar or .zip files, hf:NAME, or photos")
    parser.add_argument("out", type=Path, help=f"file to write, ending in {', '.join(WRITERS)}")
    parser.add_argument("--features", nargs="*", default=["pooled"], help=f"any of {', '.join(KINDS)}")
    parser.add_argument(
        "--layers", nargs="*", type=int, default=[], help="blocks, from 0 or from the end: means of patches"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", help="side, or height and width, to resize to; native when not given"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the backbone on the Hub")
    parser.add_argument("--split", default="train", help="split of a data set")
    parser.add_argument("--column", help="image column of a data set; the first one when not given")
    parser.add_argument("--max_megapixels", type=float, default=50.0, help="larger pictures count as bad")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures packed into one row, at most")
    parser.add_argument("--workers", type=int, help="threads that read pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument(
        "--pictures", type=int, default=0, metavar="N", help="draw components and neighbours of N samples"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with what a killed command left")
    again.add_argument("--overwrite", action="store_true", help="begin anew")
    arguments = parser.parse_args(argv)
    require(arguments.batch_size >= 1, "--batch_size", arguments.batch_size, "it must be at least 1")
    require(arguments.pictures >= 0, "--pictures", arguments.pictures, "it cannot be negative")
    require(
        arguments.workers is None or arguments.workers >= 1, "--workers", arguments.workers, "it must be at least 1"
    )
    sides = arguments.size or [1]
    require(len(sides) <= 2 and min(sides) >= 1, "--size", arguments.size, "give a side, or height and width")
    return arguments


def main(argv: list[str]) -> None:
    """Embed, name bad pictures, and print the file last."""
    arguments = arguments_of(argv)
    console = user_console()
    out: Path = arguments.out
    size = None if arguments.size is None else (arguments.size[0], arguments.size[-1])
    folder = find_backbone(arguments.backbone, arguments.revision)
    model, transform = load(folder, size=size)
    try:
        model = model.to(arguments.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        why = f"--device {arguments.device} cannot be used ({first_line(error)})"
        raise UserError(f"{why}: give cuda or cpu") from error
    wanted = Wanted.of(model, arguments.features, arguments.layers)
    check_output(out, wanted, size is not None)
    source = open_source(arguments.source, split=arguments.split, column=arguments.column, streaming=False)
    assert not isinstance(source, Stream)
    look_at_first(source, transform.preprocessing, arguments.max_megapixels)
    parts = Parts(out, len(source), PART)
    parts.start(settings_of(arguments, folder, source, wanted, size), out, arguments.resume, arguments.overwrite)
    for line in what_was_left_out(source):
        console.print(line, markup=False)
    read = Reader(source, transform, arguments.max_megapixels)
    bad = {index: why for _, some in parts.read([], parts.done()) for index, why in some.items()}
    with ProgressReport(console, "pictures", len(source), min(parts.done() * PART, len(source))) as report:
        for part in range(parts.done(), parts.count):
            threads = number_of_workers(arguments.workers)
            done = watched(
                read_ahead(read, parts.indices(part), threads), report, part * PART, len(bad), arguments.batch_size
            )
            features, more = embed_part(model, done, wanted, arguments.batch_size)
            parts.write(part, features, more)
            bad |= more
            for index, why in more.items():
                console.print(f"cannot use {source.name(index)}: {why}", markup=False)
    if len(bad) == len(source):
        raise UserError(f"none of {len(source)} pictures can be used, the first {source.name(0)} ({bad[0]})")
    if bad:
        console.print(f"{len(bad)} of {len(source)} pictures cannot be used, they have no row", markup=False)
    WRITERS[out.suffix](out, parts, wanted, source.name)
    if arguments.pictures:
        draw(out.with_name(f"{out.stem}_pictures"), model, read, parts, arguments.pictures)
    parts.remove()
    print(out)  # noqa: T201 - the command's result


def settings_of(
    arguments: argparse.Namespace, folder: Path, source: ImageSource, wanted: Wanted, size: tuple[int, int] | None
) -> dict[str, object]:
    """What the features depend on: a command that goes on must have the same."""
    with open(folder / WEIGHTS, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    preprocessing = read_preprocessing(folder).to_dict()
    names = hashlib.sha256()
    for index in range(len(source)):
        names.update(source.name(index).encode() + b"\0")
    return {
        "weights": weights, "preprocessing": preprocessing, "pictures": names.hexdigest(), "split": arguments.split,
        "column": arguments.column,
        "features": wanted.kinds, "layers": wanted.layers, "size": size, "max_megapixels": arguments.max_megapixels,
    }  # fmt: skip


def watched(
    pictures: Iterator[tuple[int, Tensor | str]], report: ProgressReport, before: int, bad: int, batch_size: int
) -> Iterator[tuple[int, Tensor | str]]:
    """The same, with the progress said after each batch."""
    done = before
    while some := list(islice(pictures, batch_size)):
        yield from some
        done += len(some)
        bad += sum(isinstance(picture, str) for _, picture in some)
        report.update(done, "  ".join(filter(None, [report.rate(), f"{bad} bad" if bad else ""])))


if __name__ == "__main__":
    sys.exit(run(main))
