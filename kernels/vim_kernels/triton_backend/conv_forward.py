"""Forward kernels of the causal convolution, in core Triton: of one direction, and of a mixer's two at once.

Rows are the tokens of all sequences, one after the other. Two rows belong to one sequence where `segment` says so.
"""

# ruff: noqa: RUF005 - Triton's language has no starred tuples, and folds only plain `if`s on constants
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.elementary import LOG2E, reciprocal, sigmoid


@triton.jit
def segment(row, rows, segment_ptr, length, PACKED: tl.constexpr):
    """The sequence of a row; -1 outside of the rows."""
    inside = (row >= 0) & (row < rows)
    if PACKED:
        return tl.load(segment_ptr + row, mask=inside, other=-1)
    return tl.where(inside, row // length, -1)


@triton.jit
def conv_forward_kernel(
    x_ptr, x_stride, weight_ptr, bias_ptr, out_ptr, segment_ptr, rows, length, channels,
    SIGN: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of channels). Sum of weight[:, w - 1 - k] x[row - SIGN k] over k, and SiLU."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < channels
    sequence = segment(row, rows, segment_ptr, length, PACKED)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        source = row - SIGN * k
        here = (sequence >= 0) & (segment(source, rows, segment_ptr, length, PACKED) == sequence)
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
def _convolve_tile(
    x_ptr, x_stride, u_ptr, u_direction, taps, first, d, ok, rows, segment_ptr, length, channels,
    MASKED: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + STEPS - 1 of every group, in both directions; MASKED where a tap could cross a border.

    Every row is read once for all the rows and taps that it meets.
    """
    x = ()
    sequences = ()
    for i in tl.static_range(STEPS + 2 * (WIDTH - 1)):
        row = first + (i - (WIDTH - 1))
        inside = (row >= 0) & (row < rows)
        x = x + (
            tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + d[None, :], mask=inside[:, None] & ok, other=0.0),
        )
        if MASKED:
            sequences = sequences + (segment(row, rows, segment_ptr, length, PACKED),)
    for i in tl.static_range(STEPS):
        row = first + i
        at = row.to(tl.int64)[:, None] * channels + d[None, :]
        here = (row < rows)[:, None] & ok
        for direction in tl.static_range(2):
            v = taps[direction * (WIDTH + 1) + WIDTH]
            for k in tl.static_range(WIDTH):
                x_k = x[i + WIDTH - 1 + (2 * direction - 1) * k].to(tl.float32)
                if MASKED:
                    same = sequences[i + WIDTH - 1 + (2 * direction - 1) * k] == sequences[i + WIDTH - 1]
                    x_k = tl.where(same[:, None], x_k, 0.0)
                v = tl.fma(x_k, taps[direction * (WIDTH + 1) + WIDTH - 1 - k], v)
            u = v * reciprocal(1.0 + tl.exp2(v * -LOG2E), HARDWARE)
            tl.store(u_ptr + direction * u_direction + at, u.to(u_ptr.dtype.element_ty), mask=here)


@triton.jit
def mixer_conv_forward_kernel(
    x_ptr, x_stride, taps_ptr, u_ptr,  # (rows, d), (q, w + 1, d) float32, (q, rows, d)
    segment_ptr, rows, length, channels, u_direction,
    PACKED: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of GROUPS x STEPS rows, blocks of channels). Both convolutions and SiLU."""
    start = tl.program_id(0) * (GROUPS * STEPS)
    first = start + tl.arange(0, GROUPS) * STEPS
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = (d < channels)[None, :]
    taps = ()
    spread = tl.zeros([GROUPS, 1], tl.int32) + d[None, :]  # laid out as the tokens: no exchange between threads
    for i in tl.static_range(2 * (WIDTH + 1)):
        taps = taps + (tl.load(taps_ptr + i * channels + spread, mask=spread < channels, other=0.0),)
    before = segment(start - (WIDTH - 1), rows, segment_ptr, length, PACKED)
    behind = segment(start + GROUPS * STEPS + (WIDTH - 2), rows, segment_ptr, length, PACKED)
    if (before == behind) & (before >= 0):
        _convolve_tile(
            x_ptr, x_stride, u_ptr, u_direction, taps, first, d, ok, rows, segment_ptr, length, channels,
            False, PACKED, WIDTH, STEPS, HARDWARE,
        )  # fmt: skip
    else:
        _convolve_tile(
            x_ptr, x_stride, u_ptr, u_direction, taps, first, d, ok, rows, segment_ptr, length, channels,
            True, PACKED, WIDTH, STEPS, HARDWARE,
        )  # fmt: skip
