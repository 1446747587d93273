"""The ops on CPUs, compiled by Numba at the first call: no compiler needed, AVX-512, AVX2 and NEON from one source."""

import torch

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
    return _import_error if device.type == "cpu" else f"it runs on CPU tensors, not on {device.type}"
