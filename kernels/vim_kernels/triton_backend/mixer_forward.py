"""What a Vim mixer does before its scan, in core Triton: its weights laid out; x_proj, dt_proj and softplus.

Shapes: q = 2 directions, rows of all sequences, d channels, n states, w taps. The projection has COLUMNS: B, C, the low
rank of dt and padding to a power of two; STATES is n and RANK_BLOCK the rank, padded to powers of two of at least 16,
the least that a product of tiles takes.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.elementary import LOG2E, softplus, softplus_coarse

DT_MAX = tl.constexpr(65504.0)  # the largest float16; exp(-65504 |A|) is 0 either way


@triton.jit
def weight_layout_kernel(
    A_log0_ptr, A_log1_ptr, conv0_ptr, conv1_ptr, bias0_ptr, bias1_ptr, x_proj0_ptr, x_proj1_ptr,
    dt_proj0_ptr, dt_proj1_ptr,
    rates_ptr, taps_ptr,  # (q, STATES, d), (q, w + 1, d), float32
    projections_ptr,  # (q, 2, COLUMNS, d): x_proj, then dt_proj transposed, 0 where a column is not of the low rank
    channels,
    N: tl.constexpr, STATES: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, directions). The weights as the other kernels read them: channels side by side.

    A_log (d, n) becomes -exp(A_log) log2(e), 0 beyond the n states; convolution (d, w) and bias (d,) taps, bias last.
    """
    direction = tl.program_id(1)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    ok = d < channels
    A_log_ptr = A_log0_ptr if direction == 0 else A_log1_ptr
    conv_ptr = conv0_ptr if direction == 0 else conv1_ptr
    bias_ptr = bias0_ptr if direction == 0 else bias1_ptr
    x_proj_ptr = x_proj0_ptr if direction == 0 else x_proj1_ptr
    dt_proj_ptr = dt_proj0_ptr if direction == 0 else dt_proj1_ptr
    real = ok[None, :] & (n < N)[:, None]
    rates = tl.load(A_log_ptr + d[None, :] * N + n[:, None], mask=real, other=0.0).to(tl.float32)
    rates = tl.where((n < N)[:, None], tl.exp(rates) * -LOG2E, 0.0)
    tl.store(rates_ptr + (direction * STATES + n[:, None]) * channels + d[None, :], rates, mask=ok[None, :])
    taps_ptr += direction * (WIDTH + 1) * channels
    for k in tl.static_range(WIDTH):
        tap = tl.load(conv_ptr + d * WIDTH + k, mask=ok, other=0.0)
        tl.store(taps_ptr + k * channels + d, tap.to(tl.float32), mask=ok)
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
    tl.store(taps_ptr + WIDTH * channels + d, bias, mask=ok)
    column = tl.arange(0, COLUMNS)
    rank = column - 2 * STATES
    is_rank = (rank >= 0) & (rank < RANK)
    row = tl.where(rank < 0, RANK + (column // STATES) * N + column % STATES, rank)
    used = tl.where(rank < 0, column % STATES < N, is_rank)
    x_proj = tl.load(x_proj_ptr + row[:, None] * channels + d[None, :], mask=used[:, None] & ok[None, :], other=0.0)
    dt_proj = tl.load(dt_proj_ptr + d[None, :] * RANK + rank[:, None], mask=is_rank[:, None] & ok[None, :], other=0.0)
    at = projections_ptr + (direction * 2 * COLUMNS + column[:, None]) * channels + d[None, :]
    tl.store(at, x_proj.to(projections_ptr.dtype.element_ty), mask=ok[None, :])
    tl.store(at + COLUMNS * channels, dt_proj.to(projections_ptr.dtype.element_ty), mask=ok[None, :])


@triton.jit
def projections_forward_kernel(
    u_ptr, projections_ptr, dt_bias0_ptr, dt_bias1_ptr,  # (q, rows, d), (q, 2, COLUMNS, d), (d,)
    dt_ptr, bc_ptr, low_ptr,  # (q, rows, d), (q, rows, 2 STATES) float32, (q, rows, RANK_BLOCK)
    gaps_ptr,  # (q, rows) float32, where GAPS: what dt is multiplied by
    rows, channels, u_direction, bc_direction, low_direction,
    GAPS: tl.constexpr, STORE_LOW: tl.constexpr, STATES: tl.constexpr, RANK_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, directions). B, C and dt of u. EVEN: no block of channels is cut short.

    The columns of B and C and those of the low rank are two tiles, since a tile has a power of two of columns.
    """
    direction = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, 2 * STATES)
    rank = tl.arange(0, RANK_BLOCK)
    dt_bias_ptr = dt_bias0_ptr if direction == 0 else dt_bias1_ptr
    here = (row < rows)[:, None]
    row = row.to(tl.int64)[:, None]
    u_ptr += direction * u_direction + row * channels
    dt_ptr += direction * u_direction + row * channels
    x_proj_ptr = projections_ptr + direction * 2 * COLUMNS * channels
    rank_proj_ptr = x_proj_ptr + 2 * STATES * channels
    dt_proj_ptr = rank_proj_ptr + COLUMNS * channels
    bc = tl.zeros([ROWS, 2 * STATES], tl.float32)
    low = tl.zeros([ROWS, RANK_BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        d = start + tl.arange(0, BLOCK)
        of_pair = x_proj_ptr + pair[None, :] * channels + d[:, None]
        of_rank = rank_proj_ptr + rank[None, :] * channels + d[:, None]
        if EVEN:
            u = tl.load(u_ptr + d[None, :], mask=here, other=0.0)
            pair_weight = tl.load(of_pair)
            rank_weight = tl.load(of_rank)
        else:
            ok = d < channels
            u = tl.load(u_ptr + d[None, :], mask=here & ok[None, :], other=0.0)
            pair_weight = tl.load(of_pair, mask=ok[:, None], other=0.0)
            rank_weight = tl.load(of_rank, mask=ok[:, None], other=0.0)
        u = u.to(DOT)
        bc = tl.dot(u, pair_weight.to(DOT), bc, input_precision=PRECISION)
        low = tl.dot(u, rank_weight.to(DOT), low, input_precision=PRECISION)
    tl.store(bc_ptr + direction * bc_direction + row * (2 * STATES) + pair[None, :], bc, mask=here)
    if STORE_LOW:
        low_at = low_ptr + direction * low_direction + row * RANK_BLOCK + rank[None, :]
        tl.store(low_at, low.to(low_ptr.dtype.element_ty), mask=here)
    low = low.to(DOT)
    if GAPS:
        gap = tl.load(gaps_ptr + direction * rows + row, mask=here, other=1.0)
    for start in range(0, channels, BLOCK):
        d = start + tl.arange(0, BLOCK)
        ok = d < channels
        if EVEN:
            weight = tl.load(dt_proj_ptr + rank[:, None] * channels + d[None, :])
        else:
            weight = tl.load(dt_proj_ptr + rank[:, None] * channels + d[None, :], mask=ok[None, :], other=0.0)
        v = tl.dot(low, weight.to(DOT), input_precision=PRECISION)
        v += tl.load(dt_bias_ptr + d, mask=ok, other=0.0).to(tl.float32)[None, :]
        if dt_ptr.dtype.element_ty == tl.float32:
            dt = softplus(v)
            if GAPS:
                dt = dt * gap
        else:
            dt = softplus_coarse(v, HARDWARE)
            if GAPS:
                dt = dt * gap
            dt = tl.minimum(dt, DT_MAX, propagate_nan=tl.PropagateNan.ALL)
        tl.store(dt_ptr + d[None, :], dt.to(dt_ptr.dtype.element_ty), mask=here if EVEN else here & ok[None, :])
