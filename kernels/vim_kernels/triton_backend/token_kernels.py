"""Kernels that work token by token: convolution, gate, softplus, decay rates, fused add and RMS norm. Core Triton.

Rows are the tokens of all sequences, one after the other. Two rows belong to one sequence where `segment` says so.
"""

# ruff: noqa: RUF005, RET505 - Triton's language has no starred tuples, and folds only plain `if`s on constants
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.forward_kernels import LOG2E


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
    log1p = tl.where(e < 0.03125, series, 0.6931471805599453 * log2)
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p


@triton.jit
def softplus(v):
    """log(1 + exp(v)) = max(v, 0) + log1p(exp(-|v|)); NaN stays NaN.

    log1p(e) = e log(w) / (w - 1) with w = 1 + e rounded: the division takes the rounding of w out again.
    """
    e = tl.exp2(tl.abs(v) * -LOG2E)
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, 0.6931471805599453 * tl.log2(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(v > 0, v, v * 0.0) + log1p


@triton.jit
def segment(row, rows, segment_ptr, length, PACKED: tl.constexpr):
    """The sequence of a row; -1 outside of the rows."""
    inside = (row >= 0) & (row < rows)
    if PACKED:
        return tl.load(segment_ptr + row, mask=inside, other=-1)
    return tl.where(inside, row // length, -1)


@triton.jit
def convolve(
    x_ptr, x_stride, weight_ptr, bias_ptr, row, own, d, ok, sign, rows, segment_ptr, length,
    HAS_BIAS: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(rows of the tile, channels of the tile): sum of weight[:, w - 1 - k] x[row - sign k] over k, in float32."""
    total = tl.zeros([row.shape[0], d.shape[0]], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        source = row - sign * k
        here = (own >= 0) & (segment(source, rows, segment_ptr, length, PACKED) == own)
        x = tl.load(
            x_ptr + source.to(tl.int64)[:, None] * x_stride + d[None, :], mask=here[:, None] & ok[None, :], other=0.0
        )
        tap = tl.load(weight_ptr + d * WIDTH + (WIDTH - 1 - k), mask=ok, other=0.0)
        total += x.to(tl.float32) * tap.to(tl.float32)[None, :]
    return total


@triton.jit
def conv_kernel(
    x_ptr, x_stride, x_direction, weight0_ptr, weight1_ptr, bias_ptr, out_ptr, out_stride,
    segment_ptr, rows, length, channels,
    DIRECTIONS: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of channels). The sum of one or both directions' convolutions (q, rows, d)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < channels
    own = segment(row, rows, segment_ptr, length, PACKED)
    total = convolve(
        x_ptr, x_stride, weight0_ptr, bias_ptr, row, own, d, ok, -1 if REVERSE else 1, rows, segment_ptr, length,
        HAS_BIAS, PACKED, WIDTH,
    )  # fmt: skip
    if DIRECTIONS == 2:
        total += convolve(
            x_ptr + x_direction, x_stride, weight1_ptr, bias_ptr, row, own, d, ok, 1 if REVERSE else -1,
            rows, segment_ptr, length, HAS_BIAS, PACKED, WIDTH,
        )  # fmt: skip
    if SILU:
        total = total * sigmoid(total)
    out = out_ptr + row.to(tl.int64)[:, None] * out_stride + d[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & ok[None, :])


@triton.jit
def conv_backward_kernel(
    x_ptr, x_stride, weight0_ptr, weight1_ptr, bias0_ptr, bias1_ptr, du_ptr, g_ptr, partial_ptr,
    segment_ptr, rows, length, channels, u_direction, blocks_of_rows,
    REVERSE: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (programs over rows, blocks of channels, directions). The gradient before the activation, and of the taps.

    du, g (q, rows, d), may be one buffer. partial (q, programs, w + 1, d): sums for the taps, then the bias. A program
    takes every so many-th block of rows, in order, so that the sums are the same in every run.
    """
    direction = tl.program_id(2)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < channels
    sign = tl.where((direction == 1) != REVERSE, -1, 1)
    weight_ptr = weight0_ptr if direction == 0 else weight1_ptr
    bias_ptr = bias0_ptr if direction == 0 else bias1_ptr
    du_ptr += direction * u_direction
    g_ptr += direction * u_direction
    partial_ptr += (direction * tl.num_programs(0) + tl.program_id(0)) * (WIDTH + 1) * channels
    taps = ()
    dtaps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight_ptr + d * WIDTH + (WIDTH - 1 - k), mask=ok, other=0.0).to(tl.float32),)
        dtaps = dtaps + (tl.zeros([ROWS, BLOCK], tl.float32),)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    for i in range(0, blocks_of_rows):
        row = (i * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        own = segment(row, rows, segment_ptr, length, PACKED)
        tile = (row < rows)[:, None] & ok[None, :]
        at = row.to(tl.int64)[:, None] * channels + d[None, :]
        g = tl.load(du_ptr + at, mask=tile, other=0.0).to(tl.float32)
        v = bias[None, :] + tl.zeros([ROWS, BLOCK], tl.float32)
        x_k = ()
        for k in tl.static_range(WIDTH):
            source = row - sign * k
            here = (own >= 0) & (segment(source, rows, segment_ptr, length, PACKED) == own)
            x = tl.load(
                x_ptr + source.to(tl.int64)[:, None] * x_stride + d[None, :],
                mask=here[:, None] & ok[None, :],
                other=0.0,
            ).to(tl.float32)
            v += x * taps[k][None, :]
            x_k = x_k + (x,)
        if SILU:
            gate = sigmoid(v)
            g = g * gate * (1.0 + v * (1.0 - gate))
            tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=tile)
        sums = ()
        for k in tl.static_range(WIDTH):
            sums = sums + (dtaps[k] + g * x_k[k],)
        dtaps = sums
        dbias += g
    for k in tl.static_range(WIDTH):
        tl.store(partial_ptr + (WIDTH - 1 - k) * channels + d, tl.sum(dtaps[k], axis=0), mask=ok)
    tl.store(partial_ptr + WIDTH * channels + d, tl.sum(dbias, axis=0), mask=ok)


@triton.jit
def softplus_kernel(
    dt_ptr, bias_ptr, out_ptr, rows, channels, dt_stride,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of channels). softplus(dt + bias) (rows, d), in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < channels
    tile = (row < rows)[:, None] & ok[None, :]
    v = tl.load(dt_ptr + row.to(tl.int64)[:, None] * dt_stride + d[None, :], mask=tile, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        v = softplus(v)
    at = row.to(tl.int64)[:, None] * channels + d[None, :]
    tl.store(out_ptr + at, v.to(out_ptr.dtype.element_ty), mask=tile)


@triton.jit
def gate_backward_kernel(
    dout_ptr, z_ptr, ungated_ptr, dy_ptr, dz_ptr, rows, channels, z_stride, dz_stride,
    GATE: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of channels). out = SCALE y silu(z): dy, and dz from the saved y (rows, d)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile = (row < rows)[:, None] & (d < channels)[None, :]
    row = row.to(tl.int64)
    at = row[:, None] * channels + d[None, :]
    dy = SCALE * tl.load(dout_ptr + at, mask=tile, other=0.0).to(tl.float32)
    if GATE:
        z = tl.load(z_ptr + row[:, None] * z_stride + d[None, :], mask=tile, other=0.0).to(tl.float32)
        y = tl.load(ungated_ptr + at, mask=tile, other=0.0).to(tl.float32)
        gate = sigmoid(z)
        dz = dy * y * gate * (1.0 + z * (1.0 - gate))
        tl.store(dz_ptr + row[:, None] * dz_stride + d[None, :], dz.to(dz_ptr.dtype.element_ty), mask=tile)
        dy = dy * z * gate
    tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=tile)


@triton.jit
def add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, rows, channels, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows,). BLOCK >= channels. total = residual + x, float32; normed = total / rms(total) weight."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    ok = d < channels
    tile = (row < rows)[:, None] & ok[None, :]
    at = row.to(tl.int64)[:, None] * channels + d[None, :]
    total = tl.load(x_ptr + at, mask=tile, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=tile, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(total * total, axis=1) / channels + eps)
    weight = tl.load(weight_ptr + d, mask=ok, other=0.0).to(tl.float32)
    normed = total * scale[:, None] * weight[None, :]
    tl.store(total_ptr + at, total, mask=tile)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=tile)


@triton.jit
def add_rms_norm_backward_kernel(
    dnormed_ptr, dtotal_ptr, total_ptr, weight_ptr, dsum_ptr, partial_ptr, rows, channels, eps, blocks_of_rows,
    HAS_DTOTAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (programs,). Gradient (rows, d) of x + residual, and partial (programs, d) sums for the weight."""
    d = tl.arange(0, BLOCK)
    ok = d < channels
    weight = tl.load(weight_ptr + d, mask=ok, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for i in range(0, blocks_of_rows):
        row = (i * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        tile = (row < rows)[:, None] & ok[None, :]
        at = row.to(tl.int64)[:, None] * channels + d[None, :]
        total = tl.load(total_ptr + at, mask=tile, other=0.0)
        g = tl.load(dnormed_ptr + at, mask=tile, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(total * total, axis=1) / channels + eps)
        unit = total * scale[:, None]
        dweight += tl.sum(g * unit, axis=0)
        g = g * weight[None, :]
        along = tl.sum(g * unit, axis=1) / channels
        dsum = (g - unit * along[:, None]) * scale[:, None]
        if HAS_DTOTAL:
            dsum += tl.load(dtotal_ptr + at, mask=tile, other=0.0)
        tl.store(dsum_ptr + at, dsum, mask=tile)
    tl.store(partial_ptr + tl.program_id(0) * channels + d, dweight, mask=ok)
