"""Starts real runs in processes of their own, as a user does, on two CPU processes with gloo."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.rows import read_metrics

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "launch/accelerate"
SMALL = ["--model.img_size=32", "--model.depth=2", "--decoder.width=32", "--decoder.depth=1", "--batch_size=8",
         "--optim.warmup_steps=1", "--log_every=1", "--data.workers=0", "--trackers=[]", "--name=run"]  # fmt: skip
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "ACCELERATE", "TORCHELASTIC"))}
    return clean | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | more


def command(strategy: str, *argv: str, script: Path | None = None, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command of a strategy: "one" process without a launcher, else two under `accelerate launch`."""
    run = [str(script or ROOT / "pretrain/main.py"), *SMALL, *argv]
    if strategy == "one":
        return [sys.executable, *run]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes=2",
              f"--main_process_port={free_port()}", f"--config_file={CONFIGS / strategy}.yaml", *launcher]  # fmt: skip
    return [*launch, *run]


def extra(strategy: str) -> dict[str, str]:
    return {"ACCELERATE_USE_CPU": "true"} if strategy == "ddp" else {}


def start(where: Path, strategy: str, *argv: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
    where.mkdir(parents=True, exist_ok=True)
    environ = environment(**(extra(strategy) | (env or {})))
    return subprocess.Popen(
        command(strategy, *argv, **options), cwd=where, env=environ, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 400) -> tuple[int, str]:
    """Exit code and all that was printed; nothing of it is left running."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out + err


def run(where: Path, strategy: str, *argv: str, **options) -> Path:
    code, printed = finish(start(where, strategy, *argv, **options))
    assert code == 0, printed[-6000:]
    return where / "runs/run"


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl")}
