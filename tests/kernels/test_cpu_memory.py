"""The CPU kernels touch no memory but their own: another thread fills all that is free, and nothing changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import LIMIT

pytest.importorskip("numba", reason="the CPU kernels are Numba's")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="one heap for all threads is a setting of glibc"),
]
PROGRAM = """
import ctypes, threading, torch
from vim_backbone import VimConfig, VisionMamba
from vim_kernels import causal_conv1d, selective_scan

torch.set_num_threads(1)
torch.manual_seed(0)
model = VisionMamba(VimConfig(d_model=64, depth=1, img_size=(64, 64)))
images = torch.randn(2, 3, 64, 64)
x, dt, B, C = torch.randn(2, 50, 64), torch.rand(2, 50, 64), torch.randn(2, 50, 16), torch.randn(2, 50, 16)
A, weight = -torch.rand(64, 16), torch.randn(64, 4)


def everything():
    leaves = [*model.parameters(), *(t.requires_grad_() for t in (x, dt, A, B, C, weight))]
    outs = [model(images), selective_scan(x, dt, A, B, C), causal_conv1d(x, weight, None)]
    grads = torch.autograd.grad(sum(out.square().sum() for out in outs), leaves, allow_unused=True)
    return [*outs, *(grad for grad in grads if grad is not None)]


libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
done = False


def fill():
    count = 0
    while not done:
        size = 2000 + 977 * count % 40000
        taken = libc.malloc(size)
        libc.memset(taken, count % 256, size)
        libc.free(taken)
        count += 1


wanted = everything()
thread = threading.Thread(target=fill)
thread.start()
try:
    same = [all(torch.equal(a, b) for a, b in zip(everything(), wanted, strict=True)) for _ in range(60)]
finally:
    done = True
    thread.join()
assert len(wanted) > 20
print(sum(same))
"""


def test_what_another_thread_allocates_changes_nothing():
    root = Path(__file__).parents[2]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "60"), ran.stderr[-2000:]
