"""What every benchmark says about the machine, and how fast it can go at best."""

import csv
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from vim_kernels import available_backends

PACKAGES = ("torch", "timm", "numba", "triton", "mamba_ssm")


def clock(device: str) -> str:
    """The device and its clock now; of a CPU the instructions that PyTorch and the kernels use."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.max.sm", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    frequency = psutil.cpu_freq()
    speed = f"{frequency.current / 1000:.2f} GHz" if frequency else "clock unknown"
    sets = f"PyTorch {torch.backends.cpu.get_cpu_capability()}"
    if available_backends("cpu")["cpu"] is None:
        from vim_kernels.cpu_backend.vector import instruction_set

        sets += f", kernels {instruction_set()}"
    return f"{names[0] if names else platform.machine()} ({sets}), {speed}, {torch.get_num_threads()} threads"


def versions() -> str:
    """Of what is measured."""
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    names = [f"{name} {metadata.version(name)}" for name in PACKAGES if name in installed]
    return ", ".join([*names, f"python {platform.python_version()}"])


def write_csv(path: Path, rows: list[dict[str, Any]], about: dict[str, str]) -> None:
    """The rows, each with what they are about behind it; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], *about])
        table.writeheader()
        table.writerows(row | about for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table that `write_csv` wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def seconds(run: Callable[[], object], device: str, budget: float = 0.5) -> float:
    """Median seconds of `run` over about `budget` seconds, after a warm-up; on a GPU by its own clock."""
    run()
    if device == "cuda":
        from triton.testing import do_bench

        milliseconds: Any = do_bench(run, warmup=20, rep=round(200 * budget), return_mode="median")
        return milliseconds / 1e3
    times: list[float] = []
    while sum(times) < budget or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The kernels of `run` without the Python around them: a CUDA graph, taken on the current stream."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def rate(run: Callable[[], object], amount: float, device: str) -> float:
    """Amount a second at best."""
    return amount / min(seconds(run, device, 0.1) for _ in range(3))


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product."""
    side = 8192 if device == "cuda" else 1536
    square = torch.randn(side, side, device=device, dtype=dtype)
    return rate(lambda: square @ square, 2 * side**3, device)


def copy_rate(device: str) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(2**30 if device == "cuda" else 2**26, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return rate(lambda: target.copy_(source), 2 * source.nbytes, device)


def exp_rate(device: str) -> float:
    """Exponentials a second, from registers on a GPU, by `torch.exp` in the cache on a CPU."""
    if device == "cuda":
        from benchmarks.exp_roof import run, total

        return rate(run, total(), device)
    numbers = torch.randn(2**16, device=device)
    out = torch.empty_like(numbers)
    return rate(lambda: torch.exp(numbers, out=out), numbers.numel(), device)


def peak_allocated(profiled: Any) -> int:
    """Most bytes allocated at a time since a `torch.profiler.profile(profile_memory=True)` was started."""
    total = most = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most
