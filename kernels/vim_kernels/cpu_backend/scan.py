"""The selective scan in one direction: dt, B and C are given, states can come in and go out.

Saved for the backward: the states once a tile of 32 tokens, d n / 8 bytes per token.
"""

import torch
from torch import Tensor

from vim_kernels.constants import LOG2E
from vim_kernels.cpu_backend.plan import Plan, plan_for, tile_bound
from vim_kernels.cpu_backend.records import SCAN, SCAN_GRADIENT
from vim_kernels.cpu_backend.scan_backward import backward_vectors, scan_backward
from vim_kernels.cpu_backend.scan_forward import forward_vectors, scan_forward
from vim_kernels.cpu_backend.tensors import (
    address,
    blocked,
    float_rows,
    fresh,
    kernel_dtype,
    record,
    token_rows,
    unblocked,
    vector_or_zeros,
    whole,
)
from vim_kernels.cpu_backend.vector import LANES
from vim_kernels.dispatch.contract import SelectiveScan


class _Call:
    """The inputs of one scan laid out for the kernels; it keeps alive what the record points to."""

    def __init__(self, arguments: SelectiveScan) -> None:
        x, dt, A, B, C, D, z, dt_bias, cu_seqlens, _, dt_softplus, reverse = arguments
        self.dtype = kernel_dtype(x, z)
        self.x = token_rows(x, self.dtype)
        self.gate = None if z is None else token_rows(z, self.dtype)
        self.dt = token_rows(dt, torch.float32)
        self.B, self.C = float_rows(B), float_rows(C)
        self.skip, self.dt_bias = vector_or_zeros(D, self.x), vector_or_zeros(dt_bias, self.x)
        self.decay = blocked(A.detach().float() * LOG2E)
        self.plan: Plan = plan_for(self.x, cu_seqlens)
        self.channels, self.states = self.x.shape[-1], A.shape[-1]
        self.record = record(
            SCAN, channels=self.channels, states=self.states, reverse=reverse, softplus=dt_softplus,
            bf16=self.dtype == torch.bfloat16, u=address(self.x), u_stride=self.x.stride(1),
            dt=address(self.dt), dt_stride=self.dt.stride(1), gate=address(self.gate),
            gate_stride=0 if self.gate is None else self.gate.stride(1),
            B=address(self.B), C=address(self.C), bc_stride=self.states, dt_bias=address(self.dt_bias),
            skip=address(self.skip), decay=address(self.decay), scale=1.0,
        )  # fmt: skip

    def empty_states(self) -> Tensor:
        """(sequences, channels / 16, n, 16)."""
        return torch.empty(self.plan.sequences, self.channels // LANES, self.states, LANES)


def selective_scan_saved(arguments: SelectiveScan) -> list[Tensor]:
    """Empty [states once a tile], float32."""
    x, (size, states) = arguments.x, arguments.A.shape
    return [x.new_empty(tile_bound(x, arguments.cu_seqlens), whole(size) * states, dtype=torch.float32)]


def selective_scan_forward(arguments: SelectiveScan, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `vim_kernels.dispatch.contract`."""
    x, initial_state = arguments.x, arguments.initial_state
    call = _Call(arguments)
    saved = selective_scan_saved(arguments) if save else []
    out = torch.empty(call.x.shape, dtype=call.dtype)
    initial = None if initial_state is None else blocked(initial_state)
    final = call.empty_states()
    d = call.record
    d["out"], d["out_stride"], d["out_bf16"] = address(out), call.channels, call.dtype == torch.bfloat16
    d["initial"], d["final"] = address(initial), address(final)
    d["checkpoints"] = address(saved[0]) if save else 0
    plan = call.plan
    scratch = plan.scratch(forward_vectors(call.states, plan.widest))
    scan_forward(d, plan.borders, plan.chunks, plan.tasks, plan.task_starts, scratch)
    y = out[..., : x.shape[-1]].to(x.dtype).contiguous()
    return y, unblocked(final, x.shape[-1]), saved


def selective_scan_backward(
    arguments: SelectiveScan, dy: Tensor, dfinal_state: Tensor | None, saved: list[Tensor]
) -> SelectiveScan:
    """See `vim_kernels.dispatch.contract`."""
    x, dt, A, B, C, D, z, dt_bias, _, initial_state, _, _ = arguments
    call = _Call(arguments)
    plan, d, n = call.plan, call.channels, call.states
    dout = token_rows(dy, call.dtype)
    du, ddt = torch.empty(call.x.shape), torch.empty(call.x.shape)
    dz = None if z is None else torch.empty(call.x.shape, dtype=call.dtype)
    dbc = torch.empty(plan.groups, plan.tokens, 2 * n)
    dweights = torch.empty(plan.sequences, (n + 2) * d)
    dfinal = None if dfinal_state is None else blocked(dfinal_state)
    dinitial = call.empty_states()
    gradient = record(
        SCAN_GRADIENT, dout=address(dout), dout_stride=dout.stride(1), dgate=address(dz), dgate_stride=d,
        du=address(du), ddt=address(ddt), dbc=address(dbc), dbc_stride=2 * n, dbc_group_stride=plan.tokens * 2 * n,
        dweights=address(dweights), dfinal=address(dfinal), dinitial=address(dinitial),
    )  # fmt: skip
    call.record["checkpoints"] = saved[0].data_ptr()
    scratch = plan.scratch(backward_vectors(n, plan.widest))
    scan_backward(call.record, gradient, plan.borders, plan.chunks, plan.tasks, plan.task_starts, scratch)
    dB, dC = dbc.sum(0).view(*B.shape[:2], 2 * n).chunk(2, dim=-1)
    total = dweights.sum(0)
    dA = unblocked(total[: n * d].view(-1, n, LANES), d)
    dskip, dbias = total[n * d :].view(2, d)
    return arguments._replace(
        x=fresh(du, x),
        dt=fresh(ddt, dt),
        A=fresh(dA, A),
        B=fresh(dB, B),
        C=fresh(dC, C),
        D=fresh(dskip, D),
        z=fresh(dz, z),
        dt_bias=fresh(dbias, dt_bias),
        initial_state=fresh(unblocked(dinitial, x.shape[-1]), initial_state),
    )
