"""Each trouble is named once, when it begins, with a field that helps; a healthy run has none."""

import math

import pytest
import torch

from launch.run.optim import OptimConfig
from launch.run.randomness import generator
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.watching.trouble import FLAT_ROWS, Troubles

ANCHORS = {1: 0.717, 2: 0.633, 5: 0.552, 10: 0.510, 20: 0.478, 40: 0.461, 100: 0.440, 400: 0.435, 1600: 0.414}
"""Epoch -> loss of FastVim's published MAE run of Vim-B on ImageNet."""


def config(optim=None, model=None, **fields):
    return PretrainConfig(optim=OptimConfig(**(optim or {})), model=ModelConfig(**(model or {})), **fields)


def said(troubles, rows, bad=0):
    return [line for row in rows for line in troubles.after(row, bad)]


def row(step, loss=1.0, lr=1e-3, wait=0.0, norm=1.0):
    return {"step": step, "loss": loss, "lr": lr, "data_wait_share": wait, "grad_norm": norm}


def falling(count, first=10, every=10):
    return [row(first + every * k, loss=1 / (1 + k / 20)) for k in range(count)]


def test_a_healthy_run_has_no_trouble():
    """The published curve with the noise of batches, at the rate of its schedule, all on one row an epoch."""
    epochs = range(1, 1601)
    known = sorted(ANCHORS)
    noise = generator(0)
    rows = []
    for epoch in epochs:
        after = next((k for k in known if k >= epoch), known[-1])
        before = max(k for k in known if k <= epoch)
        share = 0.0 if after == before else (math.log(epoch) - math.log(before)) / (math.log(after) - math.log(before))
        loss = ANCHORS[before] + share * (ANCHORS[after] - ANCHORS[before])
        jitter = 0.001 * (2 * float(torch.rand((), generator=noise)) - 1)
        rows.append(row(epoch, loss + jitter, lr=1e-3 * (1 + math.cos(math.pi * epoch / 1600)) / 2))
    troubles = Troubles(config(log_every=1, batch_size=256, optim={"base_lr": 1e-3, "warmup_steps": 40}), 1600)
    assert said(troubles, rows) == []


def test_waiting_for_data_is_named_once_and_again_when_it_comes_back():
    troubles = Troubles(config(), 10_000)
    rows = falling(40)
    for k, each in enumerate(rows):
        each["data_wait_share"] = 0.5 if 10 <= k < 22 or k >= 32 else 0.01
    line = "% of the time is spent waiting for data: raise data.workers, or set data.resize torch (docs/data.md)"
    assert said(troubles, rows) == [f"26{line}", f"26{line}"]  # the median of ten rows, half of which wait


def test_gradients_that_are_mostly_cut_are_named():
    rows = falling(30)
    for k, each in enumerate(rows):
        each["grad_norm"] = 3.0 if k % 3 else 0.5
    assert said(Troubles(config(), 10_000), rows) == []  # nothing is cut
    (line,) = said(Troubles(config(optim={"clip_grad": 1.0}), 10_000), rows)
    assert line.startswith(
        "the gradient was clipped in 13 of the last 20 rows (norm 3, optim.clip_grad 1): lower optim"
    )


def test_gradients_that_were_cut_in_the_warm_up_are_not_named():
    rows = falling(30)
    for k, each in enumerate(rows):
        each["grad_norm"] = 5.0 if k < 20 else 0.5
    warmup = rows[19]["step"]
    assert said(Troubles(config(optim={"clip_grad": 1.0, "warmup_steps": warmup}), 10_000), rows) == []


@pytest.mark.parametrize(("lr", "fall", "named"), [(1e-3, 0.0, True), (1e-4, 0.0, False), (1e-3, 2e-3, False)])
def test_a_loss_that_stays_at_a_high_rate_is_named(lr, fall, named):
    """Not where the rate has been lowered, and not where it falls by a tenth of the noise in each row."""
    noise = generator(1)
    losses = [1.0 - fall * k + 0.02 * float(torch.randn((), generator=noise)) for k in range(FLAT_ROWS)]
    settings = config(batch_size=256, optim={"base_lr": 1e-3, "warmup_steps": 5})
    lines = said(Troubles(settings, 100), [row(10 + 10 * k, loss, lr) for k, loss in enumerate(losses)])
    assert bool(lines) is named
    if named:
        assert "since step 10, with a learning rate of 0.001: try another optim.base_lr (now 0.001)" in lines[0]


def test_bad_steps_are_named_with_what_is_not_set_yet():
    lines = said(Troubles(config(precision="bf16"), 100), falling(2), bad=3)
    assert lines == [
        "3 of the last 100 steps were bad and not taken: lower optim.base_lr or set optim.clip_grad 1 or start anew "
        "with model.mixer_norm true or take precision fp32"
    ]
    steady = config(optim={"clip_grad": 1.0}, model={"mixer_norm": True})
    assert said(Troubles(steady, 100), falling(2), bad=3)[0].endswith("not taken: lower optim.base_lr")
    assert said(Troubles(steady, 100), falling(2), bad=2) == []


def test_features_that_collapse_are_named():
    def ranks(*values):
        return [{"step": 100 * k, "rank_me": value} for k, value in enumerate(values)]

    assert said(Troubles(config(), 1000), ranks(50, 14, 18, 40, 30)) == []  # fresh weights are no measure
    (line,) = said(Troubles(config(), 1000), ranks(50, 14, 40, 19, 18))
    assert line.startswith("the features collapse: RankMe fell from 40.0 to 19.0; lower optim.base_lr")
    (line,) = said(Troubles(config(), 1000), ranks(50, 1.2, 1.1))
    assert "RankMe is 1.2" in line


def test_overfitting_is_named():
    def held_out(*losses):
        return [{"step": 100 * k, "held_out_loss": loss} for k, loss in enumerate(losses)]

    assert said(Troubles(config(), 1000), held_out(1.0, 0.6, 0.7, 0.605, 0.611)) == []
    (line,) = said(Troubles(config(), 1000), held_out(1.0, 0.6, 0.63, 0.66))
    assert line.startswith("the loss of held-out pictures rises, from 0.6 at step 100 to 0.66: ")
    assert "data.min_scale" in line
    of_stages = [each | {"stage": 1 + (k > 1)} for k, each in enumerate(held_out(1.0, 0.6, 0.8, 0.79))]
    assert said(Troubles(config(), 1000), of_stages) == []
    falls = held_out(-0.2, -0.8, -0.9, -0.91)
    assert said(Troubles(config(), 1000), falls) == []
