"""The SLURM script under stand-ins for srun, scancel and scontrol: it saves before the limit, requeues, and resumes."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch.state.checkpoint import checkpoints
from tests.launch.real import CONFIGS, ROOT, SMALL, environment, free_port, rows_written
from tests.waiting import LIMIT, wait_for

pytestmark = pytest.mark.slow
TOOLS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; export SLURM_NODEID=0; setsid "$@" & echo $! > srun.pid; wait $!',
    # as SLURM does: to every process of the step
    "scancel": """tell() { kill -USR1 "$1"; for child in $(pgrep -P "$1"); do tell "$child"; done; }
tell "$(cat srun.pid)\"""",
    "scontrol": 'if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" > requeued; fi',
}


def submit(where: Path, *argv: str) -> subprocess.Popen:
    tools = where / "tools"
    tools.mkdir(exist_ok=True)
    for name, body in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(stat.S_IRWXU)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(PATH=path, SLURM_JOB_ID="42", SLURM_JOB_NODELIST="here", SLURM_NNODES="1", GPUS="2",
                      STRATEGY=str(CONFIGS / "ddp.yaml"), PORT=str(free_port()), ACCELERATE_USE_CPU="true")  # fmt: skip
    script = ["bash", str(ROOT / "launch/slurm/pretrain.sbatch"), *SMALL, *argv]
    return subprocess.Popen(script, cwd=where, env=env, stderr=subprocess.PIPE, text=True)


def test_the_job_saves_requeues_and_goes_on(tmp_path):
    for name in ("pretrain", "launch", "vim_backbone", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    job = submit(tmp_path, "--steps=4000")
    wait_for(lambda: rows_written(tmp_path / "runs/run") > 1, "two steps", job)
    job.send_signal(signal.SIGUSR1)
    _, printed = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, printed[-3000:]
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "42"]
    assert "stopped by SIGUSR1" in printed
    done = int(checkpoints(tmp_path / "runs/run/checkpoints")[-1].name[5:])
    (tmp_path / "requeued").unlink()
    job = submit(tmp_path, f"--steps={done + 1}")
    _, printed = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, printed[-3000:]
    assert f"from step {done}" in printed
    assert not (tmp_path / "requeued").exists()
