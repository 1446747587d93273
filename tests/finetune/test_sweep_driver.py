"""The command `finetune/sweep.py` with a Ray of its own: killed at any moment, resumed, and listening nowhere else."""

import os
import shutil
import signal
from collections import Counter

import psutil
import pytest

from tests.finetune.ray_sweep import checkpoints, config_of, driver, entries, finished, outside, repeated, steps_of
from tests.launch.real import finish
from tests.waiting import LIMIT, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_kernels")]
STEPS = 12
SPACE = {"optim.base_lr": {"loguniform": [1e-3, 1e-1]}}


def listening(root: int) -> set[str]:
    """Addresses that the process and all below it listen on."""
    addresses = set()
    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
        try:
            addresses |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return addresses


def midway(config):
    """Whether the record has a trial with all of its evaluations, and one with a few and their checkpoints."""
    counts = Counter(trial for trial, _ in checkpoints(config)).values()
    return STEPS in counts and any(2 <= count <= STEPS - 3 for count in counts)


def test_a_killed_driver_goes_on_with_nothing_lost_or_run_twice(tmp_path, backbone, sample_data):
    config = config_of(
        tmp_path, "classification", backbone, sample_data("classification"), space=SPACE, metric="top1", trials=4,
        fields={"steps": STEPS, "evaluate_every": 1}, scheduler={"kind": "none"}, ray={"cpus": 2},
    )  # fmt: skip
    first = driver(config)
    wait_for(lambda: checkpoints(config), "a checkpoint", first)
    below = psutil.Process(first.pid).children(recursive=True)
    assert {ip.removeprefix("::ffff:") for ip in listening(first.pid)} == {"127.0.0.1"}
    wait_for(lambda: midway(config), "one trial that is over and one that is in its midst", first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    psutil.wait_procs(below, timeout=LIMIT)
    before = (config.folder / "study.jsonl").read_text()
    was = entries(config)
    assert any(e.state == "finished" for e in was)
    assert any(e.state == "running" and e.checkpoint for e in was)

    printed = finished(driver(config, "--resume"))
    assert "4 finished, 0 stopped early, 0 failed of 4 trials" in printed
    assert (config.folder / "study.jsonl").read_text().startswith(before[: before.rindex("\n")])
    after = entries(config)
    assert [steps_of(e) for e in after] == [list(range(1, STEPS + 1))] * 4
    assert repeated(config) <= 2, "the two that ran went on from their checkpoints"
    for old, new in zip(was, after, strict=False):
        assert new.fields == old.fields
        # the last evaluation of a trial that ran may have been without its checkpoint
        settled = old.evaluations[:-1] if old.state == "running" else old.evaluations
        assert new.evaluations[: len(settled)] == settled, "what was evaluated was not run again"
    for entry in after:
        alone = outside(config, entry.fields, tmp_path / f"alone-{entry.number}")
        assert [(e.step, e.metrics) for e in entry.evaluations] == alone
        shutil.rmtree(tmp_path / f"alone-{entry.number}")
    assert (config.folder / "best/model/model.safetensors").exists()


def test_sigterm_stops_the_sweep_for_resume(tmp_path, backbone, sample_data):
    config = config_of(
        tmp_path, "classification", backbone, sample_data("classification"), space=SPACE, metric="top1", trials=1,
        fields={"steps": 10000, "evaluate_every": 1}, scheduler={"kind": "none"}, ray={"cpus": 1},
    )  # fmt: skip
    process = driver(config)
    wait_for(lambda: checkpoints(config), "a checkpoint", process)
    process.terminate()
    code, printed = finish(process)
    assert code == 130
    assert printed.rstrip().endswith("1 of 1 trials are left: the same command with --resume goes on")
    assert entries(config)[0].state == "running"


@pytest.mark.gpus(2)
def test_a_trial_over_two_gpus_has_one_for_each_process(tmp_path, backbone, sample_data):
    """And its scores are those of the same trial on one GPU; two trials of half a GPU each share one."""
    scores, places = {}, {}
    for name, trials, resources in (
        ("both", 1, {"gpus": 1, "workers": 2}), ("one", 1, {"gpus": 1}), ("half", 4, {"gpus": 0.5}),
    ):  # fmt: skip
        config = config_of(
            tmp_path / name, "classification", backbone, sample_data("classification"), space=SPACE, metric="top1",
            fields={"steps": STEPS, "evaluate_every": 4}, scheduler={"kind": "none"}, trials=trials,
            resources=resources,
        )  # fmt: skip
        finished(driver(config))
        trials_of = entries(config)
        assert [e.state for e in trials_of] == ["finished"] * trials
        scores[name] = [e.metrics["loss"] for e in trials_of[0].evaluations]
        places[name] = [[place.device for place in e.evaluations[-1].places] for e in trials_of]
    assert places["both"] == [["GPU 0", "GPU 1"]]
    assert scores["both"] == pytest.approx(scores["one"], rel=1e-3)
    assert {device for (device,) in places["half"]} == {"GPU 0", "GPU 1"}
