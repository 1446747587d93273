"""Backward kernel of the causal convolution, in core Triton, of one direction or of a mixer's two at once.

Rows are the tokens of all sequences, one after the other. Two rows belong to one sequence where `conv_forward.segment`
says so.
"""

# ruff: noqa: RUF005 - Triton's language has no starred tuples, and folds only plain `if`s on constants
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.conv_forward import segment
from vim_kernels.triton_backend.elementary import LOG2E, reciprocal


@triton.jit
def _conv_backward_row(
    x, sequences, dx, dtaps, taps, bias, g,
    AT: tl.constexpr, SIGN: tl.constexpr, MASKED: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """(dx, dtaps) with what the gradient g of row AT adds to them; rows count as those of x, from WIDTH - 1 before."""
    inputs = ()
    for k in tl.static_range(WIDTH):
        x_k = x[AT - SIGN * k].to(tl.float32)
        if MASKED:
            x_k = tl.where((sequences[AT - SIGN * k] == sequences[AT])[:, None], x_k, 0.0)
        inputs = inputs + (x_k,)
    if SILU:
        v = bias
        for k in tl.static_range(WIDTH):
            v = tl.fma(inputs[k], taps[k], v)
        gate = reciprocal(1.0 + tl.exp2(v * -LOG2E), HARDWARE)
        g = g * gate * (1.0 + v * (1.0 - gate))
    if (AT >= WIDTH - 1) and (AT < STEPS + WIDTH - 1):
        sums = ()
        for k in tl.static_range(WIDTH):
            sums = sums + (tl.fma(g, inputs[k], dtaps[k]),)
        dtaps = sums + (dtaps[WIDTH] + g,)
    sums = ()
    for i in tl.static_range(STEPS):
        if (SIGN * (AT - WIDTH + 1 - i) >= 0) and (SIGN * (AT - WIDTH + 1 - i) < WIDTH):
            masked_g = g
            if MASKED:
                masked_g = tl.where((sequences[i + WIDTH - 1] == sequences[AT])[:, None], g, 0.0)
            sums = sums + (tl.fma(masked_g, taps[SIGN * (AT - WIDTH + 1 - i)], dx[i]),)
        else:
            sums = sums + (dx[i],)
    return sums, dtaps


@triton.jit
def _conv_backward_direction(
    x, sequences, dx, dtaps, taps, bias, du_ptr, first, ok, rows, channels,
    SIGN: tl.constexpr, MASKED: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """(dx, dtaps) with what one direction adds to them.

    What du is before the activation is computed again for WIDTH - 1 rows beside a group, which its dx sees too.
    """
    for j in tl.static_range(STEPS + WIDTH - 1):
        row = first + (j if SIGN == 1 else j - (WIDTH - 1))
        inside = (row >= 0) & (row < rows)
        behind = (j if SIGN == 1 else j - (WIDTH - 1)) * channels
        g = tl.load(du_ptr + behind, mask=inside[:, None] & ok, other=0.0)
        dx, dtaps = _conv_backward_row(
            x, sequences, dx, dtaps, taps, bias, g.to(tl.float32),
            j + WIDTH - 1 if SIGN == 1 else j, SIGN, MASKED, SILU, WIDTH, STEPS, HARDWARE,
        )  # fmt: skip
    return dx, dtaps


@triton.jit
def _conv_backward_tile(
    x_ptr, x_stride, du_ptr, u_direction, dx_ptr, dx_stride, taps0, taps1, bias0, bias1, dtaps0, dtaps1,
    first, d, ok, rows, segment_ptr, length, channels,
    MASKED: tl.constexpr, DIRECTIONS: tl.constexpr, SIGN: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Fill dx of rows first .. first + STEPS - 1 of every group; returns the sums for the taps with their part added.

    MASKED where a tap could cross a border. Every row is read once for all the rows and taps that it meets.
    """
    x_ptr += first.to(tl.int64)[:, None] * x_stride + d
    du_ptr += first.to(tl.int64)[:, None] * channels + d
    dx_ptr += first.to(tl.int64)[:, None] * dx_stride + d
    x = ()
    sequences = ()
    dx = ()
    for i in tl.static_range(STEPS + 2 * (WIDTH - 1)):
        row = first + (i - (WIDTH - 1))
        inside = (row >= 0) & (row < rows)
        x = x + (tl.load(x_ptr + (i - (WIDTH - 1)) * x_stride, mask=inside[:, None] & ok, other=0.0),)
        if MASKED:
            sequences = sequences + (segment(row, rows, segment_ptr, length, PACKED),)
    for _ in tl.static_range(STEPS):
        dx = dx + (tl.zeros([first.shape[0], d.shape[1]], tl.float32),)
    dx, dtaps0 = _conv_backward_direction(
        x, sequences, dx, dtaps0, taps0, bias0, du_ptr, first, ok, rows, channels,
        SIGN, MASKED, SILU, WIDTH, STEPS, HARDWARE,
    )  # fmt: skip
    if DIRECTIONS == 2:
        dx, dtaps1 = _conv_backward_direction(
            x, sequences, dx, dtaps1, taps1, bias1, du_ptr + u_direction, first, ok, rows, channels,
            -SIGN, MASKED, SILU, WIDTH, STEPS, HARDWARE,
        )  # fmt: skip
    for i in tl.static_range(STEPS):
        row = first + i
        tl.store(dx_ptr + i * dx_stride, dx[i].to(dx_ptr.dtype.scalar.element_ty), mask=(row < rows)[:, None] & ok)
    return dtaps0, dtaps1


@triton.jit
def _taps(weight_ptr, bias_ptr, d, ok, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr):
    """Taps, the one that meets the token itself first; the bias; a zero for each."""
    taps = ()
    zeros = ()
    bias = tl.zeros(d.shape, tl.float32)
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight_ptr + d * WIDTH + (WIDTH - 1 - k), mask=ok, other=0.0).to(tl.float32),)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    for _ in tl.static_range(WIDTH + 1):
        zeros = zeros + (tl.zeros(d.shape, tl.float32),)
    return taps, bias, zeros


@triton.jit
def _store_sums(partial_ptr, dtaps, d, channels, WIDTH: tl.constexpr):
    """Sums over the groups of a program, (w + 1, d), in the order of the weights, the bias last."""
    for k in tl.static_range(WIDTH):
        tl.store(partial_ptr + (WIDTH - 1 - k) * channels + d, tl.sum(dtaps[k], axis=0), mask=d < channels)
    tl.store(partial_ptr + WIDTH * channels + d, tl.sum(dtaps[WIDTH], axis=0), mask=d < channels)


@triton.jit
def conv_backward_kernel(
    x_ptr, x_stride, weight0_ptr, weight1_ptr, bias0_ptr, bias1_ptr, du_ptr, dx_ptr, dx_stride, partial_ptr,
    segment_ptr, rows, length, channels, u_direction,
    DIRECTIONS: tl.constexpr, SIGN: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid (programs over rows, blocks of channels). The gradient of x (rows, d), any row stride, and of the taps.

    du (q, rows, d). SIGN is 1 where direction 0 looks back, -1 where it looks ahead. partial (q, programs, w + 1, d):
    sums for the taps, then the bias. A program takes every so many-th block of GROUPS x STEPS rows, in order, so that
    the sums are the same in every run.
    """
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    spread = tl.zeros([GROUPS, 1], tl.int32) + d[None, :]  # laid out as the tokens: no exchange between threads
    ok = spread < channels
    taps0, bias0, dtaps0 = _taps(weight0_ptr, bias0_ptr, spread, ok, HAS_BIAS, WIDTH)
    taps1, bias1, dtaps1 = taps0, bias0, dtaps0
    if DIRECTIONS == 2:
        taps1, bias1, dtaps1 = _taps(weight1_ptr, bias1_ptr, spread, ok, HAS_BIAS, WIDTH)
    for block in range(tl.program_id(0), tl.cdiv(rows, GROUPS * STEPS), tl.num_programs(0)):
        start = block * (GROUPS * STEPS)
        first = start + tl.arange(0, GROUPS) * STEPS
        before = segment(start - (WIDTH - 1), rows, segment_ptr, length, PACKED)
        behind = segment(start + GROUPS * STEPS + (WIDTH - 2), rows, segment_ptr, length, PACKED)
        if (before == behind) & (before >= 0):
            dtaps0, dtaps1 = _conv_backward_tile(
                x_ptr, x_stride, du_ptr, u_direction, dx_ptr, dx_stride, taps0, taps1, bias0, bias1, dtaps0, dtaps1,
                first, spread, ok, rows, segment_ptr, length, channels,
                False, DIRECTIONS, SIGN, SILU, PACKED, WIDTH, STEPS, HARDWARE,
            )  # fmt: skip
        else:
            dtaps0, dtaps1 = _conv_backward_tile(
                x_ptr, x_stride, du_ptr, u_direction, dx_ptr, dx_stride, taps0, taps1, bias0, bias1, dtaps0, dtaps1,
                first, spread, ok, rows, segment_ptr, length, channels,
                True, DIRECTIONS, SIGN, SILU, PACKED, WIDTH, STEPS, HARDWARE,
            )  # fmt: skip
    partial_ptr += tl.program_id(0) * (WIDTH + 1) * channels
    _store_sums(partial_ptr, dtaps0, d, channels, WIDTH)
    if DIRECTIONS == 2:
        _store_sums(partial_ptr + tl.num_programs(0) * (WIDTH + 1) * channels, dtaps1, d, channels, WIDTH)
