"""The core of a pooled Vim mixer: convolutions and sums of lines, projections and scans of lines, skip, norm and gate.

Saved for the backward, a line: both sums in the dtype of the tokens, projections and states as in `mixer`, and
y in float32; with a norm 8 bytes a token beside them. The convolutions are recomputed.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vim_kernels.cpu_backend.mixer import gradient_fields, like_weights, projection_gradients, scan_fields
from vim_kernels.cpu_backend.plan import Plan, plan_for, thread_count, tile_bound
from vim_kernels.cpu_backend.pooled_backward import (
    convolution_vectors,
    convolve_backward,
    finish_tokens_backward,
)
from vim_kernels.cpu_backend.pooled_forward import finish_tokens, finish_vectors, pool_lines
from vim_kernels.cpu_backend.records import POOLED, SCAN, SCAN_GRADIENT
from vim_kernels.cpu_backend.scan_backward import backward_vectors, scan_backward
from vim_kernels.cpu_backend.scan_forward import forward_vectors, scan_forward
from vim_kernels.cpu_backend.tensors import (
    address,
    fresh,
    kernel_dtype,
    padded,
    record,
    records,
    token_rows,
    vector_or_zeros,
    whole,
)
from vim_kernels.cpu_backend.vector import LANES
from vim_kernels.cpu_backend.weight_layout import DirectionWeights, direction_weights
from vim_kernels.dispatch.contract import Lines, NormWeights, PooledScan, ScanWeights


class _Places(NamedTuple):
    """`Lines` as the kernels take them, and who takes which."""

    starts: np.ndarray
    line_of: np.ndarray
    weights: np.ndarray
    order: np.ndarray
    borders: np.ndarray
    """(lines, 2) first position and end of the sequence of every line."""
    line_starts: np.ndarray
    """(workers + 1,) first line of every worker."""
    cu_seqlens: Tensor | None

    def scratch(self, vectors: int) -> np.ndarray:
        """As `Plan.scratch`."""
        return np.empty((len(self.line_starts) - 1, LANES * (vectors + 1)), np.float32)


def _places(lines: Lines, b: int, l: int) -> _Places:
    starts, workers = lines.starts.numpy(), thread_count()
    per_sequence = lines.total // max(b, 1)
    first_lines = np.arange(b + 1) * per_sequence if lines.cu_lines is None else lines.cu_lines.numpy()
    ends = starts[first_lines].astype(np.int64)
    borders = np.stack([ends[:-1], ends[1:]], axis=1).repeat(np.diff(first_lines), axis=0)
    shares = np.searchsorted(starts, b * l * np.arange(1, workers) // workers)
    order = np.arange(b * l, dtype=np.int32) if lines.order is None else lines.order.numpy()
    return _Places(
        starts, lines.line_of.numpy(), lines.weights.numpy(), order, borders,
        np.array([0, *np.minimum(shares, lines.total), lines.total], np.int64), lines.cu_seqlens(),
    )  # fmt: skip


def pooled_scan_saved(arguments: PooledScan) -> list[Tensor]:
    """Empty [sums of lines, projections and states of both directions, y, statistics of the norm]."""
    xz, forward, backward, lines, norm, _ = arguments
    b, l, _ = xz.shape
    channels = whole(forward.A_log.shape[0])
    saved = [xz.new_empty(2, lines.total, channels, dtype=kernel_dtype(xz))]
    for weights in (forward, backward):
        states = weights.A_log.shape[1]
        saved.append(xz.new_empty(lines.total, whole(weights.x_proj.shape[0]), dtype=torch.float32))
        saved.append(
            xz.new_empty(tile_bound(arguments.like_lines(), lines.cu_lines), channels * states, dtype=torch.float32)
        )
    saved.append(xz.new_empty(lines.total, channels, dtype=torch.float32))
    return saved if norm is None else [*saved, xz.new_empty(b * l, 2, dtype=torch.float32)]


def pooled_scan_forward(arguments: PooledScan, save: bool) -> tuple[Tensor, list[Tensor]]:
    """See `vim_kernels.dispatch.contract`."""
    xz = arguments.xz
    saved = pooled_scan_saved(arguments)
    call = _Call(arguments, saved)
    d, at = call.record, call.places
    pool_lines(d, at.starts, at.weights, at.order, at.borders, at.line_starts)
    for projection, pooled, weights in zip(saved[1:5:2], call.pooled, call.two, strict=True):
        projection.copy_(pooled @ weights.x_proj.t())
    first, last = call.scan_fields()
    partial = torch.empty_like(call.y)
    first |= {"out": partial.data_ptr(), "scale": 1.0}
    last |= {"partial": partial.data_ptr(), "out": call.y.data_ptr(), "scale": 0.5}
    plan = call.plan
    scratch = plan.scratch(forward_vectors(call.two[0].states, plan.widest))
    scan_forward(records(SCAN, first, last), plan.borders, plan.chunks, plan.tasks, plan.task_starts, scratch)
    out = torch.empty(*xz.shape[:2], call.channels, dtype=call.xz.dtype)
    d["out"] = address(out)
    finish_tokens(d, at.starts, at.order, at.borders, at.line_starts, at.scratch(finish_vectors(call.channels)))
    return out[..., : xz.shape[-1] // 2].to(xz.dtype).contiguous(), saved if save else []


def pooled_scan_backward(arguments: PooledScan, dout: Tensor, saved: list[Tensor]) -> PooledScan:
    """See `vim_kernels.dispatch.contract`."""
    xz, forward, backward, lines, norm, _ = arguments
    call = _Call(arguments, saved)
    d, at, size, channels = call.record, call.places, xz.shape[-1] // 2, call.channels
    dout_rows, dxz = token_rows(dout, call.xz.dtype).contiguous(), torch.empty_like(call.xz)
    dsum, dy = torch.empty(call.rows, channels), torch.empty(lines.total, channels)
    dnorm = torch.zeros(len(at.line_starts) - 1, 2, channels)
    for name, tensor in (("dout", dout_rows), ("dxz", dxz), ("dsum", dsum), ("dy", dy), ("dnorm", dnorm)):
        d[name] = address(tensor)
    finish_tokens_backward(d, at.starts, at.order, at.borders, at.line_starts, at.scratch(finish_vectors(channels)))
    dpooled, partials = _scan_backward(call, dy.to(call.xz.dtype), (forward, backward))
    like = call.xz.view(*xz.shape[:2], 2 * channels)[..., :channels]
    plan = plan_for(like, at.cu_seqlens)
    dweights = torch.empty(2, plan.sequences, call.two[0].taps + 2, channels)
    d["dpooled"], d["dweights"], d["sequences"] = address(dpooled), address(dweights), plan.sequences
    convolve_backward(
        d, at.line_of, at.weights, at.order, plan.borders, plan.tasks, plan.task_starts,
        plan.scratch(convolution_vectors(call.two[0].taps)),
    )  # fmt: skip
    total = dweights.sum(1)
    dforward, dbackward = (
        like_weights(parameters, partial._replace(conv_weight=sums[:-2].t(), conv_bias=sums[-2], D=sums[-1]))
        for parameters, partial, sums in zip((forward, backward), partials, total, strict=True)
    )
    halves = dxz.view(*xz.shape[:2], 2, channels)[..., :size].to(xz.dtype)
    norm = None if norm is None else NormWeights._make(map(fresh, dnorm.sum(0), norm))
    return arguments._replace(xz=halves.reshape(xz.shape).contiguous(), forward=dforward, backward=dbackward, norm=norm)


class _Call:
    """The inputs laid out for the kernels; it keeps alive what the record points to."""

    def __init__(self, arguments: PooledScan, saved: list[Tensor]) -> None:
        xz, forward, backward, lines, norm, eps = arguments
        b, l, width = xz.shape
        self.rows, self.lines = b * l, lines
        self.places = _places(lines, b, l)
        self.channels = whole(width // 2)
        dtype = kernel_dtype(xz)
        self.xz = padded(xz.detach().to(dtype).view(b * l, 2, width // 2)).contiguous().view(b * l, 2 * self.channels)
        self.two: list[DirectionWeights] = direction_weights(forward, backward, self.xz[:, : self.channels])
        self.norm = None if norm is None else [vector_or_zeros(vector, self.xz[:, : self.channels]) for vector in norm]
        self.pooled, self.projections, self.states, self.y = saved[0], saved[1:5:2], saved[2:5:2], saved[5]
        self.plan: Plan = plan_for(self.pooled[0].view(b, lines.total // max(b, 1), self.channels), lines.cu_lines)
        self._no_skip = torch.zeros(self.channels)
        f, r = self.two
        self.record = record(
            POOLED, size=width // 2, channels=self.channels, taps=f.taps, bf16=dtype == torch.bfloat16,
            xz=address(self.xz), weight=address(f.conv_weight), bias=address(f.conv_bias), skip=address(f.skip),
            weight_b=address(r.conv_weight), bias_b=address(r.conv_bias), skip_b=address(r.skip), y=address(self.y),
            norm_weight=address(self.norm[0]) if self.norm else 0, norm_bias=address(self.norm[1]) if self.norm else 0,
            stats=address(saved[6]) if norm is not None else 0, pooled=address(self.pooled), lines=lines.total, eps=eps,
        )  # fmt: skip

    def scan_fields(self) -> list[dict[str, Any]]:
        """SCAN records of both directions over the lines, all but outputs."""
        fields = scan_fields(self.pooled[0], None, self.two, list(self.pooled), self.projections)
        for one, states in zip(fields, self.states, strict=True):
            one |= {"skip": address(self._no_skip), "checkpoints": states.data_ptr()}
        return fields


def _scan_backward(
    call: _Call, dy: Tensor, parameters_of_both: tuple[ScanWeights, ScanWeights]
) -> tuple[Tensor, list[ScanWeights]]:
    """Gradients of the sums of lines (2, lines, channels) and of projections and scans; D's and the taps' are not."""
    plan = call.plan
    fields = call.scan_fields()
    for one in fields:
        one["scale"] = 1.0
    gradients, buffers = gradient_fields(dy[None], call.two, plan)
    scratch = plan.scratch(backward_vectors(call.two[0].states, plan.widest))
    scan_backward(
        records(SCAN, *fields), records(SCAN_GRADIENT, *gradients),
        plan.borders, plan.chunks, plan.tasks, plan.task_starts, scratch,
    )  # fmt: skip
    partials = [
        projection_gradients(weights, parameters, pooled, projection, du, ddt, dbc, dweights.sum(0))
        for weights, parameters, pooled, projection, (du, ddt, dbc, dweights) in zip(
            call.two, parameters_of_both, call.pooled, call.projections, buffers, strict=True
        )
    ]
    return torch.stack([du for du, *_ in buffers]), partials
