"""The scan by the names and shapes of `mamba_ssm.ops.selective_scan_interface`, for other Mamba-1 models.

Tokens come last here, as there: (batch, channels, length). Letters of axes as in `vim_kernels.dispatch.contract`; g
groups of channels that share B and C. Each call takes the backend that `vim_kernels` chooses for the device.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels.ops import causal_conv1d, selective_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba-1 (arXiv 2312.00752, equation 2), from the first token to the last.

    Args:
        u, delta, z: (b, d, l). A: (d, n), real. B, C: (b, n, l) or (b, g, n, l). D, delta_bias: (d,).
        delta_softplus: delta becomes softplus(delta + delta_bias).
        return_last_state: also return the state after the last token, (b, d, n) float32; it has a gradient, too.
        cu_seqlens: int32 (sequences + 1,) borders of sequences packed into one row; the state restarts at each.

    Returns:
        out (b, d, l) in the dtype of u, or (out, last state).

    Raises:
        ValueError: A is complex, B or C do not depend on the input, or a shape does not fit.
    """
    if A.is_complex():
        raise ValueError(f"A has dtype {A.dtype}: only real A is supported")
    B, C = _groups("B", B), _groups("C", C)
    groups, channels = max(B.shape[1], C.shape[1]), u.shape[1]
    if channels % groups or B.shape[1] not in (1, groups) or C.shape[1] not in (1, groups):
        raise ValueError(f"B has {B.shape[1]} groups and C {C.shape[1]}, wanted one number that divides {channels}")
    parts = []
    for group in range(groups):
        part = slice(group * channels // groups, (group + 1) * channels // groups)
        b, c = (t[:, group % t.shape[1]].mT.contiguous() for t in (B, C))
        x, step = _channels_last(u[:, part]), _channels_last(delta[:, part])
        gate = None if z is None else _channels_last(z[:, part])
        skip, bias = (None if t is None else t[part] for t in (D, delta_bias))
        options: dict[str, Any] = {"dt_softplus": delta_softplus, "cu_seqlens": cu_seqlens}
        parts.append(selective_scan(x, step, A[part], b, c, skip, gate, bias, **options, return_final_state=True))
    out = torch.cat([y for y, _ in parts], dim=2).mT if groups > 1 else parts[0][0].mT
    if not return_last_state:
        return out
    state = torch.cat([state for _, state in parts], dim=1)
    return out, state if cu_seqlens is None else state[-1:]


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """A Mamba mixer after in_proj: convolution, SiLU, projections, scan, gate, out_proj.

    Args:
        xz: (b, 2 d, l), x in the first half and z in the second.
        conv1d_weight: (d, 1, w). conv1d_bias: (d,). x_proj_weight: (r + 2 n, d). delta_proj_weight: (d, r).
        out_proj_weight: (d_model, d). out_proj_bias: (d_model,).
        A, D, delta_bias, delta_softplus, cu_seqlens: as for `selective_scan_fn`; the convolution stops at borders too.
        B, C: None, then they are projections of x, with B_proj_bias and C_proj_bias (n,) added; or given as for
            `selective_scan_fn`.
        checkpoint_lvl: not read; convolution and projections are kept for the backward pass.
        seq_idx: what the CUDA convolution needs beside cu_seqlens; not read.

    Returns:
        (b, l, d_model)

    Raises:
        ValueError: as `selective_scan_fn`, or seq_idx without cu_seqlens.
    """
    del checkpoint_lvl
    if seq_idx is not None and cu_seqlens is None:
        raise ValueError("seq_idx is given without cu_seqlens: give the borders as cu_seqlens")
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d(_channels_last(x), conv1d_weight.squeeze(1), conv1d_bias, "silu", cu_seqlens=cu_seqlens)
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    low, projected_B, projected_C = F.linear(u, x_proj_weight).split([rank, states, states], dim=-1)
    if B is None:
        B = (projected_B if B_proj_bias is None else projected_B + B_proj_bias.to(projected_B.dtype)).mT
    if C is None:
        C = (projected_C if C_proj_bias is None else projected_C + C_proj_bias.to(projected_C.dtype)).mT
    delta = F.linear(low, delta_proj_weight).mT
    y = selective_scan_fn(u.mT, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens=cu_seqlens)
    assert isinstance(y, Tensor)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def _channels_last(x: Tensor) -> Tensor:
    """(b, d, l) -> (b, l, d), contiguous; no copy of what a transpose made."""
    return x.mT.contiguous()


def _groups(name: str, x: Tensor) -> Tensor:
    """(b, n, l) or (b, g, n, l) -> (b, g, n, l)."""
    if x.dim() == 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: only {name} of every token, (b, n, l), is supported")
    return x[:, None] if x.dim() == 3 else x
