"""pretrain/main.py that writes what each process holds and needs; started by benchmarks/scaling.py.

Bytes are those of tensors, counted by storage, and of PyTorch's allocations during one step: exact on a busy machine.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

sys.path[:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import peak_allocated
from launch.cli import run
from launch.training import Training
from pretrain import main, train

PROFILED_STEP = 3
RANK = int(os.environ.get("RANK", "0"))
found: dict[str, float] = {}
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
    if run.training.state.step == PROFILED_STEP:
        gc.collect()
        found["held"] = held()
        profiler.start()
    return original_checked(run, batch)


def update(self, *arguments):
    original_update(self, *arguments)
    if self.state.step == PROFILED_STEP + 1:
        profiler.stop()
        found["peak"] = found["held"] + peak_allocated(profiler)


def save(self):
    start = time.perf_counter()
    path = original_save(self)
    found["save_seconds"] = time.perf_counter() - start
    return path


def publish(run):
    path = run.config.folder / f"process-{RANK}.json"
    path.write_text(json.dumps(found))
    original_publish(run)


original_checked, train.checked = train.checked, checked
original_update, Training.update = Training.update, update
original_save, Training.save = Training.save, save
original_publish, train.publish = train.publish, publish

if __name__ == "__main__":
    sys.exit(run(main.main))
