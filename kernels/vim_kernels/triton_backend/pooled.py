"""The pooled scan of the Triton backend: all of a pooled Vim mixer between in_proj and out_proj.

Four kernels take the tokens, see `pooled_forward` and `pooled_backward`; what is between them takes the lines,
as few as 14 to 128 of a picture, by the kernels of the full scan. Saved for the backward, a line and channel, with 16
states and 16-bit tokens: 4 bytes of sums, 4 of states and 4 of y; and 8 bytes a token where there is a norm.
"""

from typing import Any

import torch
from torch import Tensor

from vim_kernels.dispatch.contract import NormWeights, PooledScan
from vim_kernels.triton_backend import plan
from vim_kernels.triton_backend.launch import cdiv, launch
from vim_kernels.triton_backend.mixer import (
    MixerInputs,
    MixerWeights,
    mixer_weights,
    padded,
    parameter_gradients,
    project,
    projections_backward,
    zeros,
)
from vim_kernels.triton_backend.plan import SUMMING_PROGRAMS, PooledSizes, tokens_of
from vim_kernels.triton_backend.pooled_backward import (
    pooled_convolution_backward_kernel,
    pooled_output_backward_kernel,
)
from vim_kernels.triton_backend.pooled_forward import pooled_lines_kernel, pooled_output_kernel
from vim_kernels.triton_backend.recurrence import Gate, scan_backward, scan_forward


class _Places:
    """Where tokens and lines lie, as the kernels take it."""

    def __init__(self, arguments: PooledScan) -> None:
        xz, lines = arguments.xz, arguments.lines
        self.rows, self.length, self.channels = xz.shape[0] * xz.shape[1], xz.shape[1], xz.shape[2] // 2
        self.lines, self._like = lines, xz
        self.hardware = plan.target(xz.device) == "cuda"
        self.as_tokens = tokens_of(arguments.like_lines(), lines.cu_lines)
        self.order = xz if lines.order is None else lines.order
        self.sequence = self.as_tokens.segment(xz)

    def arguments(self) -> tuple[Any, ...]:
        """From order_ptr to channels."""
        cu_lines = self._like if self.lines.cu_lines is None else self.lines.cu_lines
        tokens = self.as_tokens
        return self.order, self.sequence, cu_lines, tokens.rows, tokens.length, self.length, self.channels

    def runs(self, steps: int) -> tuple[Any, ...]:
        """From sequence_ptr to length, for runs of `steps` positions; of packed sequences an upper bound of them."""
        cu_seqlens, like = self.lines.cu_seqlens(), self._like
        if cu_seqlens is None:
            per_sequence = cdiv(self.length, steps)
            return like, like, like, self.rows // self.length * per_sequence, per_sequence, self.length
        sequences = cu_seqlens.shape[0] - 1
        runs = self.rows // steps + sequences
        cu_runs = torch.zeros_like(cu_seqlens)
        torch.cumsum((cu_seqlens.diff() + (steps - 1)) // steps, 0, dtype=torch.int32, out=cu_runs[1:])
        numbers = torch.arange(runs, dtype=torch.int32, device=like.device)
        behind = torch.searchsorted(cu_runs, numbers, right=True, out_int32=True).clamp_(max=sequences)
        return behind, cu_seqlens, cu_runs, runs, 1, self.length

    def flags(self, sizes: PooledSizes, width: int) -> dict[str, Any]:
        """Compile-time constants of the kernels that take lines."""
        return self.shared_flags(width) | {
            "LINES": sizes.lines, "STEPS": sizes.steps, "BLOCK": sizes.block, "num_warps": sizes.warps,
        }  # fmt: skip

    def shared_flags(self, width: int) -> dict[str, Any]:
        """Compile-time constants of all kernels."""
        ordered, packed = self.lines.order is not None, self.lines.cu_lines is not None
        return {"ORDERED": ordered, "PACKED": packed, "WIDTH": width, "HARDWARE": self.hardware}


def pooled_scan_saved(arguments: PooledScan) -> list[Tensor]:
    """[sums of lines (2, lines, d), states (2, slots, n, d), y (lines, d) float32, statistics of the norm]."""
    xz, lines = arguments.xz, arguments.lines
    d, n = arguments.forward.A_log.shape
    slots = tokens_of(arguments.like_lines(), lines.cu_lines).slots()
    saved = [
        xz.new_empty(2, lines.total, d),
        xz.new_empty(2, slots, padded(n), d, dtype=plan.states_dtype(xz)),
        xz.new_empty(lines.total, d, dtype=torch.float32),
    ]
    if arguments.norm is not None:
        saved.append(xz.new_empty(xz.shape[0] * xz.shape[1], 2, dtype=torch.float32))
    return saved


def pooled_scan_forward(arguments: PooledScan, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Output (b, l, d) in the dtype of xz, and what was saved."""
    xz, forward, backward, lines, norm, eps = arguments
    (out,) = arguments.outputs()
    pooled, states, y, *stats = saved = pooled_scan_saved(arguments)
    if xz.numel() == 0:
        return out, saved if save else []
    places, laid_out = _Places(arguments), mixer_weights(xz, forward, backward)
    target, width = plan.target(xz.device), laid_out.taps.shape[1] - 1
    sizes, d = plan.POOLED_LINES[target], places.channels
    launch(pooled_lines_kernel, (cdiv(d, sizes.block), cdiv(lines.total, sizes.lines)),
        xz, 2 * d, laid_out.taps, pooled, lines.starts, lines.weights, *places.arguments(), lines.total * d,
        **places.flags(sizes, width),
    )  # fmt: skip
    inputs = MixerInputs.of(pooled, *laid_out.padded, low=False)
    project(inputs, laid_out)
    scan_forward(
        inputs.scan(laid_out)._replace(skips=None),
        None,
        y,
        places.as_tokens,
        scale=0.5,
        states=states if save else None,
        ungated=None,
        initial=None,
        want_final=False,
    )
    sizes = (plan.POOLED_OUTPUT if norm is None else plan.POOLED_NORM)[target]
    launch(pooled_output_kernel, (cdiv(d, sizes.block) if norm is None else 1, cdiv(lines.total, sizes.lines)),
        xz, 2 * d, laid_out.taps, *laid_out.skips, y, *(norm or (xz, xz)), out, stats[0] if stats else y,
        lines.starts, *places.arguments(), eps, NORM=norm is not None, **places.flags(sizes, width),
    )  # fmt: skip
    return out, saved if save else []


def pooled_scan_backward(arguments: PooledScan, dout: Tensor, saved: list[Tensor]) -> PooledScan:
    """See `vim_kernels.dispatch.contract`."""
    xz, forward, backward, _, norm, _ = arguments
    dxz = torch.empty_like(xz)
    if xz.numel() == 0:
        dnorm = None if norm is None else NormWeights(*map(torch.zeros_like, norm))
        return arguments._replace(xz=dxz, forward=zeros(forward), backward=zeros(backward), norm=dnorm)
    places, laid_out = _Places(arguments), mixer_weights(xz, forward, backward)
    dsum, dy, dnorm = _output_backward(dout, xz, laid_out, places, norm, dxz, saved)
    pooled, states = saved[:2]
    inputs = MixerInputs.of(pooled, *laid_out.padded, low=True)
    project(inputs, laid_out)
    grads = scan_backward(
        inputs.scan(laid_out)._replace(skips=None), dy, places.as_tokens,
        gate=Gate(1.0), states=states, dfinal=None, softplus=True, want_initial=False,
    )  # fmt: skip
    dprojections = projections_backward(grads, inputs, laid_out)
    dtaps = _convolution_backward(xz, laid_out, places, dsum, grads.u, dxz)
    dforward, dbackward = parameter_gradients(forward, backward, dprojections, grads, dtaps, laid_out)
    return arguments._replace(xz=dxz, forward=dforward, backward=dbackward, norm=dnorm)


def _output_backward(
    dout: Tensor,
    xz: Tensor,
    laid_out: MixerWeights,
    places: _Places,
    norm: NormWeights | None,
    dxz: Tensor,
    saved: list[Tensor],
) -> tuple[Tensor, Tensor, NormWeights | None]:
    """Fills the second half of dxz; gradients of the sum of the directions (rows, d), of y (lines, d), of the norm."""
    lines, d, width = places.lines, places.channels, laid_out.taps.shape[1] - 1
    sizes = plan.POOLED_OUTPUT_BACKWARD if norm is None else plan.POOLED_NORM
    sizes = sizes[plan.target(xz.device)]
    dsum = torch.empty_like(dout)
    dy = (xz.new_empty if norm is None else xz.new_zeros)(lines.total, d, dtype=torch.float32)
    programs, partial = cdiv(lines.total, sizes.lines), dy
    if norm is not None:
        programs = min(programs, plan.POOLED_PROGRAMS)
        partial = xz.new_zeros(programs * sizes.lines, 2, d, dtype=torch.float32)
    launch(pooled_output_backward_kernel, (cdiv(d, sizes.block) if norm is None else 1, programs),
        dout, xz, 2 * d, laid_out.taps, *laid_out.skips, saved[2], *(norm or (xz, xz)), saved[3] if norm else dy,
        dxz, dsum, dy, partial, lines.starts, *places.arguments(),
        NORM=norm is not None, **places.flags(sizes, width),
    )  # fmt: skip
    if norm is None:
        return dsum, dy, None
    dweight, dbias = partial.sum(0)
    return dsum, dy, NormWeights(dweight.to(norm.weight.dtype, copy=True), dbias.to(norm.bias.dtype, copy=True))


def _convolution_backward(
    xz: Tensor, laid_out: MixerWeights, places: _Places, dsum: Tensor, dpooled: Tensor, dxz: Tensor
) -> Tensor:
    """Fills the first half of dxz; gradients (2, programs, w + 2, d) of taps, bias and D in partial sums."""
    lines, d, width = places.lines, places.channels, laid_out.taps.shape[1] - 1
    sizes = plan.POOLED_CONVOLUTION_BACKWARD[plan.target(xz.device)]
    steps = plan.run_length(sizes, width)
    runs = places.runs(steps)
    programs = min(SUMMING_PROGRAMS, cdiv(runs[3], sizes.groups))
    partial = xz.new_empty(2, programs, width + 2, d, dtype=torch.float32)
    launch(pooled_convolution_backward_kernel, (cdiv(d, sizes.block), programs),
        xz, 2 * d, laid_out.taps, *laid_out.skips, dsum, dpooled, dxz, 2 * d, partial,
        lines.line_of, lines.weights, places.order, *runs, d, lines.total * d,
        GROUPS=sizes.groups, STEPS=steps, BLOCK=sizes.block, **places.shared_flags(width), num_warps=sizes.warps,
    )  # fmt: skip
    return partial
