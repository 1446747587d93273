"""A call of `bidirectional_scan` on a part of a sequence, with its gradients.

No custom op: what a part asks others for is no tensor, and nothing may trace over it.
"""

from typing import Any

import torch
from torch import Tensor

from vim_kernels.dispatch.choice import function
from vim_kernels.dispatch.contract import BidirectionalScan, Part, ScanWeights
from vim_kernels.dispatch.library import named

ROOM, FORWARD, BACKWARD = "mixer", "bidirectional_scan_forward", "part_backward"
WEIGHTS = len(ScanWeights._fields)


def call_part(backend: str, arguments: BidirectionalScan, part: Part, *, save: bool, overwrite: bool) -> Tensor:
    """The output of the scan of a part; `save` and `overwrite` as in `call`."""
    tensors = (part.halo, arguments.xz, *arguments.forward, *arguments.backward)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        options = (backend, part.entering, save, arguments.gated, arguments.keep_inputs)
        return _PartScan.apply(*options, *tensors)  # pyright: ignore[reportReturnType]
    return function(backend, ROOM, FORWARD)(arguments, False, overwrite, part)[0]


class _PartScan(torch.autograd.Function):
    """The backward pass asks for adjoint states as the forward pass does for states."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> Tensor:
        ctx.options, tensors = values[:5], values[5:]
        backend, _, save, *_ = ctx.options
        with named(FORWARD):
            out, saved = function(backend, ROOM, FORWARD)(*_with(save, *values))
        ctx.save_for_backward(*tensors, *saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        backend, _, save, *_ = ctx.options
        count = 2 + 2 * WEIGHTS
        values, saved = (*ctx.options, *ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
        arguments, _, _, part = _with(True, *values)
        with named(BACKWARD):
            if not save:
                saved = function(backend, ROOM, FORWARD)(arguments, True, False, part)[1]
            gradients, dhalo = function(backend, ROOM, BACKWARD)(arguments, dout.contiguous(), saved, part)
        return *[None] * 5, dhalo, gradients.xz, *gradients.forward, *gradients.backward


def _with(
    save: bool, backend: str, entering: Any, _: bool, gated: bool, keep_inputs: bool, halo: Tensor, xz: Tensor,
    *weights: Tensor | None,
) -> tuple[BidirectionalScan, bool, bool, Part]:  # fmt: skip
    """Arguments of a backend's forward, from what autograd sees."""
    del backend
    forward, backward = ScanWeights._make(weights[:WEIGHTS]), ScanWeights._make(weights[WEIGHTS:])  # pyright: ignore[reportArgumentType]
    return BidirectionalScan(xz, forward, backward, None, None, gated, keep_inputs), save, False, Part(halo, entering)
