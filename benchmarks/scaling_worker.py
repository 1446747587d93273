"""pretrain/main.py that writes what each process holds and needs; started by benchmarks/scaling.py.

Bytes of a CPU process are those of tensors, counted by storage, and of PyTorch's allocations during one step: exact on
a busy machine. Those of a GPU are the allocator's. With SCALING_PROFILE the first process writes where the Python of
some steps spends its time, in steps that are not timed.
"""

import cProfile
import gc
import io
import itertools
import json
import os
import pstats
import sys
import time
from pathlib import Path
from statistics import median

sys.path[:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import peak_allocated
from launch.run.cli import run
from launch.run.metrics import Throughput
from launch.run.training import Training
from pretrain import main, train

COUNTED_STEP = 3
"""Whose memory is counted."""
PYTHON_STEPS = 3
"""Of which the Python is profiled, behind it."""
ROWS = 45
RANK = int(os.environ.get("RANK", "0"))
PROFILE = os.environ.get("SCALING_PROFILE") if RANK == 0 else None
measured: dict[str, float] = {}
times: list[float] = []
waits: list[float] = []
allocations = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
python = cProfile.Profile()


def held() -> int:
    """Bytes of all tensors of this process, each storage once; on a GPU of what its allocator gave out."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def checked(run, batch):
    step = run.training.state.step
    measured.setdefault("start_seconds", time.time() - psutil.Process().create_time())
    if step == COUNTED_STEP:
        gc.collect()
        measured["held"] = held()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            allocations.start()
    if PROFILE and step == COUNTED_STEP + 1:
        python.enable()
    return original_checked(run, batch)


def update(self, rate, names):
    original_update(self, rate, names)
    step = self.state.step
    if step == COUNTED_STEP + 1:
        if torch.cuda.is_available():
            measured["peak"] = torch.cuda.max_memory_allocated()
        else:
            allocations.stop()
            measured["peak"] = measured["held"] + peak_allocated(allocations)
    if PROFILE and step == COUNTED_STEP + 1 + PYTHON_STEPS:
        python.disable()
        write_profile(Path(PROFILE))
    if step > COUNTED_STEP + 1 + PYTHON_STEPS * bool(PROFILE):
        times.append(time.perf_counter())


def write_profile(path: Path) -> None:
    """Functions of the profiled steps, by their own time and with what they call."""
    text = io.StringIO()
    for order in ("tottime", "cumulative"):
        pstats.Stats(python, stream=text).sort_stats(order).print_stats(ROWS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{PYTHON_STEPS} steps\n{text.getvalue()}")


def read(self):
    rates = original_read(self)
    waits.append(rates["data_wait_share"])
    return rates


def publish(run):
    steps = [b - a for a, b in itertools.pairwise(times)]
    measured["step_seconds"], measured["longest_seconds"] = median(steps), max(steps)
    measured["waiting"] = median(waits[-2:])
    path = run.config.folder / f"process-{RANK}.json"
    path.write_text(json.dumps(measured))
    original_publish(run)


original_checked, train.checked = train.checked, checked
original_update, Training.update = Training.update, update
original_publish, train.publish = train.publish, publish
original_read, Throughput.read = Throughput.read, read

if __name__ == "__main__":
    sys.exit(run(main.main))
