"""Initialisation of a Vim backbone, by the role of each parameter (recipes of Mamba and Vim)."""

import math

import torch
from torch import Tensor, nn

from vim_backbone.mixer import Mixer

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
"""Range of the time step at the start: log-uniform in [DT_MIN, DT_MAX], never below DT_FLOOR."""


@torch.no_grad()
def init_mixer(mixer: Mixer, depth: int) -> None:
    """Mamba's initialisation (arXiv 2312.00752, section 3.6), residual branches scaled by 1 / sqrt(depth)."""
    if mixer.A_log.is_meta:  # to be read: nothing to draw, and arithmetic there imports half of the compiler
        return
    nn.init.kaiming_uniform_(mixer.in_proj.weight, a=math.sqrt(5))
    nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
    mixer.out_proj.weight.div_(math.sqrt(depth))
    for A_log, D, dt_proj in ((mixer.A_log, mixer.D, mixer.dt_proj), (mixer.A_b_log, mixer.D_b, mixer.dt_proj_b)):
        n = A_log.shape[1]
        A_log.copy_(torch.arange(1, n + 1, device=A_log.device).log().expand_as(A_log))
        D.fill_(1.0)
        bound = dt_proj.in_features**-0.5
        nn.init.uniform_(dt_proj.weight, -bound, bound)
        dt_proj.bias.copy_(inverse_softplus(initial_dt(dt_proj.bias)))


def initial_dt(like: Tensor) -> Tensor:
    """Time steps drawn log-uniformly, in the shape of `like`."""
    low, high = math.log(DT_MIN), math.log(DT_MAX)
    return torch.exp(torch.rand_like(like) * (high - low) + low).clamp_(min=DT_FLOOR)


def inverse_softplus(y: Tensor) -> Tensor:
    """X with softplus(x) = y, stable for small y."""
    return y + torch.log(-torch.expm1(-y))


@torch.no_grad()
def lecun_normal_(weight: Tensor) -> None:
    """Truncated normal with variance 1 / fan_in."""
    fan_in = weight[0].numel()
    # a normal cut at two standard deviations has 0.8796 of its standard deviation left
    nn.init.trunc_normal_(weight, std=fan_in**-0.5 / 0.87962566103423978, a=-2.0, b=2.0)
