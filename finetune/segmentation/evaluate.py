"""Evaluation of a segmenter: mIoU, aAcc and mAcc as mmsegmentation defines them, per-class table, overlays."""

import csv
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from finetune.batches import evaluation_batches
from finetune.palette import palette
from finetune.segmentation.config import SegmentationConfig
from finetune.segmentation.data import IGNORED
from finetune.segmentation.model import resize
from finetune.segmentation.windows import Windows
from finetune.task import EvaluationResult, Task
from launch.run.accelerator import autocast
from launch.state.sharding import zero_stage
from vim_backbone.preprocessing import as_rgb, to_model, to_pixels

METRICS = ("mIoU", "mAcc", "aAcc")
"""Scores of an evaluation, as shares of 1."""
MOST_NAMED = 12
"""Classes that a picture's legend names."""
WIDEST = 512
"""Pixels in a row that are drawn of a picture, at most twice as many: a panel is 256 wide."""


def confusion_of(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """(classes, classes) pixels by true class (row) and predicted class (column), ignored ones left out."""
    labelled = target != IGNORED
    pairs = target[labelled].long() * classes + predicted[labelled].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_scores(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and accuracy of each class, float64; NaN for a class that is nowhere, or has no pixel to find."""
    hit = confusion.diagonal().double()
    true, predicted = confusion.sum(1).double(), confusion.sum(0).double()
    return hit / (true + predicted - hit), hit / true


def scores(confusion: Tensor) -> dict[str, float]:
    """METRICS: mIoU and mAcc are means over classes that occur, aAcc is over pixels."""
    iou, accuracy = class_scores(confusion)
    of_pixels = float(confusion.diagonal().sum()) / max(1, int(confusion.sum()))
    return dict(zip(METRICS, (float(iou.nanmean()), float(accuracy.nanmean()), of_pixels), strict=True))


def evaluate(
    task: Task[SegmentationConfig], model: nn.Module, accelerator: Accelerator, windows: Windows
) -> EvaluationResult:
    """Segment the validation pictures at the size of their maps. For all processes."""
    device, classes = accelerator.device, len(task.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.long, device=device)
    samples = torch.zeros((), dtype=torch.long, device=device)
    pictured, bad = [], []
    for batch in evaluation_batches(task.val, accelerator, 1, task.config.data.workers):
        bad += batch.bad
        preprocessing = task.pretrained.preprocessing
        image = to_model(batch.images[0][None], device, preprocessing)
        target = batch.targets[0].to(device, non_blocking=True)
        # exchanged before the passes: under ZeRO-3 they exchange too, and all exchanges must come in one order
        passes = windows.passes(*image.shape[-2:])
        idle = most_of(passes, accelerator) - passes if zero_stage(accelerator) == 3 else 0
        with autocast(task.config.precision, accelerator.device):
            logits = windows.logits(model, image)
            windows.idle(model, image, idle)
        if not batch.counted[0]:
            continue
        predicted = resize(logits.float(), target.shape).argmax(1)[0]
        confusion += confusion_of(predicted, target, classes)
        samples += 1
        if batch.numbers[0] in task.pictured:
            picture = resize(as_rgb(to_pixels(image, preprocessing)), target.shape)[0].permute(1, 2, 0).cpu().numpy()
            pictured.append((batch.numbers[0], picture, target.cpu().numpy(), predicted.cpu().numpy()))
    confusion, samples = (accelerator.reduce(value, reduction="sum") for value in (confusion, samples))
    assert isinstance(confusion, Tensor)
    assert isinstance(samples, Tensor)
    pictured, bad = gather_object(pictured), gather_object(bad)

    def write(folder: Path) -> None:
        write_table(folder / "classes.csv", confusion.cpu(), task.classes)
        panels = [entry[1:] for entry in sorted(pictured, key=lambda entry: entry[0])]
        draw_overlays(folder / "predictions.png", panels, task.classes)

    return EvaluationResult(scores(confusion) | {"samples": float(samples)}, write, bad)


def most_of(number: int, accelerator: Accelerator) -> int:
    """The largest of the processes' numbers."""
    every = accelerator.gather(torch.tensor([number], device=accelerator.device))
    assert isinstance(every, Tensor)
    return int(every.max())


def write_table(path: Path, confusion: Tensor, classes: list[str]) -> None:
    """Pixels, IoU, accuracy and precision of each class."""
    iou, accuracy = class_scores(confusion)
    precision = confusion.diagonal().double() / confusion.sum(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", "pixels", "IoU", "accuracy", "precision"])
        for k, name in enumerate(classes):
            values = (f"{float(value[k]):.4f}" for value in (iou, accuracy, precision))
            table.writerow([name, int(confusion[k].sum()), *values])


def overlay(picture: np.ndarray, labels: np.ndarray, colours: np.ndarray, clear: int | None = None) -> np.ndarray:
    """Picture (h, w, 3) in [0, 1], in grey, with its labels (h, w) laid over it, ignored pixels black.

    `clear`: a class that is not laid over it.
    """
    grey = picture.mean(-1, keepdims=True)
    coloured = np.where((labels == IGNORED)[..., None], 0.0, colours[np.minimum(labels, len(colours) - 1)])
    return np.where((labels == clear)[..., None], grey, 0.4 * grey + 0.6 * coloured)


def draw_overlays(
    path: Path, panels: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]], classes: list[str]
) -> None:
    """One row a picture: itself, its map where there is one, the prediction; with a legend of what is seen most."""
    if not panels:
        return
    titles = ["picture", "annotation", "prediction"] if panels[0][1] is not None else ["picture", "prediction"]
    colours = palette(len(classes))
    clear = next((k for k, name in enumerate(classes) if name.strip().lower() == "background"), None)
    figure = Figure(figsize=(3.2 * len(titles), 2.6 * len(panels) + 0.9), dpi=80, layout="constrained")
    axes = figure.subplots(len(panels), len(titles), squeeze=False)
    pixels = np.zeros(len(classes), dtype=np.int64)
    for row, (picture, target, predicted) in zip(axes, panels, strict=True):
        maps = [labels for labels in (target, predicted) if labels is not None]
        step = max(1, picture.shape[1] // WIDEST)
        seen = picture[::step, ::step]
        panels_of_row = [seen, *(overlay(seen, labels[::step, ::step], colours, clear) for labels in maps)]
        for axis, panel in zip(row, panels_of_row, strict=True):
            axis.imshow(panel.clip(0, 1))
            axis.set_axis_off()
        for labels in maps:
            pixels += np.bincount(labels[labels != IGNORED].ravel(), minlength=len(classes))
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)
    most = [k for k in np.argsort(-pixels)[:MOST_NAMED] if pixels[k] and k != clear]
    handles = [Patch(color=tuple(colours[k].tolist()), label=classes[k]) for k in most]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.savefig(path)
