"""pretrain/main.py that writes what each process holds and needs; started by benchmarks/scaling.py.

Bytes are those of tensors, counted by storage, and of PyTorch's allocations during one step: exact on a busy machine.
"""

import gc
import itertools
import json
import os
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
from launch.run.training import Training
from pretrain import main, train

PROFILED_STEP = 3
RANK = int(os.environ.get("RANK", "0"))
measured: dict[str, float] = {}
times: list[float] = []
profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)


def held() -> int:
    """Bytes of all tensors of this process, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def checked(run, batch):
    measured.setdefault("start_seconds", time.time() - psutil.Process().create_time())
    if run.training.state.step == PROFILED_STEP:
        gc.collect()
        measured["held"] = held()
        profiler.start()
    return original_checked(run, batch)


def update(self, rate, names):
    original_update(self, rate, names)
    times.append(time.perf_counter())
    if self.state.step == PROFILED_STEP + 1:
        profiler.stop()
        measured["peak"] = measured["held"] + peak_allocated(profiler)


def publish(run):
    pauses = [b - a for a, b in itertools.pairwise(times[PROFILED_STEP + 1 :])]
    measured["step_seconds"] = median(pauses)
    path = run.config.folder / f"process-{RANK}.json"
    path.write_text(json.dumps(measured))
    original_publish(run)


original_checked, train.checked = train.checked, checked
original_update, Training.update = Training.update, update
original_publish, train.publish = train.publish, publish

if __name__ == "__main__":
    sys.exit(run(main.main))
