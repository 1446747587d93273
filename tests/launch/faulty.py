"""pretrain/main.py with faults planted: FAULTS is `kind@step:rank`, comma-separated. Run by the tests of faults.

kinds: nan (the loss), spike (the loss times 100), hang, wait (until the run's folder has a file `go`), stop (SIGSTOP),
loader (kill -9 of a data-loading process), kill (kill -9 of itself, once in the life of the run), oom (out of memory in
the backward pass, while other processes send gradients).
IDS names a file that takes the samples of each step.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:1] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]

import torch

from launch.run.cli import leave, run
from pretrain import main, train

RANK = int(os.environ.get("RANK", "0"))
FAULTS = [fault.replace(":", "@").split("@") for fault in os.environ.get("FAULTS", "").split(",") if fault]


def due(kind, step):
    return any(k == kind and int(s) == step and int(r) in (RANK, -1) for k, s, r in FAULTS)


def checked(run, batch):
    step = run.training.state.step + 1
    if os.environ.get("IDS"):
        with open(f"{os.environ['IDS']}-{RANK}", "a") as file:
            file.write(json.dumps([step, batch.names]) + "\n")
    if due("loader", step):
        children = [p for p in multiprocessing.active_children() if p.pid]
        os.kill(children[0].pid, signal.SIGKILL)
        time.sleep(0.5)
    while due("wait", step) and not (run.config.folder / "go").exists():
        (run.config.folder / "waits").touch()
        time.sleep(0.05)
    if due("hang", step):
        time.sleep(1000)
    if due("stop", step):
        os.kill(os.getpid(), signal.SIGSTOP)
    once = run.config.folder / f"killed-{RANK}"
    if due("kill", step) and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(run, batch)


def backward(self, loss):
    step = self.state.step + 1
    if due("oom", step):
        if not loss.is_cuda:
            raise torch.OutOfMemoryError("planted")
        torch.empty(2**45, device=loss.device)
    if due("spike", step):
        loss = loss * 100
    return original_backward(self, loss * float("nan") if due("nan", step) else loss)


original, train.checked = train.checked, checked
original_backward, train.Training.backward = train.Training.backward, backward

if __name__ == "__main__":
    leave(run(main.main))
