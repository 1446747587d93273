"""Kernels that work token by token: convolution, gate, softplus, decay rates, fused add and RMS norm. Core Triton.

Rows are the tokens of all sequences, one after the other. Two rows belong to one sequence where `segment` says so.
"""

# ruff: noqa: RUF005, RET505 - Triton's language has no starred tuples, and folds only plain `if`s on constants
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.scan_forward import LOG2E


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
def conv_kernel(
    x_ptr, x_stride, weight_ptr, bias_ptr, out_ptr, segment_ptr, rows, length, channels,
    SIGN: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of channels). Sum of weight[:, w - 1 - k] x[row - SIGN k] over k, and SiLU."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < channels
    own = segment(row, rows, segment_ptr, length, PACKED)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        source = row - SIGN * k
        here = (own >= 0) & (segment(source, rows, segment_ptr, length, PACKED) == own)
        x = tl.load(
            x_ptr + source.to(tl.int64)[:, None] * x_stride + d[None, :], mask=here[:, None] & ok[None, :], other=0.0
        )
        tap = tl.load(weight_ptr + d * WIDTH + (WIDTH - 1 - k), mask=ok, other=0.0)
        total += x.to(tl.float32) * tap.to(tl.float32)[None, :]
    if SILU:
        total = total * sigmoid(total)
    out = out_ptr + row.to(tl.int64)[:, None] * channels + d[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & ok[None, :])


@triton.jit
def _conv_backward_row(
    x, own, dx, dtaps, taps, bias, g,
    AT: tl.constexpr, SIGN: tl.constexpr, MASKED: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """(dx, dtaps) with what the gradient g of row AT adds to them; rows count as those of x, from WIDTH - 1 before."""
    met = ()
    for k in tl.static_range(WIDTH):
        x_k = x[AT - SIGN * k].to(tl.float32)
        if MASKED:
            x_k = tl.where((own[AT - SIGN * k] == own[AT])[:, None], x_k, 0.0)
        met = met + (x_k,)
    if SILU:
        v = bias
        for k in tl.static_range(WIDTH):
            v = tl.fma(met[k], taps[k], v)
        gate = reciprocal(1.0 + tl.exp2(v * -LOG2E), HARDWARE)
        g = g * gate * (1.0 + v * (1.0 - gate))
    if (AT >= WIDTH - 1) and (AT < STEPS + WIDTH - 1):
        sums = ()
        for k in tl.static_range(WIDTH):
            sums = sums + (tl.fma(g, met[k], dtaps[k]),)
        dtaps = sums + (dtaps[WIDTH] + g,)
    sums = ()
    for i in tl.static_range(STEPS):
        if (SIGN * (AT - WIDTH + 1 - i) >= 0) and (SIGN * (AT - WIDTH + 1 - i) < WIDTH):
            seen = g
            if MASKED:
                seen = tl.where((own[i + WIDTH - 1] == own[AT])[:, None], g, 0.0)
            sums = sums + (tl.fma(seen, taps[SIGN * (AT - WIDTH + 1 - i)], dx[i]),)
        else:
            sums = sums + (dx[i],)
    return sums, dtaps


@triton.jit
def _conv_backward_direction(
    x, own, dx, dtaps, taps, bias, du_ptr, first, ok, rows, channels,
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
            x, own, dx, dtaps, taps, bias, g.to(tl.float32),
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
    own = ()
    dx = ()
    for i in tl.static_range(STEPS + 2 * (WIDTH - 1)):
        row = first + (i - (WIDTH - 1))
        inside = (row >= 0) & (row < rows)
        x = x + (tl.load(x_ptr + (i - (WIDTH - 1)) * x_stride, mask=inside[:, None] & ok, other=0.0),)
        if MASKED:
            own = own + (segment(row, rows, segment_ptr, length, PACKED),)
    for _ in tl.static_range(STEPS):
        dx = dx + (tl.zeros([first.shape[0], d.shape[1]], tl.float32),)
    dx, dtaps0 = _conv_backward_direction(
        x, own, dx, dtaps0, taps0, bias0, du_ptr, first, ok, rows, channels,
        SIGN, MASKED, SILU, WIDTH, STEPS, HARDWARE,
    )  # fmt: skip
    if DIRECTIONS == 2:
        dx, dtaps1 = _conv_backward_direction(
            x, own, dx, dtaps1, taps1, bias1, du_ptr + u_direction, first, ok, rows, channels,
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
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)  # summed over rows at the end: in the loop threads would have to meet
    for i in range(0, blocks_of_rows):
        row = (i * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        tile = (row < rows)[:, None] & ok[None, :]
        at = row.to(tl.int64)[:, None] * channels + d[None, :]
        total = tl.load(total_ptr + at, mask=tile, other=0.0)
        g = tl.load(dnormed_ptr + at, mask=tile, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(total * total, axis=1) / channels + eps)
        unit = total * scale[:, None]
        dweight += g * unit
        g = g * weight[None, :]
        along = tl.sum(g * unit, axis=1) / channels
        dsum = (g - unit * along[:, None]) * scale[:, None]
        if HAS_DTOTAL:
            dsum += tl.load(dtotal_ptr + at, mask=tile, other=0.0)
        tl.store(dsum_ptr + at, dsum, mask=tile)
    tl.store(partial_ptr + tl.program_id(0) * channels + d, tl.sum(dweight, axis=0), mask=ok)
