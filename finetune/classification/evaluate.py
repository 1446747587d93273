"""Evaluation of a classifier: top-1 and top-5 with every sample counted once, per-class tables, confusion, pictures."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from torch import Tensor, nn

from finetune.batches import evaluation_batches
from finetune.classification.config import ClassificationConfig
from finetune.pixels import on_device
from finetune.task import EvaluationResult, Task
from launch.run.accelerator import autocast
from vim_backbone.preprocessing import as_rgb, to_pixels

MOST_PLOTTED_CLASSES = 60
"""With more classes the confusion is written as a table of pairs only."""
MOST_PAIRS = 1000
METRICS = ("top1", "top5", "loss")
"""Scores of an evaluation: shares of 1, and the mean cross-entropy."""


class Counts:
    """True and predicted class of each sample, hits among the best five, and the loss.

    Samples are kept, not a table of classes by classes, which takes 3.5 GB for the 21 thousand classes of ImageNet.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.pairs = torch.empty(0, dtype=torch.long, device=device)
        """True class * classes + predicted class, of each sample."""
        self.top5 = torch.zeros(classes, dtype=torch.long, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Logits (b, classes) and classes (b,)."""
        self.loss += F.cross_entropy(logits.float(), targets, reduction="sum")
        best = logits.topk(min(5, self.classes)).indices
        self.pairs = torch.cat([self.pairs, targets * self.classes + best[:, 0]])
        hits = (best == targets[:, None]).any(1)
        self.top5 += torch.bincount(targets[hits], minlength=self.classes)

    def share(self, accelerator: Accelerator) -> None:
        """Join those of all processes; whole numbers, so that nothing depends on how samples were shared out."""
        for name in ("top5", "loss"):
            setattr(self, name, accelerator.reduce(getattr(self, name), reduction="sum"))
        every = accelerator.gather(accelerator.pad_across_processes(self.pairs, pad_index=-1))
        assert isinstance(every, Tensor)
        self.pairs = every[every >= 0]

    def of_classes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Samples of each class (classes,), those that were predicted to be of it, and those that are both."""
        true, predicted = self.pairs // self.classes, self.pairs % self.classes
        totals, guesses, hits = (
            torch.bincount(c, minlength=self.classes) for c in (true, predicted, true[true == predicted])
        )
        return totals, guesses, hits

    @property
    def confusion(self) -> Tensor:
        """(classes, classes) samples by true class (row) and predicted class; for few classes."""
        return torch.bincount(self.pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def metrics(self) -> dict[str, float]:
        """METRICS, and the number of samples."""
        samples = max(1, len(self.pairs))
        totals = int(self.of_classes()[2].sum()), int(self.top5.sum()), float(self.loss)
        scores = {name: total / samples for name, total in zip(METRICS, totals, strict=True)}
        return scores | {"samples": float(len(self.pairs))}


def evaluate(task: Task[ClassificationConfig], model: nn.Module, accelerator: Accelerator) -> EvaluationResult:
    """Top-1, top-5 and loss over the validation pictures. For all processes."""
    counts = Counts(len(task.classes), accelerator.device)
    pictured: list[tuple[int, Any]] = []
    bad: list[tuple[str, str]] = []
    for batch in evaluation_batches(task.val, accelerator, task.eval_batch_size(accelerator), task.config.data.workers):
        bad += batch.bad
        images, targets = on_device(batch.images, accelerator.device), batch.targets.to(accelerator.device)
        with autocast(task.config.precision, accelerator.device):
            logits = model(images)
        mask = torch.tensor(batch.counted, device=accelerator.device)
        counts.add(logits[mask], targets[mask])
        for row, number in enumerate(batch.numbers):
            if batch.counted[row] and number in task.pictured:
                picture = as_rgb(to_pixels(images[row], task.pretrained.preprocessing)).permute(1, 2, 0).cpu().numpy()
                pictured.append((number, (picture, int(targets[row]), logits[row].float().softmax(0).cpu())))
    counts.share(accelerator)
    pictured, bad = gather_object(pictured), gather_object(bad)

    def write(folder: Path) -> None:
        write_tables(folder, counts, task.classes)
        draw_predictions(
            folder / "predictions.png", [sample for _, sample in sorted(pictured, key=lambda s: s[0])], task.classes
        )
        if len(task.classes) <= MOST_PLOTTED_CLASSES:
            draw_confusion(folder / "confusion.png", counts.confusion.cpu().numpy(), task.classes)

    return EvaluationResult(counts.metrics(), write, bad)


def write_tables(folder: Path, counts: Counts, classes: list[str]) -> None:
    """classes.csv, and confusion.csv with the pairs that are confused most."""
    true, predicted, hit = (count.tolist() for count in counts.of_classes())
    with open(folder / "classes.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", "samples", "top1", "top5", "precision"])
        for k, name in enumerate(classes):
            shares = hit[k] / max(1, true[k]), int(counts.top5[k]) / max(1, true[k]), hit[k] / max(1, predicted[k])
            table.writerow([name, true[k], *(f"{value:.4f}" for value in shares)])
    confused = counts.pairs[counts.pairs // len(classes) != counts.pairs % len(classes)]
    pairs, numbers = confused.unique(return_counts=True)
    most = numbers.topk(min(MOST_PAIRS, len(numbers)))
    with open(folder / "confusion.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", "predicted", "samples"])
        for count, pair in zip(most.values.tolist(), pairs[most.indices].tolist(), strict=True):
            table.writerow([classes[pair // len(classes)], classes[pair % len(classes)], count])


def draw_predictions(path: Path, samples: list[tuple[np.ndarray, int | None, Tensor]], classes: list[str]) -> None:
    """Pictures (h, w, 3) in [0, 1] with their class, where it is known, and the five best guesses in words and bars."""
    if not samples:
        return
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(3.4 * columns, 4.3 * rows), dpi=80, layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.4, 1] * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (picture, target, shares) in enumerate(samples):
        row, column = divmod(index, columns)
        above, below = axes[2 * row][column], axes[2 * row + 1][column]
        best = shares.topk(min(5, len(classes)))
        above.imshow(picture)
        right = target is None or int(best.indices[0]) == target
        title = classes[target if target is not None else int(best.indices[0])]
        above.set_title(title, color="black" if right else "firebrick", fontsize=12)
        below.barh(
            range(len(best.values)),
            best.values,
            color=["seagreen" if k == target else "0.7" for k in best.indices.tolist()],
        )
        for place, (share, label) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            below.text(0.01, place, f"{classes[label]}  {100 * share:.0f} %", va="center", fontsize=10)
        below.set_xlim(0, 1)
        below.invert_yaxis()
    figure.savefig(path)


def draw_confusion(path: Path, confusion: np.ndarray, classes: list[str]) -> None:
    """Share of each true class (row) that got each prediction (column)."""
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    size = 2.5 + 0.36 * len(classes)
    figure = Figure(figsize=(size + 0.6, size), dpi=80, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    axis.set_xticks(range(len(classes)), classes, rotation=90)
    axis.set_yticks(range(len(classes)), classes)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if len(classes) <= 20:
        for i, j in np.argwhere(confusion):
            color = "white" if shares[i, j] > 0.5 else "black"
            axis.text(j, i, str(confusion[i, j]), ha="center", va="center", fontsize=8, color=color)
    figure.savefig(path)
