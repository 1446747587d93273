"""Schedule, and the groups of parameters."""

import itertools

import pytest
import torch
from torch import nn

from launch.run.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate


def test_learning_rate_warms_up_then_follows_a_cosine():
    config = OptimConfig(base_lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, config, 512, 104) for step in range(104)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])  # 1.0 * 512 / 256 at the end of the warm-up
    assert rates[4] == pytest.approx(2.0)
    assert rates[54] == pytest.approx((2.0 + 0.1) / 2)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_groups_scale_their_own_rate():
    p = nn.Parameter(torch.ones(2, 2))
    q = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([{"params": [p], "lr_scale": 0.25}, {"params": [q]}], lr=1.0)
    set_learning_rate(optimizer, 0.4)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.4])


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.A_log = nn.Parameter(torch.ones(4, 4))
        self.fixed = nn.Parameter(torch.ones(4, 4), requires_grad=False)

    def no_weight_decay(self):
        return {"A_log"}


def test_only_matrices_decay():
    model = Tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = build_optimizer(model, OptimConfig(weight_decay=0.3), 256).param_groups
    decay = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert decay == {"linear.weight": 0.3, "linear.bias": 0.0, "A_log": 0.0}
