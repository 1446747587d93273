"""One door to the Triton launcher: the tensors' device, and the options that every kernel shares."""

from typing import Any

import torch

OPTIONS = {"enable_fp_fusion": True}
"""The kernels count on fused multiply-add, which Triton 3.10 no longer assumes."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its first argument, a tensor; constants include num_warps and num_stages."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **OPTIONS)
