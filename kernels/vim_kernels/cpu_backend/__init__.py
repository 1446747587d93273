"""The ops on CPUs, compiled by Numba at the first call: no compiler needed, AVX-512, AVX2 and NEON from one source."""

import torch

try:
    from numba.core import config
except ImportError as error:
    _missing = f"it needs the package numba ({error}): pip install numba"
else:
    _missing = None
    # OpenMP enters a parallel loop in 9 us, Numba's own pool in 110 us: half of the time of a small image.
    config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # pyright: ignore[reportAttributeAccessIssue]

    from vim_kernels.cpu_backend.bidirectional import bidirectional_scan_backward as bidirectional_scan_backward
    from vim_kernels.cpu_backend.bidirectional import bidirectional_scan_forward as bidirectional_scan_forward
    from vim_kernels.cpu_backend.bidirectional import bidirectional_scan_saved as bidirectional_scan_saved
    from vim_kernels.cpu_backend.convolution import causal_conv1d_backward as causal_conv1d_backward
    from vim_kernels.cpu_backend.convolution import causal_conv1d_forward as causal_conv1d_forward
    from vim_kernels.cpu_backend.norm import add_rms_norm_backward as add_rms_norm_backward
    from vim_kernels.cpu_backend.norm import add_rms_norm_forward as add_rms_norm_forward
    from vim_kernels.cpu_backend.pooled import pooled_scan_backward as pooled_scan_backward
    from vim_kernels.cpu_backend.pooled import pooled_scan_forward as pooled_scan_forward
    from vim_kernels.cpu_backend.pooled import pooled_scan_saved as pooled_scan_saved
    from vim_kernels.cpu_backend.selective import selective_scan_backward as selective_scan_backward
    from vim_kernels.cpu_backend.selective import selective_scan_forward as selective_scan_forward
    from vim_kernels.cpu_backend.selective import selective_scan_saved as selective_scan_saved


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, or None."""
    return _missing if device.type == "cpu" else f"it runs on CPU tensors, not on {device.type}"
