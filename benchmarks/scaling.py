"""Strategies side by side on two CPU processes (`--processes`, and no `--cpu`, for GPUs): speed, memory, checkpoints.

`python -m benchmarks.scaling --cpu` prints a table: images a second (median over the second half of the run), resident
memory of the main process at the end (peak of the allocator on GPUs), size of a checkpoint and seconds to copy it to
CPU memory, which is what an asynchronous checkpoint costs the training, and seconds to have it on disk.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from launch.checkpoint import TrainState, newest_valid, snapshot, write_snapshot
from launch.metrics import read_metrics
from launch.optim import OptimConfig, build_optimizer
from pretrain.config import PretrainConfig
from pretrain.train import build_model

ROOT = Path(__file__).parents[1]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


def trained(strategy: str, where: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Rows of metrics.jsonl of a short run."""
    cpu = {"ACCELERATE_USE_CPU": "true"} if options.cpu and strategy == "ddp" else {}
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", f"--num_processes={options.processes}",
            f"--config_file={ROOT / 'launch/accelerate' / strategy}.yaml", str(ROOT / "pretrain/main.py"),
            f"--steps={options.steps}", f"--name={strategy}", "--log_every=1", "--trackers=[]", "--data.workers=1",
            f"--out={where}", "--picture_every=100000"]  # fmt: skip
    env = os.environ | cpu | ({"OMP_NUM_THREADS": "1"} if options.cpu else {})
    subprocess.run(argv, check=True, env=env, capture_output=True)
    return read_metrics(where / strategy / "metrics.jsonl")


def checkpoint_costs(where: Path) -> tuple[float, float, float, float]:
    """Size of the default model's checkpoint in MB, and seconds to copy, to write and to verify it."""
    config = PretrainConfig()
    model = build_model(config)
    state = TrainState(model, build_optimizer(model, OptimConfig(), 1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    times = [time.perf_counter()]
    taken = snapshot(state)
    times.append(time.perf_counter())
    path = write_snapshot(taken, where, keep=1)
    times.append(time.perf_counter())
    assert newest_valid(where)[0] == path
    times.append(time.perf_counter())
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    return size, times[1] - times[0], times[2] - times[1], times[3] - times[2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cpu", action="store_true", help="two CPU processes with gloo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("| strategy | images/s | GB |\n|---|---|---|")
        for strategy in STRATEGIES:
            rows = trained(strategy, Path(folder), options)
            speed = median(row["images_per_second"] for row in rows[len(rows) // 2 :])
            print(f"| {strategy} | {speed:.1f} | {rows[-1]['memory_gb']:.2f} |", flush=True)
        size, copy, write, verify = checkpoint_costs(Path(folder) / "checkpoints")
        print(
            f"\ncheckpoint: {size:.1f} MB, copied in {copy:.3f} s, written in {write:.3f} s, verified in {verify:.3f} s"
        )


if __name__ == "__main__":
    main()
