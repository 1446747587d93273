"""Real runs with something failing under them: each goes on, or ends with one line and resumes exactly."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from launch.state.checkpoint import checkpoints
from tests.launch.real import finish, losses, rows_written, run, start
from tests.waiting import patience, wait_for

pytestmark = pytest.mark.slow
FAULTY = Path(__file__).parent / "faulty.py"
OPTIONS = ("--steps=6", "--checkpoint_every=2")
RESTARTS = ("--max_restarts=2",)


def faulty(where, strategy, faults, *argv, launcher=(), **env):
    environ = {"FAULTS": faults} | env
    return start(where, strategy, *OPTIONS, *argv, env=environ, script=FAULTY, launcher=launcher)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return losses(run(tmp_path_factory.mktemp("whole"), "one", *OPTIONS))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again_and_the_run_is_the_same(rank, whole, tmp_path):
    ids = tmp_path / "ids"
    process = faulty(tmp_path, "ddp", f"kill@4:{rank}", launcher=RESTARTS, IDS=str(ids))
    code, printed = finish(process)
    assert code == 0, printed[-4000:]
    assert "from step 2" in printed
    assert losses(tmp_path / "runs/run") == pytest.approx(whole, rel=2e-6)
    samples = {}
    for path in tmp_path.glob("ids-*"):
        for line in path.read_text().splitlines():
            step, names = json.loads(line)
            samples.setdefault((path.name, step), set()).add(tuple(names))
    assert all(len(versions) == 1 for versions in samples.values())  # a step done again has the same samples
    names_in_order = [
        name for (_, _), (names,) in sorted(samples.items(), key=lambda item: item[0][1]) for name in names
    ]
    # steps of 8 cross the borders of epochs of 12 photographs; 48 samples are four whole passes
    assert {names_in_order.count(name) for name in names_in_order} == {4}


def test_a_lost_data_loading_process_costs_nothing(tmp_path):
    steps = "--steps=24"  # two processes read 8 batches ahead: at step 3 none has read its last
    whole = losses(run(tmp_path / "whole", "one", *OPTIONS, steps))
    code, printed = finish(faulty(tmp_path, "one", "loader@3:0", steps, "--data.workers=2"))
    assert code == 0, printed[-3000:]
    assert "a data-loading process was lost" in printed
    assert losses(tmp_path / "runs/run") == whole


def test_preemption_saves_and_the_next_command_goes_on(tmp_path):
    process = start(tmp_path, "zero3", "--steps=4000")
    wait_for(lambda: rows_written(tmp_path / "runs/run") >= 2, "two steps", process)
    os.kill(process.pid, signal.SIGTERM)
    code, printed = finish(process)
    assert code != 0
    assert re.search(r"stopped by SIGTERM at step \d+ of 4000, saved in", printed), printed[-3000:]
    done = int(checkpoints(tmp_path / "runs/run/checkpoints")[-1].name[5:])
    code, printed = finish(start(tmp_path, "one", f"--steps={done + 1}", "--resume=auto"))
    assert code == 0, printed[-3000:]
    assert f"from step {done}" in printed


@pytest.mark.parametrize("fault", ["hang", "stop"])
def test_a_hanging_process_is_named(fault, tmp_path):
    code, printed = finish(faulty(tmp_path, "ddp", f"{fault}@3:1", f"--hang_seconds={patience(8)}"))
    assert code != 0
    line = next(line for line in printed.splitlines() if line.startswith("error: step 3 hangs"))
    assert "process 1" in line.split(";")[1], line


@pytest.mark.parametrize("strategy", ["one", "zero2"])
def test_bad_steps_are_skipped_counted_and_written_down(strategy, tmp_path):
    code, printed = finish(faulty(tmp_path, strategy, "nan@3:-1,nan@4:-1"))
    assert code == 0, printed[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "runs/run/bad_steps.jsonl").read_text().splitlines()]
    assert [(row["step"], row["action"], len(row["samples"])) for row in rows] == [(3, "skip", 8), (4, "skip", 8)]
    assert all(loss == loss for step, loss in losses(tmp_path / "runs/run").items() if step not in (3, 4))


def test_a_spike_is_not_taken(tmp_path):
    code, printed = finish(faulty(tmp_path, "one", "spike@18:-1", "--steps=20", "--guard.spike=3"))
    assert code == 0, printed[-3000:]
    (row,) = [json.loads(line) for line in (tmp_path / "runs/run/bad_steps.jsonl").read_text().splitlines()]
    assert (row["step"], row["action"], len(row["samples"])) == (18, "skip", 8)
    samples = losses(tmp_path / "runs/run")
    assert samples[18] > 3 * samples[17]
    assert samples[19] < 2 * samples[17]


def test_a_bad_step_can_end_the_run(tmp_path):
    code, printed = finish(faulty(tmp_path, "one", "nan@3:0", "--guard.on_bad_step=stop"))
    assert code == 2
    assert printed.splitlines()[-1].startswith("error: step 3 is bad: its loss is nan")
    assert [path.name for path in checkpoints(tmp_path / "runs/run/checkpoints")] == ["step-00000002"]
    code, printed = finish(faulty(tmp_path, "one", "", "--resume"))
    assert code == 0, printed[-3000:]


def test_a_damaged_newest_checkpoint_is_passed_over(whole, tmp_path):
    folder = run(tmp_path, "one", *OPTIONS)
    (folder / "checkpoints/step-00000006/model.safetensors").write_bytes(b"half")
    code, printed = finish(start(tmp_path, "one", *OPTIONS, "--resume=auto"))
    assert code == 0, printed[-3000:]
    assert "step-00000006 is damaged (model.safetensors has 4 bytes" in printed
    assert "going on from step-00000004" in printed
    assert losses(folder) == whole
