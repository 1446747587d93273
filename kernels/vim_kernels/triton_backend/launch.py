"""One door to the Triton launcher: the tensors' device, the options that every kernel shares, and sizes of grids."""

from typing import Any

import torch

OPTIONS = {"enable_fp_fusion": True}
"""The kernels count on fused multiply-add, which Triton 3.10 no longer assumes."""


def cdiv(a: int, b: int) -> int:
    """The least whole number not below a / b. Triton's own can run in kernels, too, and is slower."""
    return (a + b - 1) // b


def power_of_two(size: int) -> int:
    """The least power of two not below `size`."""
    return 1 << (size - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its first argument, a tensor; constants include num_warps and num_stages."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **OPTIONS)
