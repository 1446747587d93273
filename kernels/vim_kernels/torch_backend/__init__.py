"""The ops in plain PyTorch, as fast as that gets, forward and backward: for CPUs where Numba is not installed."""

import torch

from vim_kernels.torch_backend.conv import causal_conv1d_backward as causal_conv1d_backward
from vim_kernels.torch_backend.conv import causal_conv1d_forward as causal_conv1d_forward
from vim_kernels.torch_backend.mixer import bidirectional_scan_backward as bidirectional_scan_backward
from vim_kernels.torch_backend.mixer import bidirectional_scan_forward as bidirectional_scan_forward
from vim_kernels.torch_backend.mixer import bidirectional_scan_saved as bidirectional_scan_saved
from vim_kernels.torch_backend.norm import add_rms_norm_backward as add_rms_norm_backward
from vim_kernels.torch_backend.norm import add_rms_norm_forward as add_rms_norm_forward
from vim_kernels.torch_backend.scan import selective_scan_backward as selective_scan_backward
from vim_kernels.torch_backend.scan import selective_scan_forward as selective_scan_forward
from vim_kernels.torch_backend.scan import selective_scan_saved as selective_scan_saved


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001 - one signature for all backends
    """Runs wherever PyTorch does."""
    return None
