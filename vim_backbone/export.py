"""A backbone as a file that runs without this package: `python -m vim_backbone.export BACKBONE OUT --format onnx`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from vim_backbone.config import VimConfig
from vim_backbone.errors import UserError, first_line, nearest
from vim_backbone.files import explain, remove
from vim_backbone.hub import find_backbone
from vim_backbone.preprocessing import Preprocessing, preprocessor, read_preprocessing
from vim_backbone.pretrained import from_pretrained
from vim_backbone.programs import FORMATS, PicturesIn, Run, trace
from vim_backbone.vim import VisionMamba

Feature = Literal["logits", "pooled", "class", "patches"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference to the model in float32, as a share of an output's largest value (of 1 where that is less)."""


class Subject(NamedTuple):
    """What becomes a program."""

    model: nn.Module
    """In float32."""
    outputs: Callable[[Any, Tensor], Sequence[Tensor]]
    """Of the model and pictures (b, c, h, w)."""
    names: Sequence[str]
    """Of the outputs."""
    config: VimConfig
    """Of the backbone, which says what pictures it takes."""
    texts: dict[str, str]
    """What is put into the file."""


class Exported(NamedTuple):
    """What was written."""

    path: Path
    difference: float
    """The largest to the model at the sizes tried, as `TOLERANCES` counts it."""
    sizes: list[tuple[int, int, int]]
    """Batch, height and width of the pictures tried."""


def export(
    name: str | Path,
    out: str | Path,
    *,
    format: str = "onnx",  # noqa: A002 - the word of the command
    dtype: str = "float32",
    features: Sequence[str] | None = None,
    revision: str | None = None,
) -> Exported:
    """Write a backbone as a program of pictures (batch, channels, height, width), normalised, of any size.

    The program is run at two sizes and held to the model before it is put at `out`.

    Args:
        name: folder of a backbone, or its id on the Hub.
        out: file to write, ending in .onnx, or .pt2 for the two others.
        format: "onnx"; "exported", for `torch.export.load`; "aoti", for `torch._inductor.aoti_load_package`.
        dtype: of weights and products: "float32", "float16" or "bfloat16". Input and outputs stay float32.
        features: outputs, in this order: "logits" (b, num_classes), "pooled" (b, d_model), "class" (b, d_model), the
            class token, "patches" (b, d_model, rows, columns). None: logits, or pooled where there is no classifier.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: no backbone, a file at `out`, an unknown word, a missing package or compiler, or a program whose
            output is not the model's.
    """
    out = Path(out)
    check_request(out, format, dtype)
    folder = find_backbone(name, revision)
    model = from_pretrained(folder)
    names = check_features(features, model.config)
    texts = describe(model.config, read_preprocessing(folder))
    subject = Subject(model, partial(outputs_of, names), names, model.config, texts)
    return write_program(subject, out, format, dtype)


def outputs_of(names: Sequence[str], model: VisionMamba, images: Tensor) -> list[Tensor]:
    """The outputs of these names."""
    tokens = model.forward_features(images)
    special = model.num_prefix_tokens
    patches = tokens[:, special:]
    if model.channel_embed is not None:
        patches = patches.unflatten(1, (-1, images.shape[1])).mean(2)
    outputs: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: model.forward_head(tokens),
        "pooled": lambda: model.forward_head(tokens, pre_logits=True),
        "class": lambda: tokens[:, 0],
        "patches": lambda: patches.transpose(1, 2).unflatten(2, model.config.grid(*images.shape[-2:])),
    }
    return [outputs[name]() for name in names]


def check_request(out: Path, format: str, dtype: str) -> None:  # noqa: A002 - as above
    """Raise UserError for a file that cannot be made, before anything is read."""
    if format not in FORMATS:
        raise UserError(f"format is {format!r}: {nearest(format, FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: {nearest(dtype, DTYPES)}")
    if format == "onnx" and dtype == "bfloat16":
        raise UserError("dtype is bfloat16: onnxruntime has no convolution of it on CPUs, take float16 or float32")
    kind = FORMATS[format]
    if out.suffix != kind.ending:
        raise UserError(f"OUT is {out}: a file of format {format} ends in {kind.ending}")
    try:
        for file in (out, out.with_name(f"{out.name}.data")):  # the second one has the weights of a large ONNX file
            if file.exists():
                raise UserError(f"OUT is {out}, but {file} exists: give another name, or delete it")
        if not out.parent.is_dir():
            raise UserError(f"OUT is {out}: the folder {out.parent} does not exist")
    except OSError as error:
        raise UserError(f"OUT cannot be {str(out)[:80]}: {explain(error)}") from error
    kind.check()


def check_features(features: Sequence[str] | None, config: VimConfig) -> list[str]:
    """The outputs asked for. Raises UserError for those that the backbone does not have."""
    names = list(features or (["logits"] if config.num_classes else ["pooled"]))
    for name in names:
        if name not in get_args(Feature):
            raise UserError(f"features has {name!r}: {nearest(name, get_args(Feature))}")
    if "logits" in names and not config.num_classes:
        raise UserError("features has 'logits': the backbone has no classifier, take pooled")
    if "class" in names and config.class_token == "none":
        raise UserError("features has 'class': the backbone has no class token, take pooled")
    if len(set(names)) < len(names):
        raise UserError(f"features is {names}: name each one once")
    return names


def describe(config: VimConfig, preprocessing: Preprocessing) -> dict[str, str]:
    """What goes into the file as texts: how pictures are normalised, and the sizes that fit."""
    return {
        "preprocessor_config": json.dumps(preprocessor(config, preprocessing)),
        "stride": str(config.stride),
        "patch_size": str(config.patch_size),
    }


def fewest_strides(config: VimConfig) -> int:
    """Strides of a side that has one patch."""
    return -(-config.patch_size // config.stride)


def sizes_to_try(config: VimConfig) -> list[tuple[int, int, int]]:
    """Batch, height and width: two pictures of the size of training, and one of another shape and size."""
    height, width = config.img_size
    smallest = (fewest_strides(config) + 1) * config.stride
    return [
        (2, height, width),
        (1, max(smallest, height + 2 * config.stride), max(smallest, config.padded(width // 2))),
    ]


def write_program(subject: Subject, out: Path, format: str, dtype: str) -> Exported:  # noqa: A002 - as above
    """Trace, write, run and compare, then put in place. Raises UserError where any of it fails."""
    model, outputs, names, config, texts = subject
    if config.num_registers:
        raise UserError(
            f"num_registers is {config.num_registers}: a program leaves the size open, on which their places depend"
        )
    kind, sizes, model = FORMATS[format], sizes_to_try(config), model.eval().requires_grad_(False)
    pictures = [draw(size, config.in_chans) for size in sizes]
    with torch.no_grad():
        expected = [[output.float() for output in outputs(model, images)] for images in pictures]
    model = model.to(DTYPES[dtype])
    program = trace(PicturesIn(model, outputs), config.in_chans, config.stride, fewest_strides(config))
    aside = out.with_name(f".{out.name}.partial")
    try:
        remove(aside)
        aside.mkdir()
        kind.write(program, aside / out.name, names, texts)
        worst = compare(kind.load(aside / out.name), pictures, expected, names, TOLERANCES[dtype])
        for file in aside.iterdir():  # a large ONNX file has its weights beside it
            os.replace(file, out.parent / file.name)
    except OSError as error:
        raise UserError(f"cannot write {out}: {explain(error)}") from error
    finally:
        remove(aside)
    return Exported(out, worst, sizes)


def draw(size: tuple[int, int, int], channels: int) -> Tensor:
    """Pictures of noise, as if normalised."""
    batch, height, width = size
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height))


def compare(
    run: Run, pictures: list[Tensor], expected: list[list[Tensor]], names: Sequence[str], tolerance: float
) -> float:
    """The largest difference between a program's outputs and those expected. Raises UserError beyond the tolerance."""
    worst = 0.0
    for images, targets in zip(pictures, expected, strict=True):
        size = "{} x {} x {} x {}".format(*images.shape)
        try:
            with torch.no_grad():
                outputs = list(run(images))
        except Exception as error:  # a runtime raises anything
            raise UserError(f"the program does not run on pictures {size}: {first_line(error)}") from error
        for name, a, b in zip(names, outputs, targets, strict=True):
            if a.shape != b.shape:
                raise UserError(
                    f"{name} of the program has shape {tuple(a.shape)} for {size}, the model's {tuple(b.shape)}"
                )
            difference = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
            if not difference <= tolerance:
                raise UserError(
                    f"{name} of the program differs from the model's by {difference:.1e} for pictures {size}, "
                    f"more than {tolerance:.0e}: nothing was written"
                )
            worst = max(worst, difference)
    return worst


def main(argv: list[str] | None = None) -> int:
    """Command line; prints one line on an error and returns 2."""
    parser = argparse.ArgumentParser(prog="python -m vim_backbone.export", description=__doc__)
    parser.add_argument("backbone", help="folder of a backbone, or its id on the Hub")
    parser.add_argument("out", type=Path, help="file to write: .onnx, or .pt2 for the other formats")
    add_options(parser)
    parser.add_argument("--features", nargs="+", metavar="NAME", help=f"outputs: {', '.join(get_args(Feature))}")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    arguments = parser.parse_args(argv)
    try:
        done = export(
            arguments.backbone, arguments.out, format=arguments.format, dtype=arguments.dtype,
            features=arguments.features, revision=arguments.revision,
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - command line
        return 2
    print(summary(done))  # noqa: T201 - command line
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that exports."""
    parser.add_argument("--format", default="onnx", help=f"{', '.join(FORMATS)} (onnx)")
    parser.add_argument("--dtype", default="float32", help=f"of weights and products: {', '.join(DTYPES)} (float32)")


def summary(done: Exported) -> str:
    """The result in a line."""
    tried = ", ".join(f"{b} x {h} x {w}" for b, h, w in done.sizes)
    return f"{done.path}: {done.difference:.1e} from the model at {tried}"


if __name__ == "__main__":
    sys.exit(main())
