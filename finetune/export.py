"""A fine-tuned model as a file that runs without this repository: `python -m finetune.export RUN OUT --format onnx`."""

import argparse
import json
import sys
from pathlib import Path

import torch

from finetune.predict import load_predictor
from launch.run.cli import run
from vim_backbone.errors import UserError
from vim_backbone.export import Exported, Subject, add_options, check_request, describe, summary, write_program

OUTPUTS = {"classification": "logits", "segmentation": "logits"}
"""Task -> name of what its model gives: of a classifier (b, classes), of a segmenter (b, classes, height, width)."""


def export(run_folder: Path, out: Path, *, format: str = "onnx", dtype: str = "float32") -> Exported:  # noqa: A002
    """Write the model of a run as `vim_backbone.export.export` writes a backbone; the classes are in the file's texts.

    Raises UserError as that does, and for a task whose model cannot be a program.
    """
    check_request(out, format, dtype)
    predictor = load_predictor(run_folder, torch.device("cpu"))
    task = predictor.description["task"]
    if task not in OUTPUTS:
        raise UserError(
            f"{run_folder} holds a model of the task {task}, which finds another number of boxes in every picture: "
            f"no program here can; export {run_folder / 'backbone'} with vim_backbone.export"
        )
    texts = describe(predictor.config, predictor.preprocessing) | {"classes": json.dumps(predictor.classes)}
    subject = Subject(
        predictor.model, lambda model, images: [model(images)], [OUTPUTS[task]], predictor.config, texts
    )  # fmt: skip
    return write_program(subject, out, format, dtype)


def main(argv: list[str]) -> None:
    """Export, and print the result in a line."""
    parser = argparse.ArgumentParser("finetune.export", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a fine-tuning run, such as runs/classification")
    parser.add_argument("out", type=Path, help="file to write: .onnx, or .pt2 for the other formats")
    add_options(parser)
    arguments = parser.parse_args(argv)
    print(summary(export(arguments.run, arguments.out, format=arguments.format, dtype=arguments.dtype)))  # noqa: T201


if __name__ == "__main__":
    sys.exit(run(main))
