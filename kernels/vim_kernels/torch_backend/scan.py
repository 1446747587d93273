"""The selective scan in plain PyTorch, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels.dispatch.contract import SelectiveScan
from vim_kernels.torch_backend.recurrence import empty_tile_states, scan_gradients, scan_tiles
from vim_kernels.torch_backend.tensors import copy_like, silu_slope


def selective_scan_saved(arguments: SelectiveScan) -> list[Tensor]:
    """Empty [states at the start of every tile], float32: d n / 16 bytes per token."""
    return [empty_tile_states(arguments.x, arguments.A, arguments.cu_seqlens)]


def selective_scan_forward(arguments: SelectiveScan, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `vim_kernels.dispatch.contract`."""
    x, dt, A, B, C, D, z, dt_bias, cu_seqlens, initial_state, dt_softplus, reverse = arguments
    saved = selective_scan_saved(arguments) if save else []
    u, raw, A, B, C = (t.float() for t in (x, dt, A, B, C))
    step = _step_size(raw, dt_bias, dt_softplus)
    y, final = scan_tiles(u, step, A, B, C, reverse, cu_seqlens, initial_state, saved[0] if save else None)
    if D is not None:
        y.addcmul_(D.float(), u)
    if z is not None:
        y *= F.silu(z.float())
    return y.to(x.dtype), final, saved


def selective_scan_backward(
    arguments: SelectiveScan, dy: Tensor, dfinal_state: Tensor | None, saved: list[Tensor]
) -> SelectiveScan:
    """See `vim_kernels.dispatch.contract`."""
    x, dt, A, B, C, D, z, dt_bias, cu_seqlens, initial_state, dt_softplus, reverse = arguments
    u, raw, dy = x.float(), dt.float(), dy.float()
    step = _step_size(raw, dt_bias, dt_softplus)
    dscan = dy if z is None else dy * F.silu(z.float())
    y, du, dstep, dA, dB, dC, dinitial = scan_gradients(
        dscan, dfinal_state, u, step, A.float(), B.float(), C.float(), reverse, cu_seqlens, saved[0]
    )
    dD = dz = None
    if D is not None:
        y.addcmul_(D.float(), u)
        du.addcmul_(D.float(), dscan)
        dD = (dscan * u).sum((0, 1))
    if z is not None:
        dz = dy * y * silu_slope(z.float())
    ddt = dstep * torch.sigmoid(raw if dt_bias is None else raw + dt_bias) if dt_softplus else dstep
    return arguments._replace(
        x=copy_like(du, x),
        dt=copy_like(ddt, dt),
        A=copy_like(dA, A),
        B=copy_like(dB, B),
        C=copy_like(dC, C),
        D=copy_like(dD, D),
        z=copy_like(dz, z),
        dt_bias=copy_like(ddt.sum((0, 1)), dt_bias),
        initial_state=copy_like(dinitial, initial_state),
    )


def _step_size(raw: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    raw = raw if bias is None else raw + bias.float()
    return F.softplus(raw) if softplus else raw
