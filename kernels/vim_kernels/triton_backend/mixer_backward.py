"""Backward of x_proj and dt_proj of a Vim mixer, and the sums of its parameters' gradients, in core Triton.

The scan's backward hands over ddt, the gradient before softplus; dB and dC, in parts, one a block of channels; and du,
which lacks the path through x_proj. Three kernels take it from there, with p = [B, C, low rank of dt] = x_proj u:

1. `projections_backward_kernel`, row by row: dp = [sum of the parts, ddt dt_proj], du += dp x_proj in place.
2. `projection_sums_kernel`: dp^T u and low^T ddt, whose sums run over all rows. Each of a fixed number of programs sums
   the rows it has into a partial sum of its own.
3. `mixer_gradients_kernel`, after the convolution's backward: every partial sum of the layer, those of the scan and of
   the convolution, too, is summed and written as the gradient of the parameter.

Nothing is added with atomics, and every sum has a fixed order: the same bits every time.

Shapes as in `mixer_forward`: q directions, rows of all sequences, d channels, n states, r rank, w taps; STATES and
RANK_BLOCK are n and r, padded. dp has 2 STATES + RANK_BLOCK columns. Channels lie side by side in all partial sums.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.elementary import LN2


@triton.jit
def projections_backward_kernel(
    ddt_ptr, parts_ptr, projections_ptr,  # (q, rows, d), (q, parts, rows, 2 STATES) float32, (q, 2, COLUMNS, d)
    du_ptr, dprojected_ptr,  # (q, rows, d), added to; (q, rows, 2 STATES + RANK_BLOCK)
    rows, channels, parts, part_stride, u_direction,
    STATES: tl.constexpr, RANK_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, directions). AHEAD: parts loaded at a time. EVEN: no block of channels is cut short.

    The columns of B and C and those of the low rank are two tiles, since a tile has a power of two of columns.
    """
    direction = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = (row < rows)[:, None]
    row = row.to(tl.int64)[:, None]
    pair = tl.arange(0, 2 * STATES)
    rank = tl.arange(0, RANK_BLOCK)
    ddt_ptr += direction * u_direction + row * channels
    du_ptr += direction * u_direction + row * channels
    x_proj_ptr = projections_ptr + direction * 2 * COLUMNS * channels
    rank_proj_ptr = x_proj_ptr + 2 * STATES * channels
    dt_proj_ptr = rank_proj_ptr + COLUMNS * channels

    parts_ptr += direction * parts * part_stride + row * (2 * STATES) + pair[None, :]
    dbc = tl.zeros([ROWS, 2 * STATES], tl.float32)
    none = tl.zeros([1, 1], tl.int32)
    for first in range(0, parts, AHEAD):
        for k in tl.static_range(AHEAD):
            dbc += tl.load(parts_ptr, mask=here & (none + first + k < parts), other=0.0)
            parts_ptr += part_stride

    dlow = tl.zeros([ROWS, RANK_BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        d = start + tl.arange(0, BLOCK)
        if EVEN:
            ddt = tl.load(ddt_ptr + d[None, :], mask=here, other=0.0)
            weight = tl.load(dt_proj_ptr + rank[None, :] * channels + d[:, None])
        else:
            ok = d < channels
            ddt = tl.load(ddt_ptr + d[None, :], mask=here & ok[None, :], other=0.0)
            weight = tl.load(dt_proj_ptr + rank[None, :] * channels + d[:, None], mask=ok[:, None], other=0.0)
        dlow = tl.dot(ddt.to(DOT), weight.to(DOT), dlow, input_precision=PRECISION)

    dbc = dbc.to(dprojected_ptr.dtype.element_ty)
    dlow = dlow.to(dprojected_ptr.dtype.element_ty)
    dprojected_ptr += (direction * rows + row) * (2 * STATES + RANK_BLOCK)
    tl.store(dprojected_ptr + pair[None, :], dbc, mask=here)
    tl.store(dprojected_ptr + 2 * STATES + rank[None, :], dlow, mask=here)

    dbc = dbc.to(DOT)
    dlow = dlow.to(DOT)
    for start in range(0, channels, BLOCK):
        d = start + tl.arange(0, BLOCK)
        if EVEN:
            tile = here
            du = tl.load(du_ptr + d[None, :], mask=tile, other=0.0)
            pair_weight = tl.load(x_proj_ptr + pair[:, None] * channels + d[None, :])
            rank_weight = tl.load(rank_proj_ptr + rank[:, None] * channels + d[None, :])
        else:
            ok = (d < channels)[None, :]
            tile = here & ok
            du = tl.load(du_ptr + d[None, :], mask=tile, other=0.0)
            pair_weight = tl.load(x_proj_ptr + pair[:, None] * channels + d[None, :], mask=ok, other=0.0)
            rank_weight = tl.load(rank_proj_ptr + rank[:, None] * channels + d[None, :], mask=ok, other=0.0)
        through = tl.dot(dbc, pair_weight.to(DOT), input_precision=PRECISION)
        through = tl.dot(dlow, rank_weight.to(DOT), through, input_precision=PRECISION)
        tl.store(du_ptr + d[None, :], (du.to(tl.float32) + through).to(du_ptr.dtype.element_ty), mask=tile)


@triton.jit
def projection_sums_kernel(
    u_ptr, ddt_ptr,  # (q, rows, d)
    dprojected_ptr, low_ptr,  # (q, rows, 2 STATES + RANK_BLOCK), (q, rows, RANK_BLOCK)
    partial_ptr,  # (q, programs, 2 STATES + 2 RANK_BLOCK, d) float32: dp^T u, then low^T ddt
    rows, channels, u_direction,
    STATES: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, programs over rows, directions). A program takes every so many-th block, in order.

    Channels are the rows of the products, of which an instruction takes 64 at least; the columns are few.
    """
    direction = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = (d < channels)[None, :]
    pair = tl.arange(0, 2 * STATES)[None, :]
    rank = tl.arange(0, RANK_BLOCK)[None, :]
    u_ptr += direction * u_direction + d[None, :]
    ddt_ptr += direction * u_direction + d[None, :]
    dprojected_ptr += direction * rows * (2 * STATES + RANK_BLOCK)
    low_ptr += direction * rows * RANK_BLOCK
    of_pair = tl.zeros([BLOCK, 2 * STATES], tl.float32)
    of_rank = tl.zeros([BLOCK, RANK_BLOCK], tl.float32)
    of_dt = tl.zeros([BLOCK, RANK_BLOCK], tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = block * ROWS + tl.arange(0, ROWS)
        here = (row < rows)[:, None]
        row = row.to(tl.int64)[:, None]
        tile = here if EVEN else here & ok
        u = tl.load(u_ptr + row * channels, mask=tile, other=0.0)
        ddt = tl.load(ddt_ptr + row * channels, mask=tile, other=0.0)
        dprojected = dprojected_ptr + row * (2 * STATES + RANK_BLOCK)
        dbc = tl.load(dprojected + pair, mask=here, other=0.0)
        dlow = tl.load(dprojected + 2 * STATES + rank, mask=here, other=0.0)
        low = tl.load(low_ptr + row * RANK_BLOCK + rank, mask=here, other=0.0)
        u = tl.trans(u.to(DOT))
        of_pair = tl.dot(u, dbc.to(DOT), of_pair, input_precision=PRECISION)
        of_rank = tl.dot(u, dlow.to(DOT), of_rank, input_precision=PRECISION)
        of_dt = tl.dot(tl.trans(ddt.to(DOT)), low.to(DOT), of_dt, input_precision=PRECISION)
    program = direction * tl.num_programs(1) + tl.program_id(1)
    at = partial_ptr + program * (2 * STATES + 2 * RANK_BLOCK) * channels + d[:, None]
    ok = (d < channels)[:, None]
    tl.store(at + pair * channels, of_pair, mask=ok)
    tl.store(at + (2 * STATES + rank) * channels, of_rank, mask=ok)
    tl.store(at + (2 * STATES + RANK_BLOCK + rank) * channels, of_dt, mask=ok)


@triton.jit
def mixer_gradients_kernel(
    dprojections_ptr, drates_ptr, sums_ptr, taps_ptr,  # partial sums, float32: see below
    rates_ptr,  # (q, STATES, d) float32, A log2(e)
    conv0_ptr, conv1_ptr, bias0_ptr, bias1_ptr, x_proj0_ptr, x_proj1_ptr, dt_proj0_ptr, dt_proj1_ptr,
    dt_bias0_ptr, dt_bias1_ptr, A_log0_ptr, A_log1_ptr, D0_ptr, D1_ptr,  # gradients, filled; shapes as the parameters
    channels, projection_programs, chunks, convolution_programs,
    N: tl.constexpr, STATES: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    SKIP_WITH_TAPS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, 2 RANK + 3 N + 3 + WIDTH, directions). A program sums one number for every channel.

    The partial sums are dprojections (q, programs, 2 STATES + 2 RANK_BLOCK, d), drates (q, chunks, STATES, d), sums (q,
    chunks, 2, d) of D and dt, taps (q, programs, w + 1, d), the bias last, or behind it D where SKIP_WITH_TAPS. PARTS
    of them are loaded at a time, each lane keeps a sum of its own, and the lanes are summed at last.
    """
    number = tl.program_id(1)
    direction = tl.program_id(2)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = d < channels
    # the wanted numbers in this order: x_proj (r low rank, n B, n C), dt_proj r, A_log n, D, dt_bias, taps w, bias
    dt_proj = number - (RANK + 2 * N)
    state = dt_proj - RANK
    skip = state - N
    tap = skip - 2
    source_ptr = dprojections_ptr
    parts = projection_programs
    height = 2 * STATES + 2 * RANK_BLOCK
    index = 2 * STATES + number
    if number >= RANK:
        index = number - RANK
    if number >= RANK + N:
        index = number - RANK - N + STATES
    if dt_proj >= 0:
        index = 2 * STATES + RANK_BLOCK + dt_proj
    if state >= 0:
        source_ptr = drates_ptr
        parts = chunks
        height = STATES
        index = state
    if skip >= 0:
        source_ptr = sums_ptr
        height = 2
        index = skip
    if tap >= 0:
        source_ptr = taps_ptr
        parts = convolution_programs
        height = WIDTH + 1 + SKIP_WITH_TAPS
        index = tap
    if SKIP_WITH_TAPS & (skip == 0):
        source_ptr = taps_ptr
        parts = convolution_programs
        height = WIDTH + 2
        index = WIDTH + 1
    source_ptr += direction.to(tl.int64) * parts * height * channels + index * channels + d[None, :]
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = source_ptr + part.to(tl.int64)[:, None] * height * channels
        sums += tl.load(at, mask=(part < parts)[:, None] & ok[None, :], other=0.0)
    total = tl.sum(sums, axis=0)
    if dt_proj < 0:
        x_proj_ptr = x_proj0_ptr if direction == 0 else x_proj1_ptr
        tl.store(x_proj_ptr + number * channels + d, total.to(x_proj_ptr.dtype.element_ty), mask=ok)
    elif state < 0:
        dt_proj_ptr = dt_proj0_ptr if direction == 0 else dt_proj1_ptr
        tl.store(dt_proj_ptr + d * RANK + dt_proj, total.to(dt_proj_ptr.dtype.element_ty), mask=ok)
    elif skip < 0:
        # d/dA_log of A = -exp(A_log) is A; the sum is for A, the rates are A log2(e)
        A_log_ptr = A_log0_ptr if direction == 0 else A_log1_ptr
        rate = tl.load(rates_ptr + (direction * STATES + state) * channels + d, mask=ok, other=0.0)
        tl.store(A_log_ptr + d * N + state, (total * rate * LN2).to(A_log_ptr.dtype.element_ty), mask=ok)
    elif skip == 0:
        D_ptr = D0_ptr if direction == 0 else D1_ptr
        tl.store(D_ptr + d, total.to(D_ptr.dtype.element_ty), mask=ok)
    elif skip == 1:
        dt_bias_ptr = dt_bias0_ptr if direction == 0 else dt_bias1_ptr
        tl.store(dt_bias_ptr + d, total.to(dt_bias_ptr.dtype.element_ty), mask=ok)
    elif tap < WIDTH:
        conv_ptr = conv0_ptr if direction == 0 else conv1_ptr
        tl.store(conv_ptr + d * WIDTH + tap, total.to(conv_ptr.dtype.element_ty), mask=ok)
    else:
        bias_ptr = bias0_ptr if direction == 0 else bias1_ptr
        tl.store(bias_ptr + d, total.to(bias_ptr.dtype.element_ty), mask=ok)
