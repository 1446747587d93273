"""Evaluation of frozen features: nearest neighbours, and a linear probe by logistic regression."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.batches import evaluation_batches
from finetune.classification.config import ClassificationConfig
from finetune.classification.evaluate import Counts, write_tables
from finetune.pixels import on_device
from finetune.task import EvaluationResult, Samples, Task
from vim_backbone import UserError

HELD_OUT = 10
"""One in so many training pictures chooses the penalty of the linear probe."""
ITERATIONS = 300


def probe(task: Task[ClassificationConfig], model: nn.Module, accelerator: Accelerator) -> EvaluationResult:
    """Top-1 and top-5 of what the mode says, on features of the middle crop. For all processes."""
    config = task.config.probe
    sizes = task.eval_batch_size(accelerator), task.config.data.workers
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
    samples: Samples, model: nn.Module, accelerator: Accelerator, batch_size: int, workers: int | None
) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Features (n, d) and classes (n,) of all samples, in their order, on all processes; and the unreadable ones."""
    numbers, features, labels = [], [], []
    bad: list[tuple[str, str]] = []
    device = accelerator.device
    for batch in evaluation_batches(samples, accelerator, batch_size, workers):
        bad += batch.bad
        with accelerator.autocast():
            pooled = model(on_device(batch.images, device))
        features.append(pooled.float())
        labels.append(batch.targets.to(device))
        numbers.append(torch.where(torch.tensor(batch.counted), torch.tensor(batch.numbers), -1).to(device))
    shares = [torch.cat(parts) for parts in (numbers, features, labels)]
    number, feature, label = (
        accelerator.gather(accelerator.pad_across_processes(share, pad_index=-1)) for share in shares
    )
    assert isinstance(number, Tensor)
    assert isinstance(feature, Tensor)
    assert isinstance(label, Tensor)
    order = number.argsort()[(number < 0).sum() :]
    return feature[order], label[order], bad


def nearest_neighbours(
    bank: Tensor, labels: Tensor, queries: Tensor, classes: int, neighbours: int, temperature: float
) -> Tensor:
    """Log of the shares (queries, classes) of votes of the nearest by cosine, each weighing exp(cosine / temperature).

    As DINO has it (arXiv 2104.14294, appendix F).
    """
    bank = F.normalize(bank, dim=1)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    for start in range(0, len(queries), 256):
        cosine, nearest = (F.normalize(queries[start : start + 256], dim=1) @ bank.T).topk(neighbours)
        votes[start : start + 256].scatter_add_(1, labels[nearest], (cosine / temperature).exp())
    return (votes / votes.sum(1, keepdim=True)).clamp(min=1e-9).log()


def linear_probe(
    bank: Tensor, labels: Tensor, queries: Tensor, classes: int, penalties: list[float]
) -> tuple[Tensor, float]:
    """Logits (queries, classes) of logistic regression on standardised features, and the penalty that was chosen."""
    mean, deviation = bank.mean(0), bank.std(0) + 1e-6
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    held_out = torch.arange(len(bank), device=bank.device) % HELD_OUT == 0
    if len(penalties) > 1:
        hits: list[tuple[int, float]] = []
        start = None  # from the largest penalty down, each solution where the next search begins
        for penalty in sorted(penalties, reverse=True):
            start = weight, bias = logistic_regression(bank[~held_out], labels[~held_out], classes, penalty, start)
            hits.append((int(((bank[held_out] @ weight.T + bias).argmax(1) == labels[held_out]).sum()), penalty))
        penalties = [max(hits)[1]]
    weight, bias = logistic_regression(bank, labels, classes, penalties[0])
    return queries @ weight.T + bias, penalties[0]


@torch.enable_grad()
def logistic_regression(
    x: Tensor, labels: Tensor, classes: int, penalty: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Weight (classes, d) and bias that minimise mean cross-entropy + penalty / 2 * |weight|^2, by L-BFGS.

    The search begins at `start`, or at zeros.
    """
    weight, bias = start or (torch.zeros(classes, x.shape[1], device=x.device), torch.zeros(classes, device=x.device))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-5, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss.item()

    solver.step(closure)
    return weight.detach(), bias.detach()
