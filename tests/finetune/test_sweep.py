"""Real sweeps on a Ray cluster of two nodes on this machine: the three tasks, PBT, several workers, lost nodes."""

import os
import shlex
import signal
import sys
from dataclasses import replace

import pytest
import yaml
from safetensors.torch import load_file

from finetune.registry import TASKS
from finetune.sweeping.cluster import ray_session
from finetune.sweeping.config import RayConfig, ResourceConfig
from finetune.sweeping.driver import sweep, top_commands
from launch.run.signals import Stopped
from tests.finetune.ray_sweep import (
    SMALL,
    checkpoints,
    cluster,
    config_of,
    entries,
    meanwhile,
    outside,
    repeated,
    steps_of,
    trial_workers,
)
from tests.launch.preloaded import Popen
from tests.launch.real import ROOT, environment, finish, free_port
from tests.waiting import wait_for
from vim_backbone.errors import UserError

pytestmark = pytest.mark.slow
SPACE = {"optim.base_lr": {"loguniform": [1e-3, 1e-1]}, "model.drop_path_rate": {"uniform": [0, 0.2]}}
RUN = {"steps": 4, "evaluate_every": 1}


@pytest.fixture(scope="module")
def nodes(plain_kernels):
    with cluster() as started:
        yield started


@pytest.fixture
def make_sweep(nodes, tmp_path, backbone, sample_data):
    """Makes a sweep of a task on the cluster."""

    def make(task="classification", **more):
        metric = {"classification": "top1", "detection": "box_AP", "segmentation": "mIoU"}[task]
        common = {"ray": {"address": nodes.address}, "metric": metric, "space": SPACE, "fields": RUN, "trials": 2}
        return config_of(
            tmp_path, task, backbone, sample_data(task), **(common | {"scheduler": {"kind": "none"}} | more)
        )

    return make


def shipped(task, backbone):
    """What the example of the task says, with two names of one small backbone; to be run for a few steps."""
    example = yaml.safe_load((ROOT / f"finetune/sweeps/{task}.yaml").read_text())
    fields = {name: value for name, value in example["fields"].items() if name != "data.source"}
    space = example["space"] | {"backbone": {"choice": [str(backbone), f"file://{backbone}"]}}
    small = {"epochs": None, "evaluate_every": 1, "optim.warmup_steps": 1}
    return {
        "base": str(ROOT / example["base"]),
        "metric": example["metric"],
        "space": space,
    }, fields | SMALL | small


def test_classification_with_a_trial_killed_on_purpose(make_sweep, backbone, tmp_path):
    """The trial goes on from its checkpoint, and the best can be repeated outside of Ray to the last bit."""
    example, fields = shipped("classification", backbone)
    config = make_sweep(**example, trials=3, fields=fields | {"steps": 8})
    killed = []

    def kill():
        wait_for(lambda: len(checkpoints(config)) >= 3, "checkpoints")
        worker = trial_workers()[0]
        killed.append(worker.pid)
        os.kill(worker.pid, signal.SIGKILL)

    with meanwhile(kill):
        folder = sweep(config)
    assert killed
    trials = entries(config)
    assert [e.state for e in trials] == ["finished"] * 3
    assert [steps_of(e) for e in trials] == [list(range(1, 9))] * 3
    assert repeated(config) <= 1, "the trial went on from its checkpoint"
    assert set(TASKS["classification"].metrics) <= set(trials[0].evaluations[-1].metrics)
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == 1

    best = max(trials, key=lambda e: (e.score("top1"), -e.number))
    comment, command = top_commands(replace(config, top=1))
    assert f"trial {best.number}" in comment
    assert "python -m launch finetune/main.py classification" in command
    plain = command.replace("python -m launch finetune", f"{sys.executable} {ROOT}/finetune").replace("file://", "")
    setting, *argv = shlex.split(plain)
    assert setting == "OMP_NUM_THREADS=1"  # as environment() has it
    code, printed = finish(Popen(argv, tmp_path, environment()))
    assert code == 0, printed
    ours = load_file(folder / "best/model/model.safetensors")
    theirs = load_file(tmp_path / f"runs/sweep-{best.number}/model/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_other_tasks(task, make_sweep, backbone):
    example, fields = shipped(task, backbone)
    config = make_sweep(task, **example, fields=fields | {"steps": 2})
    folder = sweep(config)
    trials = entries(config)
    assert [e.state for e in trials] == ["finished"] * 2
    assert set(TASKS[task].metrics) <= set(trials[0].evaluations[-1].metrics)
    assert (folder / "best/model/config.json").exists()


def test_a_node_is_lost(make_sweep, nodes):
    """Trials of a lost node go on elsewhere from their checkpoints; the sweep ends as if nothing had been."""
    config = make_sweep(fields={"steps": 8, "evaluate_every": 1}, trials=3)
    node = nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    nodes.wait_for_nodes()

    def lose():
        wait_for(lambda: len({trial for trial, _ in checkpoints(config)}) == 3, "a checkpoint of each trial")
        nodes.remove_node(node, allow_graceful=False)

    with meanwhile(lose):
        sweep(config)
    assert [e.state for e in entries(config)] == ["finished"] * 3
    assert [steps_of(e) for e in entries(config)] == [list(range(1, 9))] * 3
    assert repeated(config) <= 1, "what ran on the node went on from its checkpoint"


def test_population_based_training_clones_and_changes(make_sweep):
    space = SPACE | {"optim.weight_decay": {"loguniform": [1e-3, 1]}}
    config = make_sweep(
        space=space, trials=4, searcher="random", metric="loss", mode="min",
        fields={"steps": 5, "evaluate_every": 1}, scheduler={"kind": "pbt", "grace": 20},
    )  # fmt: skip
    sweep(config)
    trials = entries(config)
    assert [e.state for e in trials] == ["finished"] * 4
    changed = [e for e in trials if e.changed]
    assert changed, "the worst took over from the best"
    rates = {e.fields["model.drop_path_rate"] for e in trials}
    assert len(rates) < 4, "a field that cannot change in a running trial is the donor's"


def test_asha_stops_what_is_worse_and_frees_its_place(make_sweep):
    """The rates are so that the order is known: nothing can be learned at a rate of 1e-9."""
    config = make_sweep(
        space={"optim.base_lr": {"grid": [0.3, 1e-9, 2e-9]}}, trials=3, concurrent=1, metric="loss", mode="min",
        searcher="grid", scheduler={"kind": "asha", "grace": 25, "reduction": 2},
    )  # fmt: skip
    sweep(config)
    assert [e.state for e in entries(config)] == ["finished", "stopped early", "stopped early"]
    assert [len(e.evaluations) for e in entries(config)] == [4, 1, 1]


def test_one_bad_config_does_not_stop_the_sweep(make_sweep, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    good = make_sweep().fields["backbone"]
    config = make_sweep(
        space={"backbone": {"grid": [good, str(tmp_path / "broken")]}}, searcher="grid", trials=None,
        fields={"steps": 1} | {"optim.base_lr": 0.01},
    )  # fmt: skip
    sweep(config)
    first, second = entries(config)
    assert (first.state, second.state) == ("finished", "failed")
    assert "config.json" in second.error


def test_two_workers_train_one_trial_as_one_process_does(make_sweep, tmp_path):
    config = make_sweep(fields={"steps": 2, "evaluate_every": 1}, trials=1, resources={"workers": 2})
    sweep(config)
    (two,) = entries(config)
    one = outside(config, two.fields, tmp_path / "alone")
    assert two.state == "finished"
    assert steps_of(two) == [step for step, _ in one] == [1, 2]
    for ours, (_, theirs) in zip(two.evaluations, one, strict=True):
        assert ours.metrics["top1"] == theirs["top1"]
        assert ours.metrics["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_what_the_time_did_not_suffice_for_is_left_for_resume(make_sweep):
    config = make_sweep(fields={"steps": 1}, trials=1)
    with pytest.raises(Stopped, match="1 of 1 trials are left"):
        sweep(replace(config, hours=1e-7))
    sweep(replace(config, resume=True))
    assert [e.state for e in entries(config)] == ["finished"]


def test_what_never_fits_is_said_at_once(nodes):
    config = RayConfig(address=nodes.address)
    for each in (ResourceConfig(cpus=2), ResourceConfig(gpus=1), ResourceConfig(workers=9)):
        with pytest.raises(UserError, match="never fits"), ray_session(config, each):
            pass


def test_an_address_that_does_not_answer():
    with (
        pytest.raises(UserError, match="does not answer"),
        ray_session(RayConfig(address=f"127.0.0.1:{free_port()}", wait_seconds=2), ResourceConfig()),
    ):
        pass
    with (
        pytest.raises(UserError, match="it must be HOST:PORT or auto"),
        ray_session(RayConfig(address="somewhere"), ResourceConfig()),
    ):
        pass
