"""The command's options, and what each of its forms does: open the backbone, keep the settings, write the file."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from vim_backbone.embedding.features import KINDS, Selection
from vim_backbone.embedding.outputs import WRITERS, check_output
from vim_backbone.embedding.parts import Parts
from vim_backbone.embedding.work import ALL, Pictures, Progress, Share, embed_share
from vim_backbone.errors import UserError, require
from vim_backbone.folder import WEIGHTS
from vim_backbone.hub import find_backbone
from vim_backbone.preprocessing import read_preprocessing
from vim_backbone.pretrained import device_of, from_pretrained
from vim_backbone.transform import Transform
from vim_backbone.vim import VisionMamba

Say = Callable[[str], None]
"""What shows a line to the user."""


def parser_of(program: str, description: str | None, sources: str) -> argparse.ArgumentParser:
    """The options of every form of the command; `sources` says what it reads."""
    parser = argparse.ArgumentParser(program, description=description)
    parser.add_argument("backbone", help="folder of a backbone, or its id on the Hub, owner/name")
    parser.add_argument("source", help=sources)
    parser.add_argument("out", type=Path, help=f"file to write, ending in {', '.join(WRITERS)}")
    parser.add_argument("--features", nargs="*", default=["pooled"], help=f"any of {', '.join(KINDS)}")
    parser.add_argument(
        "--layers", nargs="*", type=int, default=[], help="blocks, from 0 or from the end: means of patches"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", help="side, or height and width, to resize to; native when not given"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the backbone on the Hub")
    parser.add_argument("--max_megapixels", type=float, default=50.0, help="larger pictures count as bad")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures packed into one row, at most")
    parser.add_argument("--workers", type=int, help="threads that read pictures")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: matrix products in it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with what a killed command left")
    again.add_argument("--overwrite", action="store_true", help="begin anew")
    return parser


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raise UserError for a number out of range."""
    require(arguments.batch_size >= 1, "--batch_size", arguments.batch_size, "it must be at least 1")
    require(
        arguments.workers is None or arguments.workers >= 1, "--workers", arguments.workers, "it must be at least 1"
    )
    pixels = arguments.max_megapixels
    require(0 < pixels < float("inf"), "--max_megapixels", pixels, "it must be positive and finite")
    sides = arguments.size or [1]
    require(len(sides) <= 2 and min(sides) >= 1, "--size", arguments.size, "give a side, or height and width")


class Job(NamedTuple):
    """What is computed: a backbone, what makes its input, the features, the file."""

    arguments: argparse.Namespace
    folder: Path
    model: VisionMamba
    transform: Transform
    selection: Selection

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Job":
        """Opened and checked. Raises UserError for options, a backbone, a device or a file that cannot be."""
        check_numbers(arguments)
        size = None if arguments.size is None else (arguments.size[0], arguments.size[-1])
        folder = find_backbone(arguments.backbone, arguments.revision)
        model = from_pretrained(folder, num_classes=0)
        transform = Transform(
            read_preprocessing(folder), model.config, size=size, max_megapixels=arguments.max_megapixels
        )
        model = model.to(device_of(arguments.device))
        selection = Selection.of(model, arguments.features, arguments.layers)
        check_output(arguments.out, selection, size is not None)
        return cls(arguments, folder, model, transform, selection)

    def settings(self, pictures: Pictures, **more: object) -> dict[str, object]:
        """What the features depend on, and `more`: a command that goes on must have the same."""
        with open(self.folder / WEIGHTS, "rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        names = hashlib.sha256()
        for index in range(len(pictures)):
            names.update(pictures.name(index).encode() + b"\0")
        return {
            "weights": weights, "preprocessing": self.transform.preprocessing.to_dict(), "pictures": names.hexdigest(),
            "features": self.selection.kinds, "layers": self.selection.layers, "size": self.transform.size,
            "max_megapixels": self.transform.max_megapixels, "precision": self.arguments.precision,
        } | more  # fmt: skip

    def start(self, parts: Parts, settings: dict[str, object]) -> None:
        """Make the folder of parts, or go on with it. Raises UserError as `Parts.start`."""
        parts.start(settings, self.arguments.out, self.arguments.resume, self.arguments.overwrite)

    def compute(
        self,
        pictures: Pictures,
        parts: Parts,
        threads: int,
        name_bad: Say,
        report: Callable[[Progress], None],
        share: Share = ALL,
    ) -> None:
        """The parts of this process; see `embed_share`."""
        bf16 = self.arguments.precision == "bf16"
        try:
            with torch.autocast(self.model.pos_embed.device.type, torch.bfloat16, enabled=bf16):
                embed_share(
                    self.model, pictures, self.selection, parts, batch_size=self.arguments.batch_size, threads=threads,
                    name_bad=name_bad, report=report, share=share,
                )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise UserError("the device is out of memory: take a smaller --batch_size, or --size") from error

    def write(self, pictures: Pictures, parts: Parts, say: Say) -> None:
        """The file, of all parts. Raises UserError where no picture could be used."""
        bad = parts.bad()
        if len(bad) == len(pictures):
            why = f"the first {pictures.name(0)} ({bad[0]})"
            raise UserError(f"none of {len(pictures)} pictures can be used, {why}")
        if bad:
            say(f"{len(bad)} of {len(pictures)} pictures cannot be used, they have no row")
        out: Path = self.arguments.out
        WRITERS[out.suffix](out, parts, self.selection, pictures.name)
