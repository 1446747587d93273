"""The single-direction selective scan of the Triton backend, forward and backward."""

import torch
from torch import Tensor

from vim_kernels.constants import LOG2E
from vim_kernels.dispatch.contract import SelectiveScan
from vim_kernels.triton_backend.launch import power_of_two
from vim_kernels.triton_backend.plan import states_dtype, tokens_of
from vim_kernels.triton_backend.recurrence import Gate, ScanInputs, scan_backward, scan_forward, softplus
from vim_kernels.triton_backend.tensors import copy_like, flat


def selective_scan_saved(arguments: SelectiveScan) -> list[Tensor]:
    """[states (1, slots, n, d)]: n / 8 bytes a token and channel."""
    x, (d, n) = arguments.x, arguments.A.shape
    slots = tokens_of(x, arguments.cu_seqlens).slots()
    return [x.new_empty(1, slots, power_of_two(n), d, dtype=states_dtype(x))]


def selective_scan_forward(arguments: SelectiveScan, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output like x, final state (s, d, n) float32, and what was saved."""
    x, A, z, initial_state = arguments.x, arguments.A, arguments.z, arguments.initial_state
    tokens = tokens_of(x, arguments.cu_seqlens)
    n = A.shape[1]
    y = x.new_empty(x.shape)
    saved = selective_scan_saved(arguments) if save else []
    if x.numel() == 0:
        state = x.new_zeros(tokens.sequences, *A.shape, dtype=torch.float32)
        return y, state if initial_state is None else copy_like(initial_state, state), saved
    inputs = _scan_inputs(arguments)
    final = scan_forward(
        inputs,
        None if z is None else flat(z),
        y.view(-1, x.shape[2]),
        tokens,
        scale=1.0,
        states=saved[0] if save else None,
        ungated=None,
        initial=_inside(initial_state, inputs),
        want_final=True,
    )
    assert final is not None
    return y, final[0, :, :n].transpose(1, 2).contiguous(), saved


def selective_scan_backward(
    arguments: SelectiveScan, dy: Tensor, dfinal_state: Tensor | None, saved: list[Tensor]
) -> SelectiveScan:
    """See `vim_kernels.dispatch.contract`."""
    x, dt, A, B, C, D, z, dt_bias, cu_seqlens, initial_state, dt_softplus, _ = arguments
    if x.numel() == 0:
        return _no_gradients(arguments, dfinal_state)
    tokens = tokens_of(x, cu_seqlens)
    n = A.shape[1]
    inputs = _scan_inputs(arguments)
    initial = _inside(initial_state, inputs)
    gate = Gate(1.0)
    if z is not None:
        # What the gate multiplied is computed again: half a forward, in place of 2 bytes a token and channel kept.
        ungated = torch.empty_like(dy)
        scan_forward(
            inputs, None, flat(ungated), tokens,
            scale=1.0, states=None, ungated=None, initial=initial, want_final=False,
        )  # fmt: skip
        gate = Gate(1.0, flat(z), flat(ungated), flat(torch.empty_like(dy)))
    grads = scan_backward(
        inputs,
        flat(dy),
        tokens,
        gate=gate,
        states=saved[0],
        dfinal=_inside(dfinal_state, inputs),
        softplus=dt_softplus,
        want_initial=initial_state is not None,
    )
    ddt, dbc, drates, (dskip, dt_sum) = grads.dt[0], grads.bc[0].sum(0), grads.rates[0].sum(0), grads.sums[0].sum(0)
    states = inputs.rates.shape[1]
    dinitial = None
    if initial_state is not None and grads.initial is not None:
        dinitial = grads.initial[0, :, :n].transpose(1, 2).to(initial_state.dtype).contiguous()
    return arguments._replace(
        x=grads.u.view(x.shape),
        dt=ddt.to(dt.dtype).view(dt.shape),
        A=drates[:n].t().to(A.dtype).contiguous(),
        B=copy_like(dbc[:, :n], B),
        C=copy_like(dbc[:, states : states + n], C),
        D=None if D is None else copy_like(dskip, D),
        z=None if gate.dz is None else gate.dz.view(x.shape),
        dt_bias=None if dt_bias is None else copy_like(dt_sum, dt_bias),
        initial_state=dinitial,
    )


def _scan_inputs(arguments: SelectiveScan) -> ScanInputs:
    x, dt, A, B, C, D, _, dt_bias, _, _, dt_softplus, reverse = arguments
    d, n = A.shape
    states = power_of_two(n)
    rows = x.shape[0] * x.shape[1]
    rates = x.new_zeros(1, states, d, dtype=torch.float32)
    rates[0, :n] = A.t().float() * LOG2E
    bc = x.new_zeros(1, rows, 2 * states, dtype=torch.float32)
    bc[0, :, :n] = B.reshape(rows, n)
    bc[0, :, states : states + n] = C.reshape(rows, n)
    steps = flat(dt)
    plain = dt_bias is None and not dt_softplus
    dt_after = steps.contiguous() if plain else softplus(steps, dt_bias, apply=dt_softplus)
    return ScanInputs(
        flat(x).contiguous()[None], dt_after[None], bc, rates, None if D is None else (D.contiguous(),), reverse
    )


def _inside(state: Tensor | None, inputs: ScanInputs) -> Tensor | None:
    """(s, d, n) -> (1, s, n padded, d) float32, as the kernels keep it."""
    if state is None:
        return None
    _, d, states = inputs.sizes
    padded = state.new_zeros(1, state.shape[0], states, d, dtype=torch.float32)
    padded[0, :, : state.shape[2]] = state.transpose(1, 2)
    return padded


def _no_gradients(arguments: SelectiveScan, dfinal_state: Tensor | None) -> SelectiveScan:
    """Of a scan over no tokens, whose final state is its initial one."""
    zeros = arguments._make(t.new_zeros(t.shape) if isinstance(t, Tensor) else t for t in arguments)
    if zeros.initial_state is not None and dfinal_state is not None:
        zeros.initial_state.copy_(dfinal_state)
    return zeros
