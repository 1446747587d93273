"""Real runs with something failing under them: each goes on, or ends with one line and resumes exactly.

On CPUs with gloo, and on two GPUs with NCCL where they are.
"""

import json
import logging
import os
import pickle
import re
import signal
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from launch.run.watchdog import FLIGHT_RECORDER
from launch.state.checkpoint import checkpoints
from tests.launch.real import TWO_GPUS, finish, losses, rows_written, run, start
from tests.waiting import patience, wait_for

pytestmark = pytest.mark.slow
MEASURED = logging.getLogger(__name__)
"""Shown by `pytest -rA --log-level=INFO`."""
FAULTY = Path(__file__).parent / "faulty.py"
OPTIONS = ("--steps=6", "--checkpoint_every=2")
RESTARTS = ("--max_restarts=2",)


DEVICES = ["cpu", pytest.param("cuda", marks=TWO_GPUS)]


def on(*cases):
    """Cases on CPU, and the same on two GPUs."""
    return [*(("cpu", *case) for case in cases), *(pytest.param("cuda", *case, marks=TWO_GPUS) for case in cases)]


def faulty(where, strategy, faults, *argv, launcher=(), device="cpu", **env):
    environ = {"FAULTS": faults} | env
    return start(where, strategy, *OPTIONS, *argv, env=environ, script=FAULTY, launcher=launcher, device=device)


@pytest.fixture(scope="module")
def whole_on(tmp_path_factory):
    """Device -> losses of an undisturbed run of one process."""
    return cache(lambda device: losses(run(tmp_path_factory.mktemp("whole"), "one", *OPTIONS, device=device)))


@pytest.fixture(scope="module")
def whole(whole_on):
    return whole_on("cpu")


@pytest.mark.parametrize(("device", "rank"), on((0,), (1,)))
def test_a_killed_process_is_started_again_and_the_run_is_the_same(device, rank, whole_on, tmp_path):
    ids = tmp_path / "ids"
    process = faulty(tmp_path, "ddp", f"kill@4:{rank}", launcher=RESTARTS, device=device, IDS=str(ids))
    code, printed = finish(process)
    assert code == 0, printed[-4000:]
    assert "from step 2" in printed
    assert losses(tmp_path / "runs/run") == pytest.approx(whole_on(device), rel=2e-6)
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


@pytest.mark.parametrize("device", DEVICES)
def test_preemption_saves_and_the_next_command_goes_on(device, tmp_path):
    process = start(tmp_path, "zero3", "--steps=4000", device=device)
    wait_for(lambda: rows_written(tmp_path / "runs/run") >= 2, "two steps", process)
    os.kill(process.pid, signal.SIGTERM)
    code, printed = finish(process)
    assert code != 0
    assert re.search(r"stopped by SIGTERM at step \d+ of 4000, saved in", printed), printed[-3000:]
    done = int(checkpoints(tmp_path / "runs/run/checkpoints")[-1].name[5:])
    code, printed = finish(start(tmp_path, "one", f"--steps={done + 1}", "--resume=auto", device=device))
    assert code == 0, printed[-3000:]
    assert f"from step {done}" in printed


@pytest.mark.parametrize(("device", "strategy"), on(("zero2",), ("ddp",)))
def test_losses_are_the_same_after_sigterm(device, strategy, whole_on, tmp_path):
    """It comes while one process waits for the other in a collective."""
    process = faulty(tmp_path, strategy, "wait@3:1", device=device)
    wait_for((tmp_path / "runs/run/waits").exists, "the third step", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    (tmp_path / "runs/run/go").touch()
    code, printed = finish(process)
    assert code != 0
    assert "stopped by SIGTERM at step" in printed, printed[-3000:]
    code, printed = finish(faulty(tmp_path, strategy, "", "--resume", device=device))
    assert code == 0, printed[-3000:]
    assert losses(tmp_path / "runs/run") == pytest.approx(whole_on(device), rel=2e-6)


def collectives(folder, rank):
    """What the flight recorder of a process has written, by its state."""
    content = pickle.loads((folder / FLIGHT_RECORDER / f"rank_{rank}").read_bytes())
    return [(entry["profiling_name"], entry["state"]) for entry in content["entries"]]


@pytest.mark.parametrize(("device", "fault"), on(("hang",), ("stop",)))
def test_a_hanging_process_is_named(device, fault, tmp_path):
    """The other one waits for it in a collective."""
    code, printed = finish(faulty(tmp_path, "ddp", f"{fault}@3:1", f"--hang_seconds={patience(8)}", device=device))
    assert code != 0
    line = next(line for line in printed.splitlines() if line.startswith("error: step 3 hangs"))
    assert "process 1" in line.split(";")[1], line
    if device == "cuda" or hasattr(torch._C._distributed_c10d, "_dump_fr_trace"):
        assert f"its last collectives are in runs/run/{FLIGHT_RECORDER}/rank_0" in line
        name, state = collectives(tmp_path / "runs/run", 0)[-1]
        assert name == f"{'nccl' if device == 'cuda' else 'gloo'}:all_reduce"
        assert state != "completed"


@pytest.mark.parametrize(("device", "strategy", "rank"), on(("ddp", 1), ("zero2", 1), ("ddp", -1)))
def test_out_of_memory_ends_all_processes_with_a_line(device, strategy, rank, tmp_path):
    """Of one process: the other one waits in a collective for what will not come. Of both: the first one's line."""
    code, printed = finish(faulty(tmp_path, strategy, f"oom@3:{rank}", device=device))
    assert code != 0, printed[-3000:]
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert re.match(rf"error: out of memory on process {'1' if rank == 1 else '[01]'} \(", line), line
    assert "lower batch_size" in line
    assert [path.name for path in checkpoints(tmp_path / "runs/run/checkpoints")] == ["step-00000002"]
    assert "SIGKILL" not in printed  # as the launcher does with what does not end


@pytest.mark.gpus(2)
def test_what_the_line_says_fits(tmp_path):
    """A batch that no two GPUs hold, and then what the line tells to do, by the number."""
    large = ("--model.name=vim_base", "--model.depth=null", "--model.img_size=1024", "--batch_size=512", "--steps=1",
             "--precision=bf16", "--decoder.width=512", "--decoder.depth=2", "--data.workers=4")  # fmt: skip
    code, printed = finish(start(tmp_path, "zero2", *large, "--model.recompute=none", device="cuda"))
    assert code != 0, printed[-3000:]
    line = next(line for line in printed.splitlines() if line.startswith("error:"))
    MEASURED.info(line)
    assert "is planned to take" in line
    found = re.search(r"what fits is (--model.recompute \w+ --accumulation \d+)", line)
    assert found is not None, line
    code, printed = finish(start(tmp_path, "zero2", *large, *found[1].split(), "--resume=auto", device="cuda"))
    assert code == 0, printed[-3000:]


@pytest.mark.parametrize(
    ("device", "strategy", "rank"),
    [("cpu", "one", -1), *on(("zero2", -1), ("zero2", 1), ("ddp", 1))],
)
def test_bad_steps_are_skipped_counted_and_written_down(device, strategy, rank, tmp_path):
    code, printed = finish(faulty(tmp_path, strategy, f"nan@3:{rank},nan@4:{rank}", device=device))
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
