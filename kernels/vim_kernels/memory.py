"""Memory of the ops: how much a forward pass may take without gradients, and what it keeps with them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from vim_kernels.dispatch.choice import MODULES, function
from vim_kernels.dispatch.contract import (
    BidirectionalScan,
    Lines,
    NormWeights,
    PooledScan,
    Recompute,
    ScanWeights,
    SelectiveScan,
)

_is_tight: ContextVar[bool] = ContextVar("vim_kernels_less_memory", default=False)


@contextmanager
def less_memory() -> Iterator[None]:
    """Inside the `with` block, in this thread or task, GPUs take a batch in twice as many slices without gradients.

    Slices that leave a GPU nearly full are taken in any case. Vim-Ti at 1248 pixels, 64 pictures at a time on an H200:
    computed 24 in place of 34 MB a picture, at 7 % of the scan's speed.
    """
    token = _is_tight.set(True)
    try:
        yield
    finally:
        _is_tight.reset(token)


def is_tight() -> bool:
    """Whether memory counts more than time."""
    return _is_tight.get()


def saved_bytes(
    backend: str,
    *,
    d_inner: int,
    d_state: int,
    dt_rank: int,
    dtype: torch.dtype,
    tokens_a_line: float | None = None,
    norm: bool = False,
    gated: bool = True,
    recompute: Recompute = "inputs",
) -> float:
    """Bytes a token that a `bidirectional_scan` of long sequences keeps for its backward pass, gated or not.

    With `tokens_a_line`, that a `pooled_scan` keeps, with or without `norm`. Its input xz is not counted. The fast
    backend itself says so, on the meta device. Raises RuntimeError where it cannot be imported.
    """
    if recompute == "states":
        return 0.0
    op = ("mixer", "bidirectional_scan_saved") if tokens_a_line is None else ("pooled", "pooled_scan_saved")
    saved_of = _function(backend, *op)
    tokens = 1 << 16
    with torch.device("meta"):
        xz = torch.empty(1, tokens, (1 + gated) * d_inner, dtype=dtype)
        channels, states = torch.empty(d_inner), torch.empty(d_inner, d_state)
        x_proj, dt_proj = torch.empty(dt_rank + 2 * d_state, d_inner), torch.empty(d_inner, dt_rank)
        weights = ScanWeights(torch.empty(d_inner, 4), channels, x_proj, dt_proj, channels, states, channels)
        arguments = BidirectionalScan(xz, weights, weights, None, None, gated, keep_inputs=recompute == "none")
        if tokens_a_line is not None:
            lines = max(1, round(tokens / tokens_a_line))
            places = Lines(torch.empty(lines + 1), torch.empty(tokens), torch.empty(lines))
            norm_weights = NormWeights(channels, channels) if norm else None
            arguments = PooledScan(xz, weights, weights, places, norm_weights, 0.0)
        saved = saved_of(arguments)
        return sum(tensor.nbytes for tensor in saved) / tokens


def saved_bytes_one_way(backend: str, *, d_inner: int, d_state: int, dtype: torch.dtype) -> float:
    """As `saved_bytes`, that a `selective_scan` keeps beside its arguments."""
    saved_of = _function(backend, "scan", "selective_scan_saved")
    tokens = 1 << 16
    with torch.device("meta"):
        x, bc = torch.empty(1, tokens, d_inner, dtype=dtype), torch.empty(1, tokens, d_state, dtype=dtype)
        channels, A = torch.empty(d_inner), torch.empty(d_inner, d_state)
        saved = saved_of(SelectiveScan(x, x, A, bc, bc, channels, None, channels, None, None, True, False))
        return sum(tensor.nbytes for tensor in saved) / tokens


def _function(backend: str, room: str, name: str) -> Callable[..., Any]:
    if backend in MODULES:
        raise RuntimeError(f"what backend {backend!r} keeps is autograd's and not counted: choose another")
    try:
        return function(backend, room, name)
    except ImportError as error:
        raise RuntimeError(f"backend {backend!r} cannot be imported: {error}") from error
