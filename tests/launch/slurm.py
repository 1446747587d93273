"""The SLURM script under stand-ins for srun, scancel and scontrol, on one host without GPUs."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from tests.launch.real import CONFIGS, ROOT, environment, free_port

TOOLS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; export SLURM_NODEID=0; setsid "$@" & echo $! > srun.pid; wait $!',
    # as SLURM does: to every process of the step
    "scancel": """tell() { kill -USR1 "$1"; for child in $(pgrep -P "$1"); do tell "$child"; done; }
tell "$(cat srun.pid)\"""",
    "scontrol": 'if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" > requeued; fi',
}


def submit(where: Path, *argv: str, **settings: str) -> subprocess.Popen:
    """Run the script with these arguments, by DDP on two processes, in a folder that looks like the checkout.

    `settings`: variables that are given ahead of `sbatch`.
    """
    tools = where / "tools"
    tools.mkdir(exist_ok=True)
    for name, body in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(stat.S_IRWXU)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(PATH=path, SLURM_JOB_ID="42", SLURM_JOB_NODELIST="here", SLURM_NNODES="1", GPUS="2",
                      PORT=str(free_port()), ACCELERATE_USE_CPU="true",
                      **{"STRATEGY": str(CONFIGS / "ddp.yaml")} | settings)  # fmt: skip
    script = ["bash", str(ROOT / "launch/slurm/pretrain.sbatch"), *argv]
    return subprocess.Popen(script, cwd=where, env=env, stderr=subprocess.PIPE, text=True)
