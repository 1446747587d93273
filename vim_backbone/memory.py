"""Bytes that blocks leave for their backward pass, and that the backward pass needs: what a planner counts with."""

import torch

from vim_backbone.config import VimConfig
from vim_kernels import saved_bytes

FLOAT = 4
"""Bytes of a float32."""
BACKWARD_FLOATS = 8
"""Numbers a token and inner channel that the backward pass of a block needs beside what was saved, on any backend: the
recomputed convolutions and the gradients of both directions. Measured: 7.7 on CPU, 8.0 on an H200."""


def block_saved_bytes(config: VimConfig, backend: str, dtype: torch.dtype, tokens: int) -> float:
    """Bytes a token: residual stream, input of in_proj, its output, what the scan saves, input of out_proj.

    Args:
        backend: fast backend of `vim_kernels` that runs the scan.
        dtype: of the products. The residual stream is float32.
        tokens: of one picture; a pooled scan keeps less where more of them share a line.
    """
    d, e, size, pooled = config.d_model, config.d_inner, dtype.itemsize, {}
    if config.scan == "pooled":
        lines = sum(config.grid(*config.img_size)) / 2  # rows and columns in turn
        pooled = {"tokens_a_line": tokens / lines, "norm": config.mixer_norm}
    scan = saved_bytes(backend, d_inner=e, d_state=config.d_state, dt_rank=config.dt_rank, dtype=dtype, **pooled)
    return FLOAT * d + size * d + size * 2 * e + scan + size * e


def block_input_bytes(config: VimConfig, dtype: torch.dtype) -> float:
    """Bytes a token that a block leaves which is computed again in the backward pass."""
    return (FLOAT + dtype.itemsize) * config.d_model


def block_backward_bytes(config: VimConfig) -> float:
    """Bytes a token that the backward pass of a block needs beside what was saved."""
    return BACKWARD_FLOATS * FLOAT * config.d_inner
