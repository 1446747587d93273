"""A run's folder: nothing is overwritten by accident, and a resume needs what it goes on from."""

import pytest
import torch
from torch import nn

from launch.run.config import RunConfig
from launch.run.folder import open_run
from launch.state.checkpoint import TrainState, snapshot, write_snapshot
from pretrain.config import ModelConfig, PretrainConfig
from vim_backbone import UserError


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


def test_what_is_made_again_can_change_where_the_architecture_cannot(tmp_path):
    """As after a run that was out of memory."""

    def run(recompute, depth, **changes):
        model = ModelConfig(recompute=recompute, depth=depth)
        return PretrainConfig(name="a", out=str(tmp_path / "runs"), model=model, **changes)

    open_run(run("inputs", 2), ["model."])
    model = nn.Linear(1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters()))
    write_snapshot(snapshot(state), tmp_path / "runs/a/checkpoints", keep=1)
    notes = open_run(run("products", 2, resume=True), ["model."]).notes
    assert notes == ["resumed with another model.recompute: inputs -> products"]
    with pytest.raises(UserError, match=r"was trained with model.depth = 2, not 3"):
        open_run(run("products", 3, resume=True), ["model."])


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
