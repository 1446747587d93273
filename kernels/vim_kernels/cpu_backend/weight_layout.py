"""A mixer's weights in the layouts of the kernels: made anew at every call, by one kernel (30 us for Vim-Ti in all).

They are not kept between calls: a write through `.data` changes no version counter, and a stale weight would be silent.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vim_kernels.cpu_backend.records import WEIGHTS
from vim_kernels.cpu_backend.tensors import address, float_rows, padded, records, whole
from vim_kernels.cpu_backend.weight_layout_kernel import lay_out_weights
from vim_kernels.dispatch.contract import ScanWeights


class DirectionWeights(NamedTuple):
    """`ScanWeights` in the kernels' layouts, float32 but for x_proj, channels filled up to whole vectors."""

    conv_weight: Tensor
    """(taps, channels)"""
    conv_bias: Tensor
    """(1, channels), as dt_bias and skip."""
    dt_proj: Tensor
    """(rank, channels)"""
    dt_bias: Tensor
    skip: Tensor
    decay: Tensor
    """(n, channels), in truth (channels / 16, n, 16): A log2(e)."""
    x_proj: Tensor
    """(columns, channels) in the dtype of the tokens; rows filled up with zeros to whole vectors."""
    taps: int
    rank: int
    states: int


def direction_weights(forward: ScanWeights, backward: ScanWeights, x: Tensor) -> list[DirectionWeights]:
    """Lay out the weights of both directions for tokens x, already filled up."""
    channels, is_float = x.shape[-1], x.dtype == torch.float32
    laid_out, rows, contiguous = [], [], []
    for weights in (forward, backward):
        source = ScanWeights(*(t if t is None else float_rows(t) for t in weights))  # pyright: ignore[reportArgumentType]
        contiguous.append(source)
        taps, rank, states = source.conv_weight.shape[1], source.dt_proj.shape[1], source.A_log.shape[1]
        columns = whole(len(source.x_proj))
        vectors = [taps, 1, rank, 1, 1, states, columns if is_float else 0]
        parts = x.new_empty(sum(vectors), channels, dtype=torch.float32).split(vectors)
        projection = parts[-1] if is_float else _x_proj(weights.x_proj, x.dtype)
        laid_out.append(DirectionWeights._make((*parts[:-1], projection, taps, rank, states)))
        rows.append(
            {
                "size": len(source.D), "channels": channels, "taps": taps, "rank": rank, "states": states,
                "columns": vectors[-1], "x_proj_rows": len(source.x_proj), "conv_weight": address(source.conv_weight),
                "conv_bias": address(source.conv_bias), "dt_proj": address(source.dt_proj),
                "dt_bias": address(source.dt_bias), "skip": address(source.D), "A_log": address(source.A_log),
                "x_proj": address(source.x_proj), "target": address(parts[0]),
            }
        )  # fmt: skip
    lay_out_weights(records(WEIGHTS, *rows))
    return laid_out


def _x_proj(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return padded(padded(weight.detach().to(dtype), dim=-2)).contiguous()
