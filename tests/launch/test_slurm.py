"""The SLURM script under stand-ins for srun, scancel and scontrol: it saves before the limit, requeues, and resumes."""

import signal

import pytest

from launch.state.checkpoint import checkpoints
from tests.launch.real import ROOT, SMALL, rows_written
from tests.launch.slurm import submit
from tests.waiting import LIMIT, wait_for

pytestmark = pytest.mark.slow


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
