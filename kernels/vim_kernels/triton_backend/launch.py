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


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""What tells one compiled kernel from another, and more -> it, and the constants that its signature ends with."""
MOST_COMPILED = 4096
"""Entries to keep: packed pictures have another number of tokens at each step, are seldom found, and would fill the
memory."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its first argument, a tensor; constants include num_warps and num_stages.

    From the second time on without Triton's search for what it compiled, which takes longer than a small kernel. Triton
    specialises on types, on numbers (1, multiples of 16) and on pointers that 16 divides: the key has all of these. On
    AMD also on storages below 2 GB; there the numbers, rows and strides among them, say how far a kernel reaches.
    """
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, **constants)
            return
    kinds = [(each.dtype, each.data_ptr() % 16 == 0) if isinstance(each, torch.Tensor) else each for each in arguments]
    key = (id(kernel), device.index, *kinds, *constants, *constants.values())
    known = _compiled.get(key)
    if known is not None:
        compiled, rest = known
        compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
        return
    rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    compiled = kernel[grid](*arguments, **constants, **OPTIONS)
    if compiled is not None:  # Triton's interpreter compiles nothing
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled, rest
