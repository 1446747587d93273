"""Fast backend on Triton: NVIDIA and AMD devices, and CPU tensors under TRITON_INTERPRET=1 for tests.

Implements `vim_kernels.interface.FastBackend`.
"""

import torch

try:
    import triton

    from vim_kernels.triton_backend.forward_kernels import scan_forward_kernel
    from vim_kernels.triton_backend.mixer import bidirectional_scan_backward as bidirectional_scan_backward
    from vim_kernels.triton_backend.mixer import bidirectional_scan_forward as bidirectional_scan_forward
    from vim_kernels.triton_backend.mixer import bidirectional_scan_saved as bidirectional_scan_saved
    from vim_kernels.triton_backend.pooled import pooled_scan_backward as pooled_scan_backward
    from vim_kernels.triton_backend.pooled import pooled_scan_forward as pooled_scan_forward
    from vim_kernels.triton_backend.pooled import pooled_scan_saved as pooled_scan_saved
    from vim_kernels.triton_backend.selective import selective_scan_backward as selective_scan_backward
    from vim_kernels.triton_backend.selective import selective_scan_forward as selective_scan_forward
    from vim_kernels.triton_backend.selective import selective_scan_saved as selective_scan_saved
    from vim_kernels.triton_backend.tokens import add_rms_norm_backward as add_rms_norm_backward
    from vim_kernels.triton_backend.tokens import add_rms_norm_forward as add_rms_norm_forward
    from vim_kernels.triton_backend.tokens import causal_conv1d_backward as causal_conv1d_backward
    from vim_kernels.triton_backend.tokens import causal_conv1d_forward as causal_conv1d_forward

    _missing = None
    _interpreted = not isinstance(scan_forward_kernel, triton.JITFunction)
except ImportError as error:
    _missing = f"triton cannot be imported ({error}): pip install triton"
    _interpreted = False


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot run on `device`, or None."""
    if _missing:
        return _missing
    if device.type == "cpu":
        return None if _interpreted else "Triton runs on CPU tensors only with TRITON_INTERPRET=1, for tests"
    if device.type != "cuda":
        return f"no Triton kernels for {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"wants compute capability 8.0 or newer, got {torch.cuda.get_device_capability(device)}"
    return None
