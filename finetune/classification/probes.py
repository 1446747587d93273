"""Evaluation of frozen features: nearest neighbours, and a linear probe by logistic regression."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.batches import evaluation_batches
from finetune.classification.config import ClassificationConfig
from finetune.classification.evaluate import Counts, write_tables
from finetune.pixels import on_device
from finetune.task import BatchedSamples, EvaluationResult, Samples, Task
from launch.embedding.probes import linear_probe, nearest_neighbours
from launch.run.accelerator import autocast, gather_in_order
from vim_backbone import UserError


def probe(task: Task[ClassificationConfig], model: nn.Module, accelerator: Accelerator) -> EvaluationResult:
    """Top-1 and top-5 of what the mode says, on features of the middle crop. For all processes."""
    config = task.config.probe
    sizes = task.eval_batch_size(accelerator), task.config.data.workers, task.config.precision
    bank, labels, bad = extract(task.train, model, accelerator, *sizes)
    queries, targets, more_bad = extract(task.val, model, accelerator, *sizes)
    if not accelerator.is_main_process:
        return EvaluationResult()
    classes = len(task.classes)
    extra = {}
    if task.config.mode == "knn":
        if config.neighbours > len(bank):
            raise UserError(f"probe.neighbours is {config.neighbours}: there are {len(bank)} training pictures")
        scores = nearest_neighbours(bank, labels, queries, classes, config.neighbours, config.temperature)
    else:
        scores, penalty = linear_probe(bank, labels, queries, classes, config.penalties)
        extra["penalty"] = penalty
    counts = Counts(classes, scores.device)
    counts.add(scores, targets)
    return EvaluationResult(
        counts.metrics() | extra, lambda folder: write_tables(folder, counts, task.classes), bad + more_bad
    )


def extract(
    samples: Samples | BatchedSamples,
    model: nn.Module,
    accelerator: Accelerator,
    batch_size: int,
    workers: int | None,
    precision: str,
) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Features (n, d) and classes (n,) of all samples, in their order, on all processes; and the unreadable ones."""
    numbers, features, labels = [], [], []
    bad: list[tuple[str, str]] = []
    device = accelerator.device
    for batch in evaluation_batches(samples, accelerator, batch_size, workers):
        bad += batch.bad
        with autocast(precision, device):
            pooled = model(on_device(batch.images, device))
        features.append(pooled.float())
        labels.append(batch.targets.to(device))
        numbers.append(torch.where(torch.tensor(batch.counted), torch.tensor(batch.numbers), -1).to(device))
    _, feature, label = gather_in_order(accelerator, *(torch.cat(parts) for parts in (numbers, features, labels)))
    return feature, label, bad
