"""Schedule, parameter groups, keyed randomness, metrics file, run folder."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from launch.run.config import RunConfig
from launch.run.folder import open_run
from launch.run.metrics import forget_after
from launch.run.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate
from launch.run.randomness import generator, seed_of, seeded
from launch.state.checkpoint import TrainState, snapshot, write_snapshot
from tests.rows import read_metrics
from vim_backbone import UserError


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


def test_seeds_depend_on_every_part_of_the_key():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 2), (0, 2, 1)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert torch.equal(torch.rand(3, generator=generator(4, 2)), torch.rand(3, generator=generator(4, 2)))


def test_seeded_blocks_leave_the_global_generators_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    want = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with seeded(7, 8):
        inside = draw()
    assert draw() == want
    with seeded(7, 8):
        assert draw() == inside


def test_metrics_after_the_resumed_step_are_forgotten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": s, "loss": s / 10}) for s in range(1, 6)]
    file.write_text("\n".join(rows) + '\n{"step": 6, "lo')  # killed while writing
    forget_after(file, 3)
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3]


def config(tmp_path, **changes):
    return RunConfig(out=str(tmp_path / "runs"), name="a", **changes)


def with_checkpoint(tmp_path):
    open_run(config(tmp_path), [])
    model = nn.Linear(1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters()), step=3)
    write_snapshot(snapshot(state), tmp_path / "runs/a/checkpoints", keep=1)


def test_a_run_is_never_overwritten_by_accident(tmp_path):
    with_checkpoint(tmp_path)
    with pytest.raises(UserError, match="holds a run already: add --resume"):
        open_run(config(tmp_path), [])
    open_run(config(tmp_path, overwrite=True), [])
    assert not list((tmp_path / "runs/a/checkpoints").iterdir())


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"is no run's folder"):
        open_run(config(tmp_path, overwrite=True), [])
    assert (tmp_path / "runs/a/thesis.tex").exists()


def test_resume_needs_a_checkpoint_and_the_same_architecture(tmp_path):
    with pytest.raises(UserError, match=r"nothing to resume: .* does not exist"):
        open_run(config(tmp_path, resume=True), [])
    open_run(config(tmp_path), [])
    with pytest.raises(UserError, match="has no checkpoint"):
        open_run(config(tmp_path, resume=True), [])
    with_checkpoint_again = config(tmp_path, overwrite=True)
    open_run(with_checkpoint_again, [])
    model = nn.Linear(1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters()))
    write_snapshot(snapshot(state), tmp_path / "runs/a/checkpoints", keep=1)
    assert open_run(config(tmp_path, resume=True, seed=5), []).notes == ["resumed with another seed: 0 -> 5"]
    with pytest.raises(UserError, match="was trained with seed = 0, not 5"):
        open_run(config(tmp_path, resume=True, seed=5), ["seed"])
