"""Strategies side by side, on CPUs or GPUs of one host: speed, memory of each process beside the theory, checkpoints.

`python -m benchmarks.scaling` prints tables of the default job on two CPU processes; `--processes 1 2` compares their
numbers too, and what stands behind `--` are settings of pretrain/main.py, as in

    python -m benchmarks.scaling --device cuda --processes 1 2 --strategies ddp zero2 zero3 --batch-size 256 --steps 25
        --pictures 0.065 -- --model.name vim_large --model.depth null --model.img_size 224 --precision bf16

Each row is a run of the product. Memory of a CPU process is counted in tensors and allocations, so that it is exact on
a busy machine, and of a GPU in what PyTorch's allocator gave out; seconds are medians and shown as ratios too. The
theory is launch/planning/memory.py. `--batch-size` is that of one process: more of them do more. `--profile` writes
where the Python of a step spends its time, into `--out`, and `--checkpoints` what one costs. The longest step is one
with a checkpoint where the settings ask for some, as `--checkpoint_every 8 --async_checkpoints false`.
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
from typing import Any

import psutil
import torch
import yaml

from benchmarks.machine import clock, versions, write_csv
from benchmarks.pictures import write_pictures
from launch.planning.memory import Share, peak, shares
from launch.run.cli import parse
from launch.run.config import RunConfig
from launch.run.optim import OptimConfig, build_optimizer
from launch.state.checkpoint import Checkpoint, TrainState, newest_valid, snapshot, write_snapshot
from pretrain.config import PretrainConfig
from pretrain.plan import planned_footprints
from pretrain.train import build_model

ROOT = Path(__file__).parents[1]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
PICTURES = 512
"""Files that `--pictures` writes; each is seen again and again."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="numbers of them; one alone has no ZeRO")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8, help="pictures of a step for each process")
    parser.add_argument("--compile", action="store_true", help="under torch.compile, with CUDA graphs")
    parser.add_argument("--pictures", type=float, metavar="MEGAPIXELS", help="train on JPEGs of so many, made first")
    parser.add_argument(
        "--zero", type=json.loads, metavar="JSON", help="more settings of DeepSpeed's zero_optimization"
    )
    parser.add_argument("--profile", action="store_true", help="write profile-STRATEGY-PROCESSES.txt into --out")
    parser.add_argument(
        "--checkpoints", type=int, nargs="?", const=5, metavar="TIMES", help="also what one costs, the median of 5"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="end a run that takes longer, and go on")
    parser.add_argument("--out", type=Path, help="folder for scaling.csv, and for profiles")
    parser.add_argument("settings", nargs="*", help="of pretrain/main.py, behind --")
    options = parser.parse_args()
    if options.profile and not options.out:
        parser.error("--profile writes into --out: give a folder")
    return options


def trained(strategy: str, processes: int, where: Path, options: argparse.Namespace) -> dict[str, float]:
    """What the processes of a short run measured: the most of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = f"{strategy}-{processes}"
    file = ROOT / f"launch/accelerate/{'gpu' if options.device == 'cuda' and processes == 1 else strategy}.yaml"
    if options.zero and strategy != "ddp":
        file = with_settings(file, options.zero, where)
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", f"--num_processes={processes}",
            f"--main_process_port={port}", f"--config_file={file}",
            *(["--dynamo_backend=inductor", "--dynamo_mode=reduce-overhead"] if options.compile else []),
            str(ROOT / "benchmarks/scaling_worker.py"), f"--steps={options.steps}", f"--name={name}",
            f"--batch_size={options.batch_size * processes}", "--trackers=[]", f"--out={where}", "--log_every=4",
            "--picture_every=1000000", *options.settings]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if strategy == "ddp" and options.device == "cpu":
        env["ACCELERATE_USE_CPU"] = "true"
    if options.profile and options.out:
        env["SCALING_PROFILE"] = str(options.out / f"profile-{name}.txt")
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=options.seconds)
    except subprocess.TimeoutExpired:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()  # processes that a launcher leaves behind would be beside the next row
        process.communicate()
        raise
    if process.returncode:
        raise RuntimeError(errors[-3000:])
    measured = [json.loads(path.read_text()) for path in (where / name).glob("process-*.json")]
    return {key: max(each[key] for each in measured) for key in measured[0]}


def with_settings(file: Path, zero: dict[str, Any], where: Path) -> Path:
    """A copy of a file of Accelerate's with more of DeepSpeed's settings than it can hold, which go into another."""
    content = yaml.safe_load(file.read_text())
    more = {"stage": content["deepspeed_config"]["zero_stage"]} | zero
    own = where / f"{file.stem}.json"
    own.write_text(json.dumps({"zero_optimization": more, "train_micro_batch_size_per_gpu": "auto"}))
    del content["mixed_precision"]
    content["deepspeed_config"] = {"deepspeed_config_file": str(own), "zero3_init_flag": False,
                                   "deepspeed_multinode_launcher": "standard"}  # fmt: skip
    changed = where / file.name
    changed.write_text(yaml.safe_dump(content))
    return changed


def strategies(where: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and give a row for each strategy and number of processes; one that fails is said and passed over."""
    config = parse(PretrainConfig, options.settings, "benchmarks.scaling", "")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    architecture = config.architecture()
    work = config.method.work(architecture, dtype.itemsize, config.model.level)
    backend = "triton" if options.device == "cuda" else "cpu"
    model = planned_footprints(architecture, config.method, [work], dtype, backend=backend)[0]
    print(f"{model.parameters / 1e6:.2f} M parameters, batch {options.batch_size} of each process")
    names = ("strategy", "processes", "s / step", "longest s", "times the first", "pictures / s", "efficiency",
             "waiting", "held MB", "theory", "peak MB", "plan.py", "sent MB", "start s")  # fmt: skip
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)
    rows: list[dict[str, Any]] = []
    for processes in options.processes:
        for share in shares(model, processes):
            if share.strategy not in options.strategies or (processes == 1 and share.strategy != "ddp"):
                continue
            try:
                measured = trained(share.strategy, processes, where, options)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{share.strategy} on {processes} failed: {error}", flush=True)
                continue
            held, most = held_between_steps(model, share), peak(model, share, options.batch_size)
            first = rows[0] if rows else {"seconds": measured["step_seconds"], "processes": processes}
            rows.append({
                "strategy": share.strategy, "processes": processes, "seconds": measured["step_seconds"],
                "longest": measured["longest_seconds"], "relative": measured["step_seconds"] / first["seconds"],
                "pictures": options.batch_size * processes / measured["step_seconds"],
                "efficiency": first["seconds"] / measured["step_seconds"] if first["processes"] == 1 else "",
                "waiting": measured["waiting"], "held": measured["held"] / 1e6, "theory": held / 1e6,
                "peak": measured["peak"] / 1e6, "planned": most / 1e6, "sent": share.sent / 1e6,
                "start": measured["start_seconds"],
            })  # fmt: skip
            texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in rows[-1].values()]
            print(f"| {' | '.join(texts)} |", flush=True)
            if options.out:
                about = {"settings": " ".join(options.settings), "compiled": str(options.compile)}
                write_csv(options.out / "scaling.csv", rows, about)
    return rows


def held_between_steps(model: Any, share: Share) -> float:
    """Bytes: ZeRO-1 and -2 hold no gradients then, and ZeRO-3 nothing whole."""
    between = {"ddp": share.total, "zero3": share.total - 4 * (model.outside + 2 * model.block)}
    return between.get(share.strategy, share.parameters + share.optimizer)


def checkpoint_costs(where: Path, step_seconds: float, options: argparse.Namespace) -> None:
    """Print the size of the model's checkpoint, and the seconds that each part of its life takes."""
    model = build_model(parse(PretrainConfig, options.settings, "benchmarks.scaling", "")).to(options.device)
    state = TrainState(model, build_optimizer(model, OptimConfig(), 1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    parts: dict[str, list[float]] = {"copy": [], "write": [], "verify": [], "load": []}
    size = 0.0
    for number in range(options.checkpoints):
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
    options = parse_options()
    print(f"{clock(options.device)}; {versions()}; load {os.getloadavg()[0]:.1f}; {date.today()}")
    with tempfile.TemporaryDirectory() as folder:
        if options.pictures:
            paths = write_pictures(Path(folder), "jpeg", options.pictures, PICTURES)
            options.settings += [f"--data.source={paths[0].parents[1]}"]
        rows = strategies(Path(folder), options)
        if options.checkpoints and rows:
            checkpoint_costs(Path(folder) / "checkpoints", rows[0]["seconds"], options)


if __name__ == "__main__":
    main()
