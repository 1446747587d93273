"""What frozen features know of labels: nearest neighbours, and a linear probe by logistic regression."""

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT = 10
"""One in so many training pictures chooses the penalty of the linear probe."""
ITERATIONS = 300


def nearest_neighbours(
    bank: Tensor, labels: Tensor, queries: Tensor, classes: int, neighbours: int, temperature: float
) -> Tensor:
    """Log of the shares (queries, classes) of votes of the nearest by cosine, each weighing exp(cosine / temperature).

    `bank` (n, d) with `labels` (n,) votes on `queries` (queries, d).
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
    """Logits (queries, classes) of logistic regression on standardised features, and the penalty that was chosen.

    `bank` (n, d) with `labels` (n,) is learned from, `queries` are (queries, d).
    """
    mean, deviation = bank.mean(0), bank.std(0) + 1e-6
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    held_out = torch.arange(len(bank), device=bank.device) % HELD_OUT == 0
    start = None
    if len(penalties) > 1:
        most, chosen, solution = -1, penalties[0], None
        last = None  # from the largest penalty down, each solution where the next search begins
        for penalty in sorted(penalties, reverse=True):
            last = weight, bias = logistic_regression(bank[~held_out], labels[~held_out], classes, penalty, last)
            hits = int(((bank[held_out] @ weight.T + bias).argmax(1) == labels[held_out]).sum())
            if hits > most:  # of penalties that do as well, the largest
                most, chosen, solution = hits, penalty, last
        penalties, start = [chosen], solution
    weight, bias = logistic_regression(bank, labels, classes, penalties[0], start)
    return queries @ weight.T + bias, penalties[0]


@torch.enable_grad()
def logistic_regression(
    x: Tensor, labels: Tensor, classes: int, penalty: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Weight (classes, d) and bias (classes,) for x (n, d) and labels (n,), by L-BFGS.

    They minimise mean cross-entropy + penalty / 2 * |weight|^2. The search begins at `start`, or at zeros.
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
