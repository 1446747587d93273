"""A run's folder: nothing is overwritten by accident, and a resume needs what it goes on from."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from launch.run.config import RunConfig
from launch.run.folder import open_run
from launch.run.guard import GuardConfig
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
    with pytest.raises(UserError, match="was trained with seed = 5, not 6"):
        open_run(config(tmp_path, resume=True, seed=6), ["seed"])


LEFTOVERS = [".lock", ".config.yaml.partial/config.yaml", "checkpoints/", ".launcher", ".checkpoints.deleted/a",
             "checkpoints/.step-00000001.partial/model.safetensors", ".x.partial"]  # fmt: skip


def lay(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir(exist_ok=True) if name.endswith("/") else (folder / name).write_text("half")


@given(names=st.sets(st.sampled_from(LEFTOVERS)), start=st.sampled_from([{}, {"resume": "auto"}, {"overwrite": True}]))
def test_what_a_kill_left_before_the_config_starts_again(names, start):
    with TemporaryDirectory() as place:
        folder = Path(place) / "runs/a"
        folder.mkdir(parents=True)
        lay(folder, names)
        assert open_run(config(Path(place), **start), []).checkpoint is None
        assert {path.name for path in folder.iterdir()} - {".lock"} == {"config.yaml", "checkpoints", ".launcher"}
        assert not list((folder / "checkpoints").iterdir())


@pytest.mark.parametrize("foreign", ["thesis.tex", "checkpoints/model.pt", ".hidden", "checkpoints"])
@pytest.mark.parametrize("start", [{}, {"resume": "auto"}, {"overwrite": True}])
def test_leftovers_beside_foreign_files_are_not_touched(tmp_path, foreign, start):
    lay(tmp_path / "runs/a", [foreign, ".launcher"])
    with pytest.raises(UserError, match=r"is no run's folder"):
        open_run(config(tmp_path, **start), [])
    assert (tmp_path / "runs/a" / foreign).read_text() == "half"


def test_overwriting_deletes_links_and_not_what_they_point_to(tmp_path):
    with_checkpoint(tmp_path)
    lay(tmp_path, ["elsewhere/pictures/a.jpg"])
    (tmp_path / "runs/a/data").symlink_to(tmp_path / "elsewhere/pictures")
    (tmp_path / "runs/a").rename(tmp_path / "elsewhere/a")
    (tmp_path / "runs/a").symlink_to(tmp_path / "elsewhere/a")
    open_run(config(tmp_path, overwrite=True), [])
    assert sorted(p.name for p in (tmp_path / "runs/a").iterdir()) == [".launcher", "checkpoints", "config.yaml"]
    assert (tmp_path / "runs/a").is_symlink()
    assert (tmp_path / "elsewhere/pictures/a.jpg").exists()


def test_a_link_to_nothing_is_a_mistake_of_one_line(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/a").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot make the folder"):
        open_run(config(tmp_path), [])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("start", [{"overwrite": True}, {"resume": True, "seed": 4}])
def test_a_start_that_is_killed_anywhere_starts_again(tmp_path, monkeypatch, start):
    """At each rename, one after the other, until the start gets through."""
    for number in range(100):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        with_checkpoint(tmp_path)
        left = iter([True] * number)
        renamed = os.replace

        def replace(a, b, left=left, renamed=renamed):
            if next(left, None) is None:
                raise Killed
            renamed(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                open_run(config(tmp_path, **start), [])
                killed = False
            except Killed:
                killed = True
        again = open_run(config(tmp_path, **start), [])
        assert (again.checkpoint is None) == ("overwrite" in start)
        assert yaml.safe_load((tmp_path / "runs/a/config.yaml").read_text())["seed"] == start.get("seed", 0)
        if not killed:
            break
    assert number >= 3


def test_the_config_is_that_of_the_last_start(tmp_path):
    with_checkpoint(tmp_path)
    file = tmp_path / "runs/a/config.yaml"
    first = file.read_text()
    changed = config(tmp_path, resume=True, log_every=7, guard=GuardConfig(spike=3.0))
    assert open_run(changed, []).notes == [
        "resumed with another guard.spike: 0.0 -> 3.0", "resumed with another log_every: 10 -> 7"
    ]  # fmt: skip
    assert open_run(changed, []).notes == []
    assert open_run(config(tmp_path, resume=True, log_every=8), []).notes[-1] == (
        "resumed with another log_every: 7 -> 8"
    )
    written = yaml.safe_load(file.read_text())
    assert (written["log_every"], written["resume"], written["overwrite"]) == (8, False, False)
    assert (tmp_path / "runs/a/config-to-step-00000003.yaml").read_text() == first  # those since did no step


def test_what_a_kill_left_to_delete_goes_when_the_run_goes_on(tmp_path):
    """Killed when the last checkpoint was in place and the ones before were still there."""
    with_checkpoint(tmp_path)
    folder = tmp_path / "runs/a/checkpoints"
    shutil.copytree(folder / "step-00000003", folder / "step-00000002")
    open_run(config(tmp_path, resume=True, keep_checkpoints=1), [])
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


def test_fewer_steps_than_are_done_are_refused_and_change_nothing(tmp_path):
    with_checkpoint(tmp_path)
    before = (tmp_path / "runs/a/config.yaml").read_text()
    with pytest.raises(UserError, match=r"the run has 2 steps, .*step-00000003 is of step 3"):
        open_run(config(tmp_path, resume=True, log_every=9), [], total_steps=2)
    assert (tmp_path / "runs/a/config.yaml").read_text() == before
    assert open_run(config(tmp_path, resume=True), [], total_steps=3).checkpoint is not None


@pytest.mark.parametrize(
    "content", [b"", b"\x80\xff\x00", b"- a\n- b\n", b"text", b"{a: [", b"3", b"null", b"{}", b"\x00"]
)
@pytest.mark.parametrize("resume", [True, "auto"])
def test_an_odd_config_is_named(tmp_path, content, resume):
    with_checkpoint(tmp_path)
    (tmp_path / "runs/a/config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        open_run(config(tmp_path, resume=resume), [])
    assert "\n" not in str(caught.value)
    open_run(config(tmp_path, overwrite=True), [])
