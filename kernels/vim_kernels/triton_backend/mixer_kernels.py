"""What a Vim mixer does before its scan, in one core-Triton kernel: convolution, SiLU, x_proj, dt_proj, softplus."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.token_kernels import convolve, segment, sigmoid, softplus, softplus_coarse

DT_MAX = tl.constexpr(65504.0)  # the largest float16; exp(-65504 |A|) is 0 either way


@triton.jit
def _project(u, weight_ptr, first, r, wanted, d, ok, channels, total, PRECISION: tl.constexpr):
    """Total (rows, columns) + u (rows, d) times rows `first + r` of the weight (r + 2 n, d), transposed."""
    weight = tl.load(
        weight_ptr + (first + r)[None, :] * channels + d[:, None], mask=(r < wanted)[None, :] & ok[:, None], other=0.0
    )
    return tl.dot(u, weight.to(u.dtype), total, input_precision=PRECISION)


@triton.jit
def mixer_inputs_kernel(
    x_ptr, x_stride,
    conv0_ptr, conv1_ptr, bias0_ptr, bias1_ptr, x_proj0_ptr, x_proj1_ptr, dt_proj0_ptr, dt_proj1_ptr,
    dt_bias0_ptr, dt_bias1_ptr,
    u_ptr, dt_ptr, bc_ptr, low_ptr,  # (2, rows, d), (2, rows, d), (2, rows, 2 STATES) float32, (2, rows, RANK_BLOCK)
    segment_ptr, rows, length, channels, u_direction, bc_direction, low_direction,
    HAS_BIAS: tl.constexpr, PACKED: tl.constexpr, STORE_LOW: tl.constexpr, WIDTH: tl.constexpr,
    N: tl.constexpr, STATES: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid (directions, blocks of rows): both directions of a block of rows run together and share its x in the cache.

    STATES is n padded to a power of two of at least 16, the least that a product of tiles takes; the padding is 0.
    """
    direction = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, STATES)
    r = tl.arange(0, RANK_BLOCK)
    sign = tl.where(direction == 1, -1, 1)
    conv_ptr = conv0_ptr if direction == 0 else conv1_ptr
    bias_ptr = bias0_ptr if direction == 0 else bias1_ptr
    x_proj_ptr = x_proj0_ptr if direction == 0 else x_proj1_ptr
    dt_proj_ptr = dt_proj0_ptr if direction == 0 else dt_proj1_ptr
    dt_bias_ptr = dt_bias0_ptr if direction == 0 else dt_bias1_ptr
    own = segment(row, rows, segment_ptr, length, PACKED)
    here = row < rows
    wide_row = row.to(tl.int64)
    low = tl.zeros([ROWS, RANK_BLOCK], tl.float32)
    B = tl.zeros([ROWS, STATES], tl.float32)
    C = tl.zeros([ROWS, STATES], tl.float32)
    for start in range(0, channels, BLOCK):
        d = start + tl.arange(0, BLOCK)
        ok = d < channels
        u = convolve(
            x_ptr, x_stride, conv_ptr, bias_ptr, row, own, d, ok, sign, rows, segment_ptr, length,
            HAS_BIAS, PACKED, WIDTH,
        )  # fmt: skip
        u = u * sigmoid(u)
        at = wide_row[:, None] * channels + d[None, :]
        tile = here[:, None] & ok[None, :]
        tl.store(u_ptr + direction * u_direction + at, u.to(u_ptr.dtype.element_ty), mask=tile)
        u = tl.where(ok[None, :], u, 0.0).to(DOT)
        low = _project(u, x_proj_ptr, 0, r, RANK, d, ok, channels, low, PRECISION)
        B = _project(u, x_proj_ptr, RANK, n, N, d, ok, channels, B, PRECISION)
        C = _project(u, x_proj_ptr, RANK + N, n, N, d, ok, channels, C, PRECISION)
    bc = bc_ptr + direction * bc_direction + wide_row[:, None] * (2 * STATES) + n[None, :]
    tl.store(bc, B, mask=here[:, None])
    tl.store(bc + STATES, C, mask=here[:, None])
    if STORE_LOW:
        kept = low_ptr + direction * low_direction + wide_row[:, None] * RANK_BLOCK + r[None, :]
        tl.store(kept, low.to(low_ptr.dtype.element_ty), mask=here[:, None])
    low = low.to(DOT)
    for start in range(0, channels, BLOCK):
        d = start + tl.arange(0, BLOCK)
        ok = d < channels
        weight = tl.load(
            dt_proj_ptr + d[None, :] * RANK + r[:, None], mask=(r < RANK)[:, None] & ok[None, :], other=0.0
        )
        v = tl.dot(low, weight.to(DOT), input_precision=PRECISION)
        v += tl.load(dt_bias_ptr + d, mask=ok, other=0.0).to(tl.float32)[None, :]
        if dt_ptr.dtype.element_ty == tl.float32:
            dt = softplus(v)
        else:
            dt = softplus_coarse(v, HARDWARE)
            dt = tl.where(dt > DT_MAX, DT_MAX, dt)
        at = wide_row[:, None] * channels + d[None, :]
        tl.store(
            dt_ptr + direction * u_direction + at,
            dt.to(dt_ptr.dtype.element_ty),
            mask=here[:, None] & ok[None, :],
        )
