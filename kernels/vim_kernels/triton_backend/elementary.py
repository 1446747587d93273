"""Elementary functions of the core-Triton kernels, and the two constants that exp2 and log2 need."""

# ruff: noqa: RET505 - Triton's language folds only plain `if`s on constants
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels import constants

LOG2E = tl.constexpr(constants.LOG2E)
LN2 = tl.constexpr(constants.LN2)


@triton.jit
def sigmoid(v):
    """exp2 overflows to inf for very negative v, and 1 / inf is the right 0."""
    return 1.0 / (1.0 + tl.exp2(v * -LOG2E))


@triton.jit
def reciprocal(v, HARDWARE: tl.constexpr):
    """1 / v; on NVIDIA one instruction, to one unit in the last place, where a division takes eight.

    Not called pure, so that the compiler does not take what led to v twice, once a layout that the result is needed in.
    """
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        return 1.0 / v


@triton.jit
def softplus_coarse(v, HARDWARE: tl.constexpr):
    """`softplus` to 1e-5, for results kept in 16 bits: with one instruction for the logarithm on NVIDIA."""
    e = tl.exp2(tl.abs(v) * -LOG2E)
    if HARDWARE:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        log2 = tl.log2(1.0 + e)
    series = e * (1.0 - e * (0.5 - e * 0.3333333333333333))
    log1p = tl.where(e < 0.03125, series, LN2 * log2)
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p


@triton.jit
def softplus(v):
    """log(1 + exp(v)) = max(v, 0) + log1p(exp(-|v|)); NaN stays NaN.

    log1p(e) = e log(w) / (w - 1) with w = 1 + e rounded: the division takes the rounding of w out again.
    """
    e = tl.exp2(tl.abs(v) * -LOG2E)
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, LN2 * tl.log2(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(v > 0, v, v * 0.0) + log1p
