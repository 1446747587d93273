"""What blocks leave for their backward pass, by how much of it is made again: the levels, and bytes for a planner."""

from typing import Any, Literal, get_args

import torch

from vim_backbone.config import VimConfig
from vim_kernels import saved_bytes, saved_bytes_one_way

Recompute = Literal["none", "inputs", "states", "products"]
"""What the backward pass of a block makes again; each level what those before it do, too.

none: nothing. inputs: the scan's inputs, by convolutions and projections; only GPUs can keep them. states: states and
sum of the scan, by one more forward scan, one layer at a time. products: x, z and the scan's output too, by in_proj; of
a block only the residual stream and its norm are kept. Gradients are the same at all levels.
"""
LEVELS: tuple[Recompute, ...] = get_args(Recompute)
"""From the fastest to the one that keeps the least."""

FLOAT = 4
"""Bytes of a float32."""
BACKWARD_FLOATS = 8
"""Numbers a token and inner channel that the backward pass of a block needs on CPU beside what was saved: convolutions
that run again and the gradients of both directions. 7.7 were measured."""
CHANNELS_A_PART = 32
"""Of each so many channels the Triton backend keeps a gradient of B and C, until they are summed."""


def block_saved_bytes(
    config: VimConfig,
    backend: str,
    dtype: torch.dtype,
    tokens: int,
    recompute: Recompute = "inputs",
    apart: bool = False,
) -> float:
    """Bytes a token: residual stream, input of in_proj; its output, what the scan saves, input of out_proj.

    Args:
        backend: fast backend of `vim_kernels` that runs the scan.
        dtype: of the products. The residual stream is float32.
        tokens: of one picture; a pooled scan keeps less where more of them share a line.
        apart: each token is there twice, once in each direction: see `Mixer.forward`.
    """
    d, e, size, between = config.d_model, config.d_inner, dtype.itemsize, 0.0
    options: dict[str, Any] = {"dt_rank": config.dt_rank, "dtype": dtype, "recompute": recompute}
    if recompute == "products":
        return (1 + apart) * (FLOAT + size) * d
    if apart:
        return 2 * (FLOAT * d + size * d + size * 2 * e + _one_way_saved_bytes(config, backend, dtype, recompute))
    if config.scan == "pooled":
        options |= {"tokens_a_line": _tokens_a_line(config, tokens), "norm": config.mixer_norm}
    elif config.mixer_norm:
        # x by itself, the gate, and the norm's input and output, which autocast takes in float32 on GPUs
        between = 2 * size * e + 2 * (FLOAT if backend == "triton" else size) * e
        options |= {"gated": False}
    scan = saved_bytes(backend, d_inner=e, d_state=config.d_state, **options)
    return FLOAT * d + size * d + size * 2 * e + scan + between + size * e


def block_backward_bytes(config: VimConfig, backend: str, dtype: torch.dtype, tokens: int) -> float:
    """Bytes a token that the backward pass of a block needs beside what was saved.

    Of the Triton backend they are counted behind the scan's backward kernel, where it holds the most. A token, or of a
    pooled scan a line, of both directions: the inputs u and dt, their gradients and the parts of those of B and C. A
    token: the gradients of x and z, of the scan's output (of a pooled scan before the gate, too) and of the stream. The
    input of out_proj, which was saved, has been given back.
    """
    if backend != "triton":
        return BACKWARD_FLOATS * FLOAT * config.d_inner
    e, n, size = config.d_inner, config.d_state, dtype.itemsize
    scan = 2 * (4 * size * e + (FLOAT + -(-e // CHANNELS_A_PART) * size) * 2 * n + size * config.dt_rank)
    beside = 2 * size * e + size * e - size * e + FLOAT * config.d_model
    if config.scan == "pooled":
        return (scan + FLOAT * e) / _tokens_a_line(config, tokens) + size * e + beside
    return scan + beside


def _tokens_a_line(config: VimConfig, tokens: int) -> float:
    return tokens / (sum(config.grid(*config.img_size)) / 2)  # rows and columns in turn


def _one_way_saved_bytes(config: VimConfig, backend: str, dtype: torch.dtype, recompute: Recompute) -> float:
    """Of a block whose directions are apart, bytes a token of one: what the scan needs, and the input of out_proj."""
    e, n, size = config.d_inner, config.d_state, dtype.itemsize
    if recompute != "none":
        return size * e
    states = saved_bytes_one_way(backend, d_inner=e, d_state=n, dtype=dtype)
    norm = 2 * (FLOAT if backend == "triton" else size) * e if config.mixer_norm else size * e
    return size * (3 * e + config.dt_rank + 2 * n) + states + norm + size * e  # u, dt, the gate's sigmoid; B and C
