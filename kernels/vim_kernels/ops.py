"""The public ops: check what comes in, then run the chosen backend. Definitions: `vim_kernels.reference`.

Tokens are channel-last, `(batch, length, channels)`; packed rows are `(1, total, channels)` with `cu_seqlens`.
"""

import functools
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from vim_kernels.checks import (
    FLOATS,
    check_cu_seqlens,
    check_float,
    check_float32,
    check_floats,
    check_lines,
    check_same_device,
    check_shape,
)
from vim_kernels.dispatch.call import call
from vim_kernels.dispatch.choice import TAKES_PARTS, choose
from vim_kernels.dispatch.contract import (
    AddRmsNorm,
    BidirectionalScan,
    CausalConv1d,
    Lines,
    NormWeights,
    Part,
    PooledScan,
    Recompute,
    ScanWeights,
    SelectiveScan,
)
from vim_kernels.dispatch.part import call_part

_LEVELS = get_args(Recompute)


@overload
def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    dt_bias: Tensor | None = ..., *, dt_softplus: bool = ..., reverse: bool = ..., cu_seqlens: Tensor | None = ...,
    initial_state: Tensor | None = ..., return_final_state: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    dt_bias: Tensor | None = ..., *, dt_softplus: bool = ..., reverse: bool = ..., cu_seqlens: Tensor | None = ...,
    initial_state: Tensor | None = ..., return_final_state: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of Mamba-1 (arXiv 2312.00752, equation 2) in one direction.

    `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t` and `y_t = <C_t, h_t> + D x_t`, times `silu(z_t)` where z is given.

    Args:
        x, dt, z: (batch, length, d_inner); float32, bfloat16, float16 or float64.
        A: (d_inner, d_state), negative. B, C: (batch, length, d_state). D, dt_bias: (d_inner,).
        dt_softplus: dt becomes softplus(dt + dt_bias).
        reverse: scan from the last token to the first; y stays in the order of x.
        cu_seqlens: int32 (images + 1,) borders of the images packed into one row; the state restarts at each.
        initial_state: (batch or images, d_inner, d_state), the state before the first token that is scanned.
        return_final_state: also return the state after the last token scanned, float32.
        backend: "reference", or another that `available_backends` lists; None picks the fastest for the device.

    Returns:
        y like x, or (y, final_state).

    Raises:
        ValueError, TypeError: naming the argument, for a wrong shape, dtype, device or cu_seqlens.
    """
    check_float("x", x)
    check_shape("x", x.shape, (None, None, None))
    b, l, d = x.shape
    check_shape("dt", dt.shape, (b, l, d))
    check_shape("A", A.shape, (d, None))
    n = A.shape[1]
    check_shape("B", B.shape, (b, l, n))
    check_shape("C", C.shape, (b, l, n))
    if D is not None:
        check_shape("D", D.shape, (d,))
    if z is not None:
        check_shape("z", z.shape, (b, l, d))
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias.shape, (d,))
    check_floats(dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)
    sequences = check_cu_seqlens(cu_seqlens, x)
    if initial_state is not None:
        check_shape("initial_state", initial_state.shape, (sequences, d, n))
    check_same_device(
        x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, cu_seqlens=cu_seqlens, initial_state=initial_state
    )
    arguments = SelectiveScan(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, initial_state, dt_softplus, reverse)
    y, state = call(choose(backend, x.device), arguments)
    return (y, state) if return_final_state else y


def bidirectional_scan(
    xz: Tensor,
    forward: ScanWeights,
    backward: ScanWeights,
    *,
    gated: bool = True,
    cu_seqlens: Tensor | None = None,
    gaps: Tensor | None = None,
    overwrite: bool = False,
    recompute: Recompute = "inputs",
    backend: str | None = None,
) -> Tensor:
    """Everything of a Vim mixer between in_proj and out_proj (Vim, arXiv 2401.09417, algorithm 1).

    Each direction: causal convolution, SiLU, x_proj, dt_proj, softplus, selective scan, D skip; the backward one reads
    the tokens from the last to the first. The two are averaged and gated once by silu(z).

    Args:
        xz: (batch, length, 2 d_inner), x in the first half and z in the second; only x, (batch, length, d_inner),
            when `gated` is False (for blocks that normalise before the gate).
        forward, backward: the parameters of the two directions.
        cu_seqlens: int32 (images + 1,) borders of packed images; convolution and state restart at each.
        gaps: (2, batch, length) float32, positive: what dt, after softplus, of every token is multiplied by, in the
            forward direction and in the backward one; for tokens that are apart, how many steps each stands for. No
            gradient comes back to it. None: 1.
        overwrite: xz is not needed any more: without gradients the result may take the memory of its first half. What
            xz holds afterwards is undefined.
        recompute: what the backward pass makes again of what it needs beside xz. "none": nothing; only the Triton
            backend keeps that much. "inputs" of the scans: convolutions and projections. "states": the saved states and
            the sum before the gate too, by one more forward scan; nothing but xz is kept. Gradients are the same.

    Returns:
        (batch, length, d_inner) in the dtype of xz; contiguous unless `overwrite`.

    Raises:
        ValueError, TypeError: naming the argument, for a wrong shape, dtype, device or cu_seqlens.
    """
    _check_mixer(gated, xz, forward, backward)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, xz)
        check_same_device(xz, cu_seqlens=cu_seqlens)
    if gaps is not None:
        check_shape("gaps", gaps.shape, (2, *xz.shape[:2]))
        check_float32("gaps", gaps)
        check_same_device(xz, gaps=gaps)
        gaps = gaps.contiguous()
    keep_inputs = _keeps_inputs(recompute)
    arguments = BidirectionalScan(xz.contiguous(), forward, backward, cu_seqlens, gaps, gated, keep_inputs)
    return _call_mixer(backend, arguments, save=recompute != "states", overwrite=overwrite)


def takes_parts(xz: Tensor, forward: ScanWeights, backward: ScanWeights, *, backend: str | None = None) -> bool:
    """Whether `bidirectional_scan_part` can scan these: on the Triton backend, in any dtype but float64."""
    tensors = (xz, *forward, *backward)
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return choose(backend, xz.device) in TAKES_PARTS and not double


def bidirectional_scan_part(
    xz: Tensor, forward: ScanWeights, backward: ScanWeights, part: Part, *, gated: bool = True,
    overwrite: bool = False, recompute: Recompute = "inputs", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`bidirectional_scan` of a part of every sequence of a batch, while others scan the rest.

    Args:
        xz: (batch, length, 2 d_inner), or (batch, length, d_inner) where not `gated`; w - 1 tokens at least.
        part: the tokens beside it, which get a gradient too, and how to get the state that enters it.
        forward, backward, gated, overwrite, recompute, backend: as there. With "states" the backward pass asks
            `part.entering` once more, for the forward scan that it runs again.

    Returns:
        (batch, length, d_inner), as there.

    Raises:
        ValueError, TypeError: naming the argument, for a wrong shape, dtype or device, and for a backend that takes no
            parts: see `takes_parts`.
    """
    _check_mixer(gated, xz, forward, backward)
    b, l, d, near = xz.shape[0], xz.shape[1], forward.D.shape[0], forward.conv_weight.shape[1] - 1
    check_shape("part.halo", part.halo.shape, (b, 2 * near, d))
    check_same_device(xz, **{"part.halo": part.halo})
    if part.halo.dtype != xz.dtype or l < near:
        raise ValueError(
            f"part.halo has dtype {part.halo.dtype} and xz {l} tokens: wanted {xz.dtype}, and {near} tokens at least"
        )
    name = choose(backend, xz.device)
    if not takes_parts(xz, forward, backward, backend=name):
        raise ValueError(
            f"backend {name!r} takes no part of a sequence in {xz.dtype}; {TAKES_PARTS} in float32 or less"
        )
    arguments = BidirectionalScan(xz.contiguous(), forward, backward, None, None, gated, _keeps_inputs(recompute))
    with torch.autocast(xz.device.type, enabled=False):
        return call_part(name, arguments, part, save=recompute != "states", overwrite=overwrite)


def pooled_scan(
    xz: Tensor,
    forward: ScanWeights,
    backward: ScanWeights,
    lines: Lines,
    *,
    norm: NormWeights | None = None,
    eps: float = 1e-5,
    recompute: Recompute = "inputs",
    backend: str | None = None,
) -> Tensor:
    """Everything of a pooled Vim mixer between in_proj and out_proj (FastVim, arXiv 2502.00594, section 3).

    As `bidirectional_scan`, but x_proj, dt_proj and scan take one token a line: in each direction the weighted sum of
    the convolved tokens of a row or column, whose result every token of the line gets. Skip and gate, and the LayerNorm
    between them where `norm` is given, are taken token by token.

    Args:
        xz: (batch, length, 2 d_inner), x in the first half and z in the second.
        forward, backward: the parameters of the two directions.
        lines: which tokens make a line, in which order tokens and lines are scanned, and the borders of packed images.
        norm: (weight, bias) of a LayerNorm over d_inner, of the mean of the directions before the gate.
        eps: of that norm.
        recompute: as in `bidirectional_scan`; "none" is the same as "inputs" here.

    Returns:
        (batch, length, d_inner), contiguous, in the dtype and order of xz.

    Raises:
        ValueError, TypeError: naming the argument, for a wrong shape, dtype, device, or lines that do not fit.
    """
    _check_mixer(True, xz, forward, backward)
    check_lines(lines, xz)
    if norm is not None:
        for field, tensor in norm._asdict().items():
            check_shape(f"norm.{field}", tensor.shape, (xz.shape[2] // 2,))
            check_float(f"norm.{field}", tensor)
            check_same_device(xz, **{f"norm.{field}": tensor})
    _keeps_inputs(recompute)
    arguments = PooledScan(xz.contiguous(), forward, backward, lines, norm, float(eps))
    return _call_mixer(backend, arguments, save=recompute != "states")


def _keeps_inputs(recompute: str) -> bool:
    """Whether what a forward saves holds the inputs of the scans: where it is made again, its backward follows at once.

    Raises ValueError for an unknown level.
    """
    if recompute not in _LEVELS:
        raise ValueError(f"recompute must be one of {', '.join(_LEVELS)}, got {recompute!r}")
    return recompute != "inputs"


def _call_mixer(backend: str | None, arguments: BidirectionalScan | PooledScan, **options: bool) -> Tensor:
    """`call`, outside of autocast."""
    device = arguments.xz.device
    name = choose(backend, device)
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return call(name, arguments, **options)
    return call(name, arguments, **options)


def _check_mixer(gated: bool, xz: Tensor, forward: ScanWeights, backward: ScanWeights) -> None:
    """Raise ValueError or TypeError for the first dtype, shape or device that does not fit."""
    check_float("xz", xz)
    shapes = tuple(None if tensor is None else tensor.shape for tensor in (*forward, *backward))
    # looking it up costs a tenth of checking anew
    check_shapes = _check_mixer_shapes if torch.compiler.is_compiling() else _check_mixer_shapes_once
    check_shapes(gated, xz.shape, *shapes)
    for name, weights in (("forward", forward), ("backward", backward)):
        if any(tensor is not None and tensor.dtype not in FLOATS for tensor in weights):
            check_floats(**{f"{name}.{field}": tensor for field, tensor in weights._asdict().items()})
        if any(tensor is not None and tensor.device != xz.device for tensor in weights):
            check_same_device(xz, **{f"{name}.{field}": tensor for field, tensor in weights._asdict().items()})


def _check_mixer_shapes(gated: bool, xz: tuple[int, ...], *weights: Any) -> None:
    """Raise ValueError for the first shape that does not fit; weights as in ScanWeights, both directions."""
    count = len(ScanWeights._fields)
    two = [dict(zip(ScanWeights._fields, shapes, strict=True)) for shapes in (weights[:count], weights[count:])]
    check_shape("forward.A_log", two[0]["A_log"], (None, None))
    d, n = two[0]["A_log"]
    check_shape("xz", xz, (None, None, 2 * d if gated else d))
    for name, shapes in zip(("forward", "backward"), two, strict=True):
        check_shape(f"{name}.dt_proj", shapes["dt_proj"], (d, None))
        expected = {"conv_weight": (d, None), "x_proj": (shapes["dt_proj"][1] + 2 * n, d), "A_log": (d, n)}
        for field, shape in (expected | dict.fromkeys(("conv_bias", "dt_bias", "D"), (d,))).items():
            if shapes[field] is not None:
                check_shape(f"{name}.{field}", shapes[field], shape)


_check_mixer_shapes_once = functools.lru_cache(maxsize=1024)(_check_mixer_shapes)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Depthwise causal convolution, then SiLU.

    Args:
        x: (batch, length, channels). weight: (channels, width), the last tap meets the token itself. bias: (channels,).
        activation: "silu" or None.
        reverse: anti-causal: token t sees t .. t + width - 1.
        cu_seqlens: int32 (images + 1,) borders that the convolution does not cross.

    Returns:
        (batch, length, channels) like x.
    """
    check_float("x", x)
    check_shape("x", x.shape, (None, None, None))
    check_shape("weight", weight.shape, (x.shape[-1], None))
    if bias is not None:
        check_shape("bias", bias.shape, (x.shape[-1],))
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    check_cu_seqlens(cu_seqlens, x)
    check_floats(weight=weight, bias=bias)
    check_same_device(x, weight=weight, bias=bias, cu_seqlens=cu_seqlens)
    return call(choose(backend, x.device), CausalConv1d(x, weight, bias, cu_seqlens, activation, reverse))


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add the residual stream, then RMS norm (arXiv 1910.07467), with the stream kept in float32.

    Args:
        x: (..., channels). residual: same shape, float32, or None before the first block. weight: (channels,).

    Returns:
        normed, like x; residual + x, float32.
    """
    check_float("x", x)
    if not x.dim():
        raise ValueError("x has shape (), wanted (..., channels)")
    check_shape("weight", weight.shape, (x.shape[-1],))
    if residual is not None:
        check_shape("residual", residual.shape, tuple(x.shape))
    check_floats(weight=weight, residual=residual)
    check_same_device(x, weight=weight, residual=residual)
    return call(choose(backend, x.device), AddRmsNorm(x, residual, weight, float(eps)))
