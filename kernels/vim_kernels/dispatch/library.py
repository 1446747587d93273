"""The fast backends as PyTorch custom ops: each a triple of op, fake kernel and autograd formula.

The backward of each is a custom op of its own, so that `torch.compile`, `torch.export`, autocast, gradient
checkpointing and `opcheck` see one opaque node. The argument `backend` selects the module of plain functions.
Gradients travel between ops as lists without the absent ones, because an op cannot return None. An op called with
save=False can still be differentiated: its backward runs the forward again.
"""
# ruff: noqa: ARG001 - fake kernels and setup functions take every argument of their op

from collections.abc import Sequence

import torch
from torch import Tensor

from vim_kernels.arguments import ScanWeights
from vim_kernels.dispatch.contract import fast_module

_op = torch.library.custom_op


@_op("vim_kernels::selective_scan", mutates_args=())
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    backend: str,
    save: bool,
) -> list[Tensor]:
    """[y, final state, *saved for the backward]."""
    y, state, saved = fast_module(backend).selective_scan_forward(
        x, dt, A, B, C, D, z, dt_bias,
        dt_softplus=dt_softplus, reverse=reverse, cu_seqlens=cu_seqlens, initial_state=initial_state, save=save,
    )  # fmt: skip
    return [y, state, *saved]


@selective_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, initial_state, dt_softplus, reverse, backend, save):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_empty((sequences, *A.shape), dtype=torch.float32)
    saved = fast_module(backend).selective_scan_saved(x, A, cu_seqlens, initial_state) if save else []
    return [x.new_empty(x.shape), state, *saved]


@_op("vim_kernels::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    saved: list[Tensor],
    dt_softplus: bool,
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of the tensors given, x .. dt_bias and initial_state."""
    return given(
        fast_module(backend).selective_scan_backward(
            dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias,
            dt_softplus=dt_softplus, reverse=reverse, cu_seqlens=cu_seqlens, initial_state=initial_state, saved=saved,
        )
    )  # fmt: skip


@selective_scan_backward.register_fake
def _(dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, cu_seqlens, initial_state, saved, dt_softplus, reverse, backend):
    return [t.new_empty(t.shape) for t in given((x, dt, A, B, C, D, z, dt_bias, initial_state))]


def _selective_scan_setup(ctx, inputs, output) -> None:
    *tensors, ctx.dt_softplus, ctx.reverse, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _selective_scan_gradients(ctx, gradients: list[Tensor | None]):
    tensors = (kept := ctx.saved_tensors)[:10]
    saved = list(kept[10:])
    options = (ctx.dt_softplus, ctx.reverse, ctx.backend)
    if not saved:
        saved = selective_scan(*tensors, *options, True)[2:]
    dy, dstate = gradients[:2]
    dy = torch.zeros_like(tensors[0]) if dy is None else dy.contiguous()
    dstate = None if dstate is None else dstate.contiguous()
    found = selective_scan_backward(dy, dstate, *tensors, saved, *options)
    *head, dinitial = spread(found, (*tensors[:8], tensors[9]))
    return (*head, None, dinitial, None, None, None, None)


selective_scan.register_autograd(_selective_scan_gradients, setup_context=_selective_scan_setup)


@_op("vim_kernels::bidirectional_scan", mutates_args=())
def bidirectional_scan(
    xz: Tensor,
    f_conv_weight: Tensor,
    f_conv_bias: Tensor | None,
    f_x_proj: Tensor,
    f_dt_proj: Tensor,
    f_dt_bias: Tensor,
    f_A_log: Tensor,
    f_D: Tensor,
    b_conv_weight: Tensor,
    b_conv_bias: Tensor | None,
    b_x_proj: Tensor,
    b_dt_proj: Tensor,
    b_dt_bias: Tensor,
    b_A_log: Tensor,
    b_D: Tensor,
    gated: bool,
    cu_seqlens: Tensor | None,
    backend: str,
    save: bool,
) -> list[Tensor]:
    """[out, *saved for the backward]; f_ and b_ are the weights of the forward and the backward direction."""
    forward = ScanWeights(f_conv_weight, f_conv_bias, f_x_proj, f_dt_proj, f_dt_bias, f_A_log, f_D)
    backward = ScanWeights(b_conv_weight, b_conv_bias, b_x_proj, b_dt_proj, b_dt_bias, b_A_log, b_D)
    x, z = halves(xz, gated)
    out, saved = fast_module(backend).bidirectional_scan_forward(x, z, forward, backward, cu_seqlens, save)
    return [out, *saved]


@bidirectional_scan.register_fake
def _(xz, *rest):
    weights, (gated, cu_seqlens, backend, save) = rest[:14], rest[14:]
    x, z = halves(xz, gated)
    two = ScanWeights(*weights[:7]), ScanWeights(*weights[7:])
    saved = fast_module(backend).bidirectional_scan_saved(x, z, *two, cu_seqlens) if save else []
    return [x.new_empty(x.shape), *saved]


@_op("vim_kernels::bidirectional_scan_backward", mutates_args=())
def bidirectional_scan_backward(
    dout: Tensor,
    xz: Tensor,
    f_conv_weight: Tensor,
    f_conv_bias: Tensor | None,
    f_x_proj: Tensor,
    f_dt_proj: Tensor,
    f_dt_bias: Tensor,
    f_A_log: Tensor,
    f_D: Tensor,
    b_conv_weight: Tensor,
    b_conv_bias: Tensor | None,
    b_x_proj: Tensor,
    b_dt_proj: Tensor,
    b_dt_bias: Tensor,
    b_A_log: Tensor,
    b_D: Tensor,
    gated: bool,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    backend: str,
) -> list[Tensor]:
    """Gradients of xz and of the weights given."""
    forward = ScanWeights(f_conv_weight, f_conv_bias, f_x_proj, f_dt_proj, f_dt_bias, f_A_log, f_D)
    backward = ScanWeights(b_conv_weight, b_conv_bias, b_x_proj, b_dt_proj, b_dt_bias, b_A_log, b_D)
    x, z = halves(xz, gated)
    dx, dz, dforward, dbackward = fast_module(backend).bidirectional_scan_backward(
        dout, x, z, forward, backward, cu_seqlens, saved
    )
    return [join_halves(dx, dz), *given((*dforward, *dbackward))]


@bidirectional_scan_backward.register_fake
def _(dout, xz, *rest):
    return [t.new_empty(t.shape) for t in given((xz, *rest[:14]))]


def _bidirectional_scan_setup(ctx, inputs, output) -> None:
    xz, *weights = inputs[:15]
    ctx.gated, cu_seqlens, ctx.backend, _ = inputs[15:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(xz, *weights, cu_seqlens, *output[1:])


def _bidirectional_scan_gradients(ctx, gradients: list[Tensor | None]):
    *xz_and_weights, cu_seqlens = (kept := ctx.saved_tensors)[:16]
    saved = list(kept[16:])
    dout = gradients[0]
    if dout is None:
        return (None,) * 19
    if not saved:
        saved = bidirectional_scan(*xz_and_weights, ctx.gated, cu_seqlens, ctx.backend, True)[1:]
    found = bidirectional_scan_backward(dout.contiguous(), *xz_and_weights, ctx.gated, cu_seqlens, saved, ctx.backend)
    return (*spread(found, xz_and_weights), None, None, None, None)


bidirectional_scan.register_autograd(_bidirectional_scan_gradients, setup_context=_bidirectional_scan_setup)


@_op("vim_kernels::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    reverse: bool,
    backend: str,
) -> Tensor:
    """(b, l, d) like x."""
    run = fast_module(backend).causal_conv1d_forward
    return run(x, weight, bias, activation=activation, reverse=reverse, cu_seqlens=cu_seqlens)


@causal_conv1d.register_fake
def _(x, weight, bias, cu_seqlens, activation, reverse, backend):
    return x.new_empty(x.shape)


@_op("vim_kernels::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of x, weight and, if given, bias."""
    run = fast_module(backend).causal_conv1d_backward
    return given(run(dy, x, weight, bias, activation=activation, reverse=reverse, cu_seqlens=cu_seqlens))


@causal_conv1d_backward.register_fake
def _(dy, x, weight, bias, cu_seqlens, activation, reverse, backend):
    return [t.new_empty(t.shape) for t in given((x, weight, bias))]


def _causal_conv1d_setup(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _causal_conv1d_gradients(ctx, dy: Tensor):
    tensors = ctx.saved_tensors
    found = causal_conv1d_backward(dy.contiguous(), *tensors, ctx.activation, ctx.reverse, ctx.backend)
    return (*spread(found, tensors[:3]), None, None, None, None)


causal_conv1d.register_autograd(_causal_conv1d_gradients, setup_context=_causal_conv1d_setup)


@_op("vim_kernels::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """Normed like x, and the sum in float32."""
    return fast_module(backend).add_rms_norm_forward(x, residual, weight, eps)


@add_rms_norm.register_fake
def _(x, residual, weight, eps, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)


@_op("vim_kernels::add_rms_norm_backward", mutates_args=())
def add_rms_norm_backward(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradient of the sum, float32, and of weight."""
    return fast_module(backend).add_rms_norm_backward(dnormed, dtotal, total, weight, eps)


@add_rms_norm_backward.register_fake
def _(dnormed, dtotal, total, weight, eps, backend):
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _add_rms_norm_setup(ctx, inputs, output) -> None:
    x, residual, weight, ctx.eps, ctx.backend = inputs
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _add_rms_norm_gradients(ctx, dnormed: Tensor | None, dtotal: Tensor | None):
    total, weight = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(total, dtype=ctx.x_dtype)
    dtotal = None if dtotal is None else dtotal.contiguous()
    dsum, dweight = add_rms_norm_backward(dnormed.contiguous(), dtotal, total, weight, ctx.eps, ctx.backend)
    dresidual = None if ctx.residual_dtype is None else dsum.to(ctx.residual_dtype)
    return dsum.to(ctx.x_dtype), dresidual, dweight, None, None


add_rms_norm.register_autograd(_add_rms_norm_gradients, setup_context=_add_rms_norm_setup)


def halves(xz: Tensor, gated: bool) -> tuple[Tensor, Tensor | None]:
    """Views x and z of xz (b, l, 2 d), or xz itself and None."""
    if not gated:
        return xz, None
    x, z = xz.chunk(2, dim=-1)
    return x, z


def join_halves(dx: Tensor, dz: Tensor | None) -> Tensor:
    """The gradient of xz; without a copy where a backend wrote dx and dz into one buffer."""
    if dz is None:
        return dx
    b, l, d = dx.shape
    one_buffer = (
        dx.untyped_storage().data_ptr() == dz.untyped_storage().data_ptr()
        and dx.stride() == dz.stride() == (2 * d * l, 2 * d, 1)
        and dz.storage_offset() == dx.storage_offset() + d
    )
    if one_buffer:
        return dx.as_strided((b, l, 2 * d), dx.stride(), dx.storage_offset())
    return torch.cat([dx, dz], dim=-1)


def given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors without the Nones."""
    return [t for t in tensors if t is not None]


def spread(gradients: list[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the given inputs -> one entry an input, None where the input is None."""
    rest = iter(gradients)
    return [None if t is None else next(rest) for t in inputs]
