"""The ops on CPUs, compiled by Numba at the first call: no compiler needed, AVX-512, AVX2 and NEON from one source."""

import os
import sys

import torch

_forked_after_kernels = False
"""Whether this process was forked from one whose threads of OpenMP it lacks."""


def _note_fork() -> None:
    global _forked_after_kernels
    threads = sys.modules.get("numba.np.ufunc.parallel")
    _forked_after_kernels |= threads is not None and threads._is_initialized


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_note_fork)

try:
    from numba.core import config
except ImportError as error:
    _import_error = f"it needs the package numba ({error}): pip install numba"
else:
    _import_error = None
    # OpenMP enters a parallel loop in 9 us, Numba's own pool in 110 us: half of the time of a small image.
    config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # pyright: ignore[reportAttributeAccessIssue]


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, or None."""
    if _forked_after_kernels:
        return "this process was forked after a kernel ran, which ends GNU OpenMP: start it by spawn or forkserver"
    return _import_error if device.type == "cpu" else f"it runs on CPU tensors, not on {device.type}"
