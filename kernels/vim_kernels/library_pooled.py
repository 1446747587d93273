"""The pooled scan of the fast backends as a PyTorch custom op; see `vim_kernels.library`."""
# ruff: noqa: ARG001 - fake kernels and setup functions take every argument of their op

import torch
from torch import Tensor

from vim_kernels.interface import fast_module
from vim_kernels.library import given, spread
from vim_kernels.lines import Lines
from vim_kernels.types import NormWeights, ScanWeights

TENSORS, LINES = 17, 5
"""xz, 7 weights of each direction and 2 of the norm; the fields of `Lines`."""


@torch.library.custom_op("vim_kernels::pooled_scan", mutates_args=())
def pooled_scan(
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
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    starts: Tensor,
    line_of: Tensor,
    line_weights: Tensor,
    order: Tensor | None,
    cu_lines: Tensor | None,
    eps: float,
    backend: str,
    save: bool,
) -> list[Tensor]:
    """[out, *saved for the backward]."""
    forward = ScanWeights(f_conv_weight, f_conv_bias, f_x_proj, f_dt_proj, f_dt_bias, f_A_log, f_D)
    backward = ScanWeights(b_conv_weight, b_conv_bias, b_x_proj, b_dt_proj, b_dt_bias, b_A_log, b_D)
    lines, norm = Lines(starts, line_of, line_weights, order, cu_lines), _norm(norm_weight, norm_bias)
    out, saved = fast_module(backend).pooled_scan_forward(xz, forward, backward, lines, norm, eps, save)
    return [out, *saved]


@pooled_scan.register_fake
def _(xz, *rest):
    two, norm, lines = _bundles(rest)
    *_, backend, save = rest
    b, l, d = xz.shape
    saved = fast_module(backend).pooled_scan_saved(xz, *two, lines, norm) if save else []
    return [xz.new_empty(b, l, d // 2), *saved]


@torch.library.custom_op("vim_kernels::pooled_scan_backward", mutates_args=())
def pooled_scan_backward(
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
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    starts: Tensor,
    line_of: Tensor,
    line_weights: Tensor,
    order: Tensor | None,
    cu_lines: Tensor | None,
    saved: list[Tensor],
    eps: float,
    backend: str,
) -> list[Tensor]:
    """Gradients of xz and of the weights given."""
    forward = ScanWeights(f_conv_weight, f_conv_bias, f_x_proj, f_dt_proj, f_dt_bias, f_A_log, f_D)
    backward = ScanWeights(b_conv_weight, b_conv_bias, b_x_proj, b_dt_proj, b_dt_bias, b_A_log, b_D)
    lines, norm = Lines(starts, line_of, line_weights, order, cu_lines), _norm(norm_weight, norm_bias)
    dxz, dforward, dbackward, dnorm = fast_module(backend).pooled_scan_backward(
        dout, xz, forward, backward, lines, norm, eps, saved
    )
    return [dxz, *given((*dforward, *dbackward, *(dnorm or ())))]


@pooled_scan_backward.register_fake
def _(dout, xz, *rest):
    return [t.new_empty(t.shape) for t in given((xz, *rest[: TENSORS - 1]))]


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _gradients(ctx, gradients: list[Tensor | None]):
    tensors = (kept := ctx.saved_tensors)[: TENSORS + LINES]
    saved = list(kept[TENSORS + LINES :])
    dout = gradients[0]
    if dout is None:
        return (None,) * (TENSORS + LINES + 3)
    if not saved:
        saved = pooled_scan(*tensors, ctx.eps, ctx.backend, True)[1:]
    found = pooled_scan_backward(dout.contiguous(), *tensors, saved, ctx.eps, ctx.backend)
    return (*spread(found, tensors[:TENSORS]), *(None,) * (LINES + 3))


pooled_scan.register_autograd(_gradients, setup_context=_setup)


def _norm(weight: Tensor | None, bias: Tensor | None) -> NormWeights | None:
    return None if weight is None or bias is None else NormWeights(weight, bias)


def _bundles(rest):
    two = ScanWeights(*rest[:7]), ScanWeights(*rest[7:14])
    return two, _norm(*rest[14:16]), Lines(*rest[16:21])
