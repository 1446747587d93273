"""The pooled scan token by token, forward, in core Triton: convolution and sums of lines; skip, norm and gate.

Shapes: q = 2 directions, rows of all sequences, d channels, w taps. A program takes LINES lines at a time, lanes of its
tiles, and STEPS tokens of each; `position` counts tokens in scan order, `row` says where they lie. What is convolved is
never stored: it is made again where it is needed, for half of the bytes.
"""

# ruff: noqa: RUF005, RET505 - Triton's language has no starred tuples, and folds only plain `if`s on constants
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.elementary import LOG2E, reciprocal


@triton.jit
def line_bounds(
    line, lines, starts_ptr, sequence_ptr, cu_lines_ptr, lines_per_sequence, length, PACKED: tl.constexpr
):  # fmt: skip
    """First position and end of lines, 0 and 0 beyond the last; the same of the sequences that they are part of."""
    here = line < lines
    start = tl.load(starts_ptr + line, mask=here, other=0)
    stop = tl.load(starts_ptr + line + 1, mask=here, other=0)
    if PACKED:
        behind = tl.load(sequence_ptr + line, mask=here, other=1)  # the number of the sequence, and one more
        first = tl.load(starts_ptr + tl.load(cu_lines_ptr + behind - 1))
        last = tl.load(starts_ptr + tl.load(cu_lines_ptr + behind))
    else:
        first = line // lines_per_sequence * length
        last = first + length
    return start, stop, first, tl.where(here, last, 0)


@triton.jit
def row_of(position, inside, order_ptr, ORDERED: tl.constexpr):
    """The row where the token at a position lies."""
    if ORDERED:
        return tl.load(order_ptr + position, mask=inside, other=0).to(tl.int64)
    else:
        return position.to(tl.int64)


@triton.jit
def both_taps(taps_ptr, channels, d, ok, WIDTH: tl.constexpr):
    """Taps and bias of both directions, one after the other."""
    taps = ()
    for i in tl.static_range(2 * (WIDTH + 1)):
        taps = taps + (tl.load(taps_ptr + i * channels + d, mask=ok, other=0.0),)
    return taps


@triton.jit
def rows_of(ptr, stride, at, first, last, d, ok, order_ptr, ORDERED: tl.constexpr, COUNT: tl.constexpr):
    """Rows of positions at .. at + COUNT - 1 as they lie, zeros outside of first .. last - 1."""
    rows = ()
    for i in tl.static_range(COUNT):
        inside = (at + i >= first) & (at + i < last)
        row = row_of(at + i, inside, order_ptr, ORDERED)
        rows = rows + (tl.load(ptr + row[:, None] * stride + d, mask=inside[:, None] & ok, other=0.0),)
    return rows


@triton.jit
def floats(rows):
    """The rows in float32."""
    converted = ()
    for i in tl.static_range(len(rows)):
        converted = converted + (rows[i].to(tl.float32),)
    return converted


@triton.jit
def behind_of(x, WIDTH: tl.constexpr):
    """The last 2 (WIDTH - 1) of the rows: the first ones that the next positions meet."""
    rows = ()
    for i in tl.static_range(2 * (WIDTH - 1)):
        rows = rows + (x[len(x) - 2 * (WIDTH - 1) + i],)
    return rows


@triton.jit
def convolved(x, taps, WIDTH: tl.constexpr, STEPS: tl.constexpr, HARDWARE: tl.constexpr):
    """U of STEPS positions in direction 0, then in direction 1; of x, rows from WIDTH - 1 before to as many behind."""
    u = ()
    for direction in tl.static_range(2):
        for i in tl.static_range(STEPS):
            v = taps[direction * (WIDTH + 1) + WIDTH]
            for k in tl.static_range(WIDTH):
                x_k = x[i + WIDTH - 1 + (2 * direction - 1) * k]
                v = tl.fma(x_k, taps[direction * (WIDTH + 1) + WIDTH - 1 - k], v)
            u = u + (v * reciprocal(1.0 + tl.exp2(v * -LOG2E), HARDWARE),)
    return u


@triton.jit(do_not_specialize=["lines", "lines_per_sequence", "length"])
def pooled_lines_kernel(
    x_ptr, x_stride, taps_ptr, pooled_ptr,  # (rows, d), (q, w + 1, d) float32, (q, lines, d)
    starts_ptr, weights_ptr, order_ptr, sequence_ptr, cu_lines_ptr, lines, lines_per_sequence, length, channels,
    line_direction,
    ORDERED: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, blocks of lines). Both convolutions, SiLU and the weighted sums over lines."""
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    d = tl.zeros([LINES, 1], tl.int32) + (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    ok = d < channels
    start, stop, first, last = line_bounds(
        line, lines, starts_ptr, sequence_ptr, cu_lines_ptr, lines_per_sequence, length, PACKED
    )
    taps = both_taps(taps_ptr, channels, d, ok, WIDTH)
    end = tl.minimum(last, stop + (WIDTH - 1))  # no token behind is met
    sum0 = tl.zeros([LINES, BLOCK], tl.float32)
    sum1 = tl.zeros([LINES, BLOCK], tl.float32)
    x = floats(rows_of(x_ptr, x_stride, start - (WIDTH - 1), first, end, d, ok, order_ptr, ORDERED, 2 * (WIDTH - 1)))
    ahead = rows_of(x_ptr, x_stride, start + (WIDTH - 1), first, end, d, ok, order_ptr, ORDERED, STEPS)
    for step in range(0, tl.max(stop - start), STEPS):
        new = floats(ahead)
        ahead = rows_of(
            x_ptr, x_stride, start + step + STEPS + (WIDTH - 1), first, end, d, ok, order_ptr, ORDERED, STEPS
        )
        u = convolved(x + new, taps, WIDTH, STEPS, HARDWARE)
        x = behind_of(x + new, WIDTH)
        for i in tl.static_range(STEPS):
            here = (start + step + i < stop)[:, None]
            sum0 += tl.where(here, u[i], 0.0)
            sum1 += tl.where(here, u[STEPS + i], 0.0)
    weight = tl.load(weights_ptr + line, mask=line < lines, other=0.0)[:, None]
    at = pooled_ptr + line.to(tl.int64)[:, None] * channels + d
    here = (line < lines)[:, None] & ok
    tl.store(at, (sum0 * weight).to(pooled_ptr.dtype.element_ty), mask=here)
    tl.store(at + line_direction, (sum1 * weight).to(pooled_ptr.dtype.element_ty), mask=here)


@triton.jit
def of_line(taps_ptr, skip0_ptr, skip1_ptr, y_ptr, line, lines, d, ok, channels, WIDTH: tl.constexpr):
    """What the tokens of a line have in common: taps, half of D of both directions, and y."""
    taps = both_taps(taps_ptr, channels, d, ok, WIDTH)
    skip0 = 0.5 * tl.load(skip0_ptr + d, mask=ok, other=0.0).to(tl.float32)
    skip1 = 0.5 * tl.load(skip1_ptr + d, mask=ok, other=0.0).to(tl.float32)
    here = (line < lines)[:, None] & ok
    return taps, skip0, skip1, tl.load(y_ptr + line.to(tl.int64)[:, None] * channels + d, mask=here, other=0.0)


@triton.jit
def summed(x, common, WIDTH: tl.constexpr, STEPS: tl.constexpr, HARDWARE: tl.constexpr):
    """What comes before norm and gate, of STEPS positions: y of the line and skips, the mean of both directions."""
    u = convolved(x, common[0], WIDTH, STEPS, HARDWARE)
    sums = ()
    for i in tl.static_range(STEPS):
        sums = sums + (tl.fma(common[2], u[STEPS + i], tl.fma(common[1], u[i], common[3])),)
    return sums


@triton.jit
def fast_sigmoid(v, HARDWARE: tl.constexpr):
    """exp2 overflows to inf for very negative v, and 1 / inf is the right 0."""
    return reciprocal(1.0 + tl.exp2(v * -LOG2E), HARDWARE)


@triton.jit(do_not_specialize=["lines", "lines_per_sequence", "length"])
def pooled_output_kernel(
    xz_ptr, xz_stride, taps_ptr, skip0_ptr, skip1_ptr, y_ptr,  # (rows, 2 d), (q, w + 1, d) float32, (d,), (lines, d)
    norm_weight_ptr, norm_bias_ptr, out_ptr, stats_ptr,  # (d,), (rows, d), (rows, 2) float32: mean, 1 / deviation
    starts_ptr, order_ptr, sequence_ptr, cu_lines_ptr, lines, lines_per_sequence, length, channels, eps,
    NORM: tl.constexpr, ORDERED: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels; 1 with NORM, blocks of lines). Fills `out`, and with NORM the statistics of rows.

    With NORM a program takes all channels of its tokens, once for the statistics, which leaves in `out` what is to be
    normalised, and once more for the output.
    """
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    start, stop, first, last = line_bounds(
        line, lines, starts_ptr, sequence_ptr, cu_lines_ptr, lines_per_sequence, length, PACKED
    )
    last = tl.minimum(last, stop + (WIDTH - 1))
    lane = tl.zeros([LINES, 1], tl.int32) + tl.arange(0, BLOCK)[None, :]
    dtype = out_ptr.dtype.element_ty
    if not NORM:
        d = tl.program_id(0) * BLOCK + lane
        ok = d < channels
        common = of_line(taps_ptr, skip0_ptr, skip1_ptr, y_ptr, line, lines, d, ok, channels, WIDTH)
        x = floats(
            rows_of(xz_ptr, xz_stride, start - (WIDTH - 1), first, last, d, ok, order_ptr, ORDERED, 2 * (WIDTH - 1))
        )
        ahead = rows_of(xz_ptr, xz_stride, start + (WIDTH - 1), first, last, d, ok, order_ptr, ORDERED, STEPS)
    for step in range(0, tl.max(stop - start), STEPS):
        at = start + step
        if NORM:
            means = ()
            squares = ()
            for _ in tl.static_range(STEPS):
                means = means + (tl.zeros([LINES, BLOCK], tl.float32),)
                squares = squares + (tl.zeros([LINES, BLOCK], tl.float32),)
            blocks = 0.0
            for block in range(0, channels, BLOCK):
                d = block + lane
                ok = d < channels
                common = of_line(taps_ptr, skip0_ptr, skip1_ptr, y_ptr, line, lines, d, ok, channels, WIDTH)
                tokens = rows_of(
                    xz_ptr, xz_stride, at - (WIDTH - 1), first, last, d, ok, order_ptr, ORDERED, STEPS + 2 * (WIDTH - 1)
                )
                sums = summed(floats(tokens), common, WIDTH, STEPS, HARDWARE)
                blocks += 1.0
                new_means = ()
                new_squares = ()
                for i in tl.static_range(STEPS):
                    to_row = row_of(at + i, at + i < stop, order_ptr, ORDERED)[:, None]
                    here = (at + i < stop)[:, None] & ok
                    tl.store(out_ptr + to_row * channels + d, sums[i].to(dtype), mask=here)
                    off = sums[i] - means[i]
                    mean = tl.where(ok, means[i] + off / blocks, means[i])
                    new_means = new_means + (mean,)
                    new_squares = new_squares + (tl.where(ok, squares[i] + off * (sums[i] - mean), squares[i]),)
                means = new_means
                squares = new_squares
            tl.debug_barrier()  # other threads may have left what is read now
            counts = ((channels - lane + (BLOCK - 1)) // BLOCK).to(tl.float32)  # blocks that hold a lane
            centres = ()
            scales = ()
            for i in tl.static_range(STEPS):
                mean = tl.sum(means[i] * counts, axis=1) / channels
                off = means[i] - mean[:, None]
                variance = tl.sum(squares[i] + counts * off * off, axis=1) / channels
                scale = 1.0 / tl.sqrt_rn(variance + eps)
                to_stats = stats_ptr + 2 * row_of(at + i, at + i < stop, order_ptr, ORDERED)
                tl.store(to_stats, mean, mask=at + i < stop)
                tl.store(to_stats + 1, scale, mask=at + i < stop)
                centres = centres + (mean,)
                scales = scales + (scale,)
            for block in range(0, channels, BLOCK):
                d = block + lane
                ok = d < channels
                weight = tl.load(norm_weight_ptr + d, mask=ok, other=0.0).to(tl.float32)
                bias = tl.load(norm_bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
                for i in tl.static_range(STEPS):
                    row = row_of(at + i, at + i < stop, order_ptr, ORDERED)[:, None]
                    here = (at + i < stop)[:, None] & ok
                    s = tl.load(out_ptr + row * channels + d, mask=here, other=0.0).to(tl.float32)
                    z = tl.load(xz_ptr + row * xz_stride + channels + d, mask=here, other=0.0).to(tl.float32)
                    s = tl.fma((s - centres[i][:, None]) * scales[i][:, None], weight, bias)
                    tl.store(out_ptr + row * channels + d, (s * z * fast_sigmoid(z, HARDWARE)).to(dtype), mask=here)
        else:
            new = floats(ahead)
            # all loads before the first store, which could be to where they are from
            ahead = rows_of(xz_ptr, xz_stride, at + STEPS + (WIDTH - 1), first, last, d, ok, order_ptr, ORDERED, STEPS)
            gates = rows_of(xz_ptr + channels, xz_stride, at, start, stop, d, ok, order_ptr, ORDERED, STEPS)
            sums = summed(x + new, common, WIDTH, STEPS, HARDWARE)
            x = behind_of(x + new, WIDTH)
            for i in tl.static_range(STEPS):
                row = row_of(at + i, at + i < stop, order_ptr, ORDERED)[:, None]
                here = (at + i < stop)[:, None] & ok
                z = gates[i].to(tl.float32)
                tl.store(out_ptr + row * channels + d, (sums[i] * z * fast_sigmoid(z, HARDWARE)).to(dtype), mask=here)
