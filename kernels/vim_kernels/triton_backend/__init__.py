"""Fast backend on Triton: NVIDIA and AMD devices, and CPU tensors under TRITON_INTERPRET=1 for tests.

Implements `vim_kernels.dispatch.contract`.
"""

import torch

try:
    import triton
    import triton.experimental.gluon  # which Triton 3.3, of PyTorch 2.7, lacks

    from vim_kernels.triton_backend.scan_forward import scan_forward_kernel

    _import_error = None
    _interpreted = not isinstance(scan_forward_kernel, triton.JITFunction)
except ImportError as error:
    _import_error = f"triton cannot be imported ({error}): it must be 3.6 or newer, as PyTorch 2.10 brings it"
    _interpreted = False


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot run on `device`, or None."""
    if _import_error:
        return _import_error
    if device.type == "cpu":
        return None if _interpreted else "Triton runs on CPU tensors only with TRITON_INTERPRET=1, for tests"
    if device.type != "cuda":
        return f"no Triton kernels for {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"wants compute capability 8.0 or newer, got {torch.cuda.get_device_capability(device)}"
    return None
