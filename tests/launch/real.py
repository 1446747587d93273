"""Starts real runs in processes of their own, as a user does: two on CPU, with gloo, or on two GPUs, with NCCL."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import waiting
from tests.launch.preloaded import Popen
from tests.rows import read_metrics

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "launch/accelerate"
SMALL = ["--model.img_size=32", "--model.depth=2", "--decoder.width=32", "--decoder.depth=1", "--batch_size=8",
         "--optim.warmup_steps=1", "--log_every=1", "--data.workers=0", "--trackers=[]", "--name=run"]  # fmt: skip
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
PROGRAMS = Path(sys.executable).parent
TWO_GPUS = pytest.mark.gpus(2)
NO_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(device: str = "cpu", **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "ACCELERATE", "TORCHELASTIC"))}
    path = f"{PROGRAMS}:{os.environ['PATH']}"  # as after `source .venv/bin/activate`
    if device == "cuda":
        return clean | {"OMP_NUM_THREADS": "1", "PATH": path} | more
    waits = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{waiting.LIMIT:.0f}"}
    no_gpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return clean | waits | no_gpu | {"OMP_NUM_THREADS": "1", "PATH": path} | more


def begin(argv: list[str], where: Path, env: dict[str, str], device: str = "cpu") -> Popen | subprocess.Popen[str]:
    if device == "cpu":
        return Popen(argv, where, env)
    # a fork of a process that has looked for GPUs may use none
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(argv, cwd=where, env=env, text=True, start_new_session=True, **pipes)


def command(strategy: str, *argv: str, script: Path | None = None, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command of a strategy: "one" process without a launcher, else two under `accelerate launch`."""
    run = [str(script or ROOT / "pretrain/main.py"), *SMALL, *argv]
    if strategy == "one":
        return [sys.executable, *run]
    launch = [*ACCELERATE, "--quiet", "--num_processes=2",
              f"--main_process_port={free_port()}", f"--config_file={CONFIGS / strategy}.yaml", *launcher]  # fmt: skip
    return [*launch, *run]


def extra(strategy: str, device: str = "cpu") -> dict[str, str]:
    return {"ACCELERATE_USE_CPU": "true"} if (strategy, device) == ("ddp", "cpu") else {}


def start(
    where: Path, strategy: str, *argv: str, env: dict[str, str] | None = None, device: str = "cpu", **options
) -> Popen | subprocess.Popen[str]:
    where.mkdir(parents=True, exist_ok=True)
    environ = environment(device, **(extra(strategy, device) | (env or {})))
    return begin(command(strategy, *argv, **options), where, environ, device)


def finish(process: subprocess.Popen | Popen) -> tuple[int, str]:
    """Exit code and all that was printed; one that does not end fails with that. Nothing of it is left running."""
    try:
        out, err = process.communicate(timeout=waiting.LIMIT)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it did not end within {waiting.LIMIT:g} s\n{waiting.kill(process)}") from None
    finally:
        if process.poll() is None:
            waiting.kill(process)
    return process.returncode, out + err


def run(where: Path, strategy: str, *argv: str, **options) -> Path:
    code, printed = finish(start(where, strategy, *argv, **options))
    assert code == 0, printed[-6000:]
    return where / "runs/run"


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl")}


def rows_written(folder: Path) -> int:
    """Rows of metrics of a run that may be going on."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
