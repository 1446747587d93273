"""The bidirectional Mamba mixer of a Vim block: projections around the scan op of `vim_kernels`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_backbone.config import VimConfig
from vim_backbone.hand_over import Given, hooked, take
from vim_backbone.memory import Recompute
from vim_kernels import Lines, NormWeights, ScanWeights, bidirectional_scan, pooled_scan


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

    def forward(self, h: Given[Tensor], cu_seqlens: Tensor | None = None, lines: Lines | None = None) -> Tensor:
        """(batch, length, d_model) -> the same; or (1, total, d_model), pictures packed with borders `cu_seqlens`.

        With `lines` it is the pooled scan, whose lines know the borders.
        """
        xz = self.in_proj(take(h))
        # where all is made again the backward pass follows at once, and convolutions need not run a second time for it
        recompute = "none" if self.recompute == "products" else self.recompute
        forward = _weights(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        backward = _weights(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        if lines is not None:
            norm, eps = (None, 0.0) if self.scan_norm is None else (_norm_weights(self.scan_norm), self.scan_norm.eps)
            y = pooled_scan(xz, forward, backward, lines, norm=norm, eps=eps, recompute=recompute)
        elif self.scan_norm is None:
            keeps_xz = torch.is_grad_enabled() or hooked(self.in_proj)
            y = bidirectional_scan(
                xz, forward, backward, cu_seqlens=cu_seqlens, overwrite=not keeps_xz, recompute=recompute
            )
        else:
            x, z = xz.chunk(2, dim=-1)
            y = bidirectional_scan(x, forward, backward, gated=False, cu_seqlens=cu_seqlens, recompute=recompute)
            y = self.scan_norm(y) * F.silu(z)
        return self.out_proj(y)


def _norm_weights(norm: nn.LayerNorm) -> NormWeights:
    return NormWeights(norm.weight, norm.bias)


def _weights(conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> ScanWeights:
    return ScanWeights(conv.weight.squeeze(1), conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D)
