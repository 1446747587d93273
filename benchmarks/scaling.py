"""Strategies side by side on two CPU processes: speed, memory of each process beside the theory, checkpoints.

`python -m benchmarks.scaling` prints tables. Memory is counted in tensors and allocations, so that it is exact on a
busy machine; seconds are medians and shown as ratios too. The theory is launch/planning/memory.py.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

import torch

from benchmarks.machine import clock, versions
from launch.planning.memory import peak, shares
from launch.run.config import RunConfig
from launch.run.optim import OptimConfig, build_optimizer
from launch.state.checkpoint import Checkpoint, TrainState, newest_valid, snapshot, write_snapshot
from pretrain.config import PretrainConfig
from pretrain.plan import planned_footprints
from pretrain.train import build_model

ROOT = Path(__file__).parents[1]


def trained(strategy: str, where: Path, options: argparse.Namespace) -> dict[str, float]:
    """What the processes of a short run found: the most of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", f"--num_processes={options.processes}",
            f"--main_process_port={port}", f"--config_file={ROOT / 'launch/accelerate' / strategy}.yaml",
            str(ROOT / "benchmarks/scaling_worker.py"), f"--steps={options.steps}", f"--name={strategy}",
            f"--batch_size={options.batch_size}", "--trackers=[]", "--data.workers=1", f"--out={where}"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "true"} if strategy == "ddp" else {})
    process = subprocess.run(argv, check=False, env=env, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{strategy} failed:\n{process.stderr[-3000:]}")
    measured = [json.loads(path.read_text()) for path in (where / strategy).glob("process-*.json")]
    return {key: max(each[key] for each in measured) for key in measured[0]}


def strategies(where: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Print a row for each strategy."""
    config = PretrainConfig()
    architecture, dtype = config.architecture(), torch.float32
    work = config.method.work(architecture, dtype.itemsize, config.model.level)
    model = planned_footprints(architecture, config.method, [work], dtype, backend="cpu")[0]
    print(f"{model.parameters / 1e6:.2f} M parameters, {options.processes} processes, batch {options.batch_size}")
    print("| strategy | s / step | times ddp | held MB | theory | peak MB | plan.py | start s |\n|" + "---|" * 8)
    rows: list[dict[str, float]] = []
    for share in shares(model, options.processes):
        measured = trained(share.strategy, where, options)
        rows.append(measured)
        # between steps ZeRO-1 and -2 hold no gradients, and ZeRO-3 nothing whole
        between = {"ddp": share.held, "zero3": share.held - 4 * (model.outside + 2 * model.block)}
        held = between.get(share.strategy, share.parameters + share.optimizer)
        most = peak(model, share, options.batch_size // options.processes)
        print(
            f"| {share.strategy} | {measured['step_seconds']:.3f} "
            f"| {measured['step_seconds'] / rows[0]['step_seconds']:.2f} "
            f"| {measured['held'] / 1e6:.1f} | {held / 1e6:.1f} | {measured['peak'] / 1e6:.1f} | {most / 1e6:.1f} "
            f"| {measured['start_seconds']:.1f} |",
            flush=True,
        )
    return rows


def checkpoint_costs(where: Path, step_seconds: float) -> None:
    """Print the size of the default model's checkpoint, and the seconds that each part of its life takes."""
    config = PretrainConfig()
    model = build_model(config)
    state = TrainState(model, build_optimizer(model, OptimConfig(), 1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    parts: dict[str, list[float]] = {"copy": [], "write": [], "verify": [], "load": []}
    size = 0.0
    for number in range(5):
        times = [time.perf_counter()]
        copied = snapshot(state)
        times.append(time.perf_counter())
        path = write_snapshot(copied, where, keep=1)
        times.append(time.perf_counter())
        assert newest_valid(where)[0] == path
        times.append(time.perf_counter())
        Checkpoint(path).load(state)
        times.append(time.perf_counter())
        state.step = number + 1
        for part, begin, end in zip(parts, times, times[1:], strict=False):
            parts[part].append(end - begin)
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    took = {part: median(values) for part, values in parts.items()}
    interval = RunConfig.checkpoint_every * step_seconds
    print(
        f"\ncheckpoint: {size:.1f} MB; "
        + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in took.items())
        + f"; every {RunConfig.checkpoint_every} steps of {step_seconds:.2f} s the copy is "
        f"{took['copy'] / interval:.4%} of the time, copy and write {(took['copy'] + took['write']) / interval:.4%}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    print(f"{clock('cpu')}; {versions()}; load {os.getloadavg()[0]:.1f}; {date.today()}")
    with tempfile.TemporaryDirectory() as folder:
        rows = strategies(Path(folder), options)
        checkpoint_costs(Path(folder) / "checkpoints", rows[0]["step_seconds"])


if __name__ == "__main__":
    main()
