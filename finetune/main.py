"""Entry of fine-tuning: `accelerate launch finetune/main.py TASK --backbone FOLDER --data.source FOLDER [...]`."""

if not __package__:  # started as a file: import from this checkout, never from the folder of this file
    import sys
    from pathlib import Path

    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(_ROOT), str(_ROOT / "kernels")]

import os
from collections.abc import Callable
from typing import Any

from finetune.classification import task as classification
from finetune.classification.config import ClassificationConfig
from finetune.detection import task as detection
from finetune.detection.config import DetectionConfig
from finetune.segmentation import task as segmentation
from finetune.segmentation.config import SegmentationConfig
from launch.run.cli import leave, parse, run
from vim_backbone.errors import UserError, nearest

TASKS: dict[str, tuple[type[Any], Callable[..., Any], str]] = {
    "classification": (ClassificationConfig, classification.run, "One class a picture: fine-tune, linear probe, kNN."),
    "detection": (DetectionConfig, detection.run, "Boxes and masks of objects: Mask R-CNN, Cascade; COCO's AP."),
    "segmentation": (SegmentationConfig, segmentation.run, "A class for each pixel: UperNet; mIoU."),
}

HELP = """usage: finetune/main.py TASK --backbone FOLDER --data.source FOLDER [--config FILE.yaml] [--field VALUE ...]

Fine-tune a published Vision Mamba backbone, evaluate it, and publish the whole model.

tasks:
"""


def main(argv: list[str]) -> None:
    """Parse, train, and print the run's folder last."""
    task = argv[0] if argv else "--help"
    if task in ("-h", "--help"):
        lines = [f"  {name:16}{summary}" for name, (_, _, summary) in TASKS.items()]
        print(HELP + "\n".join(lines) + "\n\nfinetune/main.py TASK --help explains every field.")  # noqa: T201
        return
    if task not in TASKS:
        raise UserError(f"the first argument is {task!r}, it must be the task: {nearest(task, TASKS)}")
    config_class, start, summary = TASKS[task]
    folder = start(parse(config_class, argv[1:], f"finetune/main.py {task}", summary))
    if os.environ.get("RANK", "0") == "0":
        print(folder)  # noqa: T201 - the command's result


if __name__ == "__main__":
    leave(run(main))
