"""The bidirectional Mamba mixer of a Vim block: projections around the scan op of `vim_kernels`."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vim_backbone.config import VimConfig
from vim_backbone.hand_over import Handed, hooked, take
from vim_backbone.memory import Recompute
from vim_backbone.stretch import AGAIN, OneWay, Stretch, scan_stretch
from vim_kernels import (
    Lines,
    NormWeights,
    ScanWeights,
    bidirectional_scan,
    causal_conv1d,
    pooled_scan,
    selective_scan,
)


class ScanMetadata(NamedTuple):
    """What blocks have to know about their tokens (batch, length, d_model), beside the values."""

    cu_seqlens: Tensor | None = None
    """(pictures + 1,) int32 borders of pictures packed into one row (1, total, d_model)."""
    lines: Lines | None = None
    """Of a pooled scan; they know the borders of packed pictures."""
    apart: bool = False
    """Each direction has a half of the batch for itself: the first half is scanned forward alone, the second backward
    alone, so that a token of it sees only itself and those before, or after, it."""
    gaps: Tensor | None = None
    """(2, batch, length) factors of dt, as in `bidirectional_scan`; for full scans of both directions together."""
    stretch: Stretch | None = None
    """The tokens are those that this process holds of sequences over several."""

    @property
    def plain(self) -> bool:
        """Whether there is nothing to know: a batch of whole sequences."""
        return all(each is None or each is False for each in self)


PLAIN = ScanMetadata()


class Mixer(nn.Module):
    """Vim mixer (arXiv 2401.09417, algorithm 1), parameters named as in the official checkpoints.

    Both directions share in_proj and out_proj; each owns its convolution, x_proj, dt_proj, A and D (`_b`: backward).
    """

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        d_model, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * d, bias=False)
        self.conv1d = nn.Conv1d(d, d, config.d_conv, groups=d)
        self.x_proj = nn.Linear(d, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, d)
        self.A_log = nn.Parameter(self.in_proj.weight.new_empty(d, n))
        self.D = nn.Parameter(self.in_proj.weight.new_empty(d))
        self.conv1d_b = nn.Conv1d(d, d, config.d_conv, groups=d)
        self.x_proj_b = nn.Linear(d, r + 2 * n, bias=False)
        self.dt_proj_b = nn.Linear(r, d)
        self.A_b_log = nn.Parameter(self.in_proj.weight.new_empty(d, n))
        self.D_b = nn.Parameter(self.in_proj.weight.new_empty(d))
        self.out_proj = nn.Linear(d, d_model, bias=False)
        self.scan_norm = nn.LayerNorm(d) if config.mixer_norm else None
        self.recompute: Recompute = "inputs"
        self.slice_tokens: int | None = None

    def forward(self, h: Handed[Tensor], metadata: ScanMetadata = PLAIN) -> Tensor:
        """(batch, length, d_model) -> the same."""
        cu_seqlens, lines, apart, gaps, stretch = metadata
        assert gaps is None or not (apart or lines or stretch)
        h = take(h)
        if self.slice_tokens and h.shape[1] > self.slice_tokens and metadata.plain and not torch.is_grad_enabled():
            return self._in_slices(h, self.slice_tokens)
        xz = self.in_proj(h)
        del h
        # where all is made again the backward pass follows at once, and convolutions need not run a second time for it
        recompute = "none" if self.recompute == "products" else self.recompute
        forward, backward = self._both_weights()
        if apart:
            y = self._apart(xz, forward, backward, cu_seqlens)
        elif lines is not None:
            norm, eps = None, 0.0
            if self.scan_norm is not None:
                norm, eps = NormWeights(self.scan_norm.weight, self.scan_norm.bias), self.scan_norm.eps
            y = pooled_scan(xz, forward, backward, lines, norm=norm, eps=eps, recompute=recompute)
        else:
            whole = functools.partial(bidirectional_scan, cu_seqlens=cu_seqlens, gaps=gaps)
            scan = whole if stretch is None else functools.partial(scan_stretch, stretch=stretch)
            if self.scan_norm is None:
                keeps_xz = torch.is_grad_enabled() or hooked(self.in_proj)
                y = scan(xz, forward, backward, overwrite=not keeps_xz, recompute=recompute)
            else:
                x, z = xz.chunk(2, dim=-1)
                y = self.scan_norm(scan(x, forward, backward, gated=False, recompute=recompute)) * F.silu(z)
        return self.out_proj(y)

    def _apart(self, xz: Tensor, forward: ScanWeights, backward: ScanWeights, cu_seqlens: Tensor | None) -> Tensor:
        """Halves of xz (2 batch, length, 2 d_inner), a direction each -> (2 batch, length, d_inner)."""
        halves = []
        for half, weights, reverse in zip(xz.chunk(2), (forward, backward), (False, True), strict=True):
            if self.recompute in ("inputs", "states") and torch.is_grad_enabled():
                halves.append(checkpoint(self._one_way, half, weights, reverse, cu_seqlens, **AGAIN))
            else:
                halves.append(self._one_way(half, weights, reverse, cu_seqlens))
        return torch.cat(halves)

    def _in_slices(self, h: Tensor, tokens: int) -> Tensor:
        """As `forward`, a slice of the tokens at a time: forward through all, then backward; the state is handed on.

        Of the whole sequence there are h, its result, and one direction's; in_proj is taken twice.
        """
        length, near = h.shape[1], self.conv1d.kernel_size[0] - 1
        ahead: Tensor | None = None  # in the precision of the products, which autocast may choose
        result: Tensor | None = None
        starts = range(0, length, tokens)
        for reverse, weights in zip((False, True), self._both_weights(), strict=True):
            state = None
            for start in reversed(starts) if reverse else starts:
                stop = min(start + tokens, length)
                first, last = (start, min(length, stop + near)) if reverse else (max(0, start - near), stop)
                x, z = self.in_proj(h[:, first:last]).chunk(2, dim=-1)
                u = causal_conv1d(x, weights.conv_weight, weights.conv_bias, reverse=reverse)
                here = slice(start - first, stop - first)
                y, state = OneWay(u[:, here], None, weights, reverse).scan(state)
                if ahead is None:
                    ahead = torch.empty(*h.shape[:2], y.shape[2], dtype=y.dtype, device=y.device)
                if reverse:
                    y = torch.lerp(ahead[:, start:stop], y, 0.5)
                    y = (y if self.scan_norm is None else self.scan_norm(y)) * F.silu(z[:, here])
                    projected = self.out_proj(y)
                    result = torch.empty_like(h, dtype=projected.dtype) if result is None else result
                    result[:, start:stop] = projected
                else:
                    ahead[:, start:stop] = y
        assert result is not None
        return result

    def _both_weights(self) -> tuple[ScanWeights, ScanWeights]:
        return (
            _weights(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D),
            _weights(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b),
        )

    def _one_way(self, xz: Tensor, weights: ScanWeights, reverse: bool, cu_seqlens: Tensor | None) -> Tensor:
        """One direction, gated: (batch, length, 2 d_inner) -> (batch, length, d_inner)."""
        x, z = xz.chunk(2, dim=-1)
        rank, n = weights.dt_proj.shape[1], weights.A_log.shape[1]
        u = causal_conv1d(x, weights.conv_weight, weights.conv_bias, reverse=reverse, cu_seqlens=cu_seqlens)
        low_rank, B, C = F.linear(u, weights.x_proj).split([rank, n, n], dim=-1)
        dt, A = F.linear(low_rank, weights.dt_proj), -weights.A_log.exp()
        y = selective_scan(
            u, dt, A, B, C, weights.D, None, weights.dt_bias, dt_softplus=True, reverse=reverse, cu_seqlens=cu_seqlens
        )
        return (y if self.scan_norm is None else self.scan_norm(y)) * F.silu(z)


def _weights(conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> ScanWeights:
    return ScanWeights(conv.weight.squeeze(1), conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D)
