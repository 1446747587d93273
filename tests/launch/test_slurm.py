"""The SLURM script under stand-ins for srun, scancel and scontrol: it saves before the limit, requeues, and resumes."""

import signal

import pytest

from launch.state.checkpoint import checkpoints
from tests.launch.real import ROOT, SMALL, rows_written
from tests.launch.slurm import submit
from tests.waiting import LIMIT, wait_for


@pytest.mark.parametrize(
    ("settings", "strategy"),
    [({"STRATEGY": "launch/accelerate/ddp.yaml"}, "ddp"), ({"STRATEGY": ""}, "zero2")],
)
def test_the_strategy_reaches_the_launcher(settings, strategy, tmp_path):
    """With a stand-in for Python that writes down what it is to run."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/python").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > words\n')
    (tmp_path / "tools/python").chmod(0o700)
    job = submit(tmp_path, "--steps=3", "--name=a b", **settings)
    _, printed = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, printed
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:4] == ["-m", "launch", "--config_file", f"launch/accelerate/{strategy}.yaml"]
    assert words[words.index("--num_processes") + 1] == "2"
    assert words[words.index("pretrain/main.py") :] == [
        "pretrain/main.py",
        "--steps=3",
        "--name=a b",
        "--resume",
        "auto",
    ]
    assert (ROOT / words[3]).is_file()


@pytest.mark.slow
def test_the_job_saves_requeues_and_goes_on(tmp_path):
    for name in ("pretrain", "launch", "vim_backbone", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    job = submit(tmp_path, *SMALL, "--steps=4000")
    wait_for(lambda: rows_written(tmp_path / "runs/run") > 1, "two steps", job)
    job.send_signal(signal.SIGUSR1)
    _, printed = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, printed[-3000:]
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "42"]
    assert "stopped by SIGUSR1" in printed
    done = int(checkpoints(tmp_path / "runs/run/checkpoints")[-1].name[5:])
    (tmp_path / "requeued").unlink()
    job = submit(tmp_path, *SMALL, f"--steps={done + 1}")
    _, printed = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, printed[-3000:]
    assert f"from step {done}" in printed
    assert not (tmp_path / "requeued").exists()
