"""The pooled scan token by token, backward, in core Triton: gate, norm and skip; the convolution.

Shapes as in `pooled_forward`. The gradient of the sum of the directions, whose sums over lines go back to the scan
and whose tokens go back to the convolution, is the only thing between the two kernels that is stored token by token.
"""

# ruff: noqa: RUF005 - Triton's language has no starred tuples
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.pooled_forward import (
    behind_of,
    both_taps,
    fast_sigmoid,
    floats,
    line_bounds,
    of_line,
    row_of,
    rows_of,
    summed,
)


@triton.jit
def _add(ptr, value, mask):
    """Add to what this program left there before."""
    tl.store(ptr, value + tl.load(ptr, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["lines", "lines_per_sequence", "length"])
def pooled_output_backward_kernel(
    dout_ptr, xz_ptr, xz_stride, taps_ptr, skip0_ptr, skip1_ptr, y_ptr,  # (rows, d), the others as in the forward
    norm_weight_ptr, norm_bias_ptr, stats_ptr,
    dxz_ptr, dsum_ptr, dy_ptr,  # (rows, 2 d), (rows, d), (lines, d) float32
    partial_ptr,  # (programs, LINES, 2, d) float32, with NORM: of the norm's weight and bias; as dy zeros before
    starts_ptr, order_ptr, sequence_ptr, cu_lines_ptr, lines, lines_per_sequence, length, channels,
    NORM: tl.constexpr, ORDERED: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels; 1 with NORM, programs over lines). dz, the gradient of the sum, and its sums of lines.

    With NORM a program takes all channels of its tokens, once for the means, which leaves what was normalised in the
    first half of dxz and its gradient in dsum, and once more for dsum. A program takes every so many-th block of lines,
    in order, so that the sums are the same in every run.
    """
    lane = tl.zeros([LINES, 1], tl.int32) + tl.arange(0, BLOCK)[None, :]
    dtype = dsum_ptr.dtype.element_ty
    for group in range(tl.program_id(1), tl.cdiv(lines, LINES), tl.num_programs(1)):
        line = group * LINES + tl.arange(0, LINES)
        start, stop, first, last = line_bounds(
            line, lines, starts_ptr, sequence_ptr, cu_lines_ptr, lines_per_sequence, length, PACKED
        )
        last = tl.minimum(last, stop + (WIDTH - 1))
        to_dy = dy_ptr + line.to(tl.int64)[:, None] * channels
        longest = tl.max(stop - start)
        if NORM:
            for step in range(0, longest, STEPS):
                at = start + step
                along = ()
                across = ()
                for _ in tl.static_range(STEPS):
                    along = along + (tl.zeros([LINES, BLOCK], tl.float32),)
                    across = across + (tl.zeros([LINES, BLOCK], tl.float32),)
                for block in range(0, channels, BLOCK):
                    d = block + lane
                    ok = d < channels
                    common = of_line(taps_ptr, skip0_ptr, skip1_ptr, y_ptr, line, lines, d, ok, channels, WIDTH)
                    tokens = rows_of(
                        xz_ptr, xz_stride, at - (WIDTH - 1), first, last, d, ok, order_ptr, ORDERED,
                        STEPS + 2 * (WIDTH - 1),
                    )  # fmt: skip
                    sums = summed(floats(tokens), common, WIDTH, STEPS, HARDWARE)
                    weight = tl.load(norm_weight_ptr + d, mask=ok, other=0.0).to(tl.float32)
                    bias = tl.load(norm_bias_ptr + d, mask=ok, other=0.0).to(tl.float32)
                    new_along = ()
                    new_across = ()
                    dweight = tl.zeros([LINES, BLOCK], tl.float32)
                    dbias = tl.zeros([LINES, BLOCK], tl.float32)
                    for i in tl.static_range(STEPS):
                        here = (at + i < stop)[:, None]
                        row = row_of(at + i, at + i < stop, order_ptr, ORDERED)[:, None]
                        mean = tl.load(stats_ptr + 2 * row, mask=here, other=0.0)
                        scale = tl.load(stats_ptr + 2 * row + 1, mask=here, other=0.0)
                        here = here & ok
                        z = tl.load(xz_ptr + row * xz_stride + channels + d, mask=here, other=0.0).to(tl.float32)
                        dout = tl.load(dout_ptr + row * channels + d, mask=here, other=0.0).to(tl.float32)
                        unit = (sums[i] - mean) * scale
                        gate = fast_sigmoid(z, HARDWARE)
                        dz = dout * tl.fma(unit, weight, bias) * gate * (1.0 + z * (1.0 - gate))
                        dnormed = dout * z * gate
                        dweight += dnormed * unit
                        dbias += dnormed
                        dnormed = dnormed * weight
                        new_along = new_along + (along[i] + dnormed * unit,)
                        new_across = new_across + (across[i] + dnormed,)
                        to_dxz = dxz_ptr + row * (2 * channels) + d
                        tl.store(to_dxz + channels, dz.to(dtype), mask=here)
                        tl.store(to_dxz, unit.to(dtype), mask=here)
                        tl.store(dsum_ptr + row * channels + d, dnormed.to(dtype), mask=here)
                    along = new_along
                    across = new_across
                    lane_of = (tl.program_id(1) * LINES + tl.arange(0, LINES))[:, None]
                    to_partial = partial_ptr + lane_of * (2 * channels) + d
                    _add(to_partial, dweight, ok)
                    _add(to_partial + channels, dbias, ok)
                tl.debug_barrier()  # other threads may have left what is read now
                means = ()
                slopes = ()
                for i in tl.static_range(STEPS):
                    means = means + (tl.sum(across[i], axis=1)[:, None] / channels,)
                    slopes = slopes + (tl.sum(along[i], axis=1)[:, None] / channels,)
                for block in range(0, channels, BLOCK):
                    d = block + lane
                    ok = d < channels
                    total = tl.zeros([LINES, BLOCK], tl.float32)
                    for i in tl.static_range(STEPS):
                        here = (at + i < stop)[:, None]
                        row = row_of(at + i, at + i < stop, order_ptr, ORDERED)[:, None]
                        scale = tl.load(stats_ptr + 2 * row + 1, mask=here, other=0.0)
                        here = here & ok
                        unit = tl.load(dxz_ptr + row * (2 * channels) + d, mask=here, other=0.0).to(tl.float32)
                        g = tl.load(dsum_ptr + row * channels + d, mask=here, other=0.0).to(tl.float32)
                        g = tl.where(here, 0.5 * scale * (g - means[i] - unit * slopes[i]), 0.0)
                        tl.store(dsum_ptr + row * channels + d, g.to(dtype), mask=here)
                        total += g
                    _add(to_dy + d, total, (line < lines)[:, None] & ok)
        else:
            d = tl.program_id(0) * BLOCK + lane
            ok = d < channels
            common = of_line(taps_ptr, skip0_ptr, skip1_ptr, y_ptr, line, lines, d, ok, channels, WIDTH)
            x = floats(
                rows_of(xz_ptr, xz_stride, start - (WIDTH - 1), first, last, d, ok, order_ptr, ORDERED, 2 * (WIDTH - 1))
            )
            ahead = rows_of(xz_ptr, xz_stride, start + (WIDTH - 1), first, last, d, ok, order_ptr, ORDERED, STEPS)
            total = tl.zeros([LINES, BLOCK], tl.float32)
            for step in range(0, longest, STEPS):
                at = start + step
                new = floats(ahead)
                # all loads before the first store, which could be to where they are from
                ahead = rows_of(
                    xz_ptr, xz_stride, at + STEPS + (WIDTH - 1), first, last, d, ok, order_ptr, ORDERED, STEPS
                )
                gates = rows_of(xz_ptr + channels, xz_stride, at, start, stop, d, ok, order_ptr, ORDERED, STEPS)
                douts = rows_of(dout_ptr, channels, at, start, stop, d, ok, order_ptr, ORDERED, STEPS)
                sums = summed(x + new, common, WIDTH, STEPS, HARDWARE)
                x = behind_of(x + new, WIDTH)
                for i in tl.static_range(STEPS):
                    row = row_of(at + i, at + i < stop, order_ptr, ORDERED)[:, None]
                    here = (at + i < stop)[:, None] & ok
                    z = gates[i].to(tl.float32)
                    dout = douts[i].to(tl.float32)
                    gate = fast_sigmoid(z, HARDWARE)
                    dz = dout * sums[i] * gate * (1.0 + z * (1.0 - gate))
                    g = 0.5 * dout * z * gate
                    tl.store(dxz_ptr + row * (2 * channels) + channels + d, dz.to(dtype), mask=here)
                    tl.store(dsum_ptr + row * channels + d, g.to(dtype), mask=here)
                    total += g
            tl.store(to_dy + d, total, mask=(line < lines)[:, None] & ok)


@triton.jit
def _shifted(window, row):
    """The window one row on: without its first row, with `row` behind."""
    rows = ()
    for i in tl.static_range(len(window) - 1):
        rows = rows + (window[i + 1],)
    return rows + (row,)


@triton.jit
def _before_silu(
    x, sums, taps, skip, dsum, dpooled, SIGN: tl.constexpr, WIDTH: tl.constexpr, COUNTS: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """Gradient of what SiLU takes at a position, the last of x in direction 0 (SIGN 1), the first in direction 1 (-1).

    And the sums of taps (nearest first), bias and D, with what it adds to them if it COUNTS.
    """
    v = taps[WIDTH]
    for k in tl.static_range(WIDTH):
        v = tl.fma(x[(WIDTH - 1 - k) if SIGN > 0 else k], taps[WIDTH - 1 - k], v)
    gate = fast_sigmoid(v, HARDWARE)
    g = tl.fma(skip, dsum, dpooled) * gate * (1.0 + v * (1.0 - gate))
    if COUNTS:
        added = ()
        for k in tl.static_range(WIDTH):
            added = added + (tl.fma(g, x[(WIDTH - 1 - k) if SIGN > 0 else k], sums[k]),)
        sums = added + (sums[WIDTH] + g, tl.fma(dsum, v * gate, sums[WIDTH + 1]))
    return g, sums


@triton.jit
def _of_lines(
    dpooled_ptr, line_of_ptr, weights_ptr, at, first, last, d, ok, channels, COUNT: tl.constexpr
):  # fmt: skip
    """Gradients of u by the sums of lines, of positions at .. at + COUNT - 1, 0 outside of the sequence."""
    rows = ()
    for i in tl.static_range(COUNT):
        inside = (at + i >= first) & (at + i < last)
        line = tl.load(line_of_ptr + at + i, mask=inside, other=0)
        weight = tl.load(weights_ptr + line, mask=inside, other=0.0)[:, None]
        of_line = dpooled_ptr + line.to(tl.int64)[:, None] * channels + d
        rows = rows + (weight * tl.load(of_line, mask=inside[:, None] & ok, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _run(
    run, runs, sequence_ptr, cu_seqlens_ptr, cu_runs_ptr, runs_per_sequence, length,
    PACKED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """First position of a run, and those of its sequence: first and end. No position is in a run beyond the last."""
    if PACKED:
        behind = tl.load(sequence_ptr + run, mask=run < runs, other=1)  # the number of the sequence, and one more
        first = tl.load(cu_seqlens_ptr + behind - 1)
        last = tl.load(cu_seqlens_ptr + behind)
        start = first + (run - tl.load(cu_runs_ptr + behind - 1)) * STEPS
    else:
        first = run // runs_per_sequence * length
        last = first + length
        start = first + run % runs_per_sequence * STEPS
    return start, first, tl.where(run < runs, last, first)


@triton.jit
def _position(
    x, ds, g0, g1, sums0, sums1, taps0, taps1, skip0, skip1, new_x, new_ds, dpooled0, dpooled1,
    COUNTS0: tl.constexpr, COUNTS1: tl.constexpr, WIDTH: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """All windows one position on: x, the gradient of the sum, gradients before SiLU of both directions; the sums."""
    x = _shifted(x, new_x.to(tl.float32))
    ds = _shifted(ds, new_ds.to(tl.float32))
    g, sums0 = _before_silu(x, sums0, taps0, skip0, ds[WIDTH - 1], dpooled0, 1, WIDTH, COUNTS0, HARDWARE)
    g0 = _shifted(g0, g)
    g, sums1 = _before_silu(x, sums1, taps1, skip1, ds[0], dpooled1, -1, WIDTH, COUNTS1, HARDWARE)
    return x, ds, g0, _shifted(g1, g), sums0, sums1


@triton.jit
def _dx(g0, g1, taps0, taps1, WIDTH: tl.constexpr):
    """Dx of a position: g0 are the gradients from there on in direction 0, g1 those up to it in direction 1."""
    dx = g0[0] * taps0[WIDTH - 1] + g1[WIDTH - 1] * taps1[WIDTH - 1]
    for k in tl.static_range(1, WIDTH):
        dx = tl.fma(g0[k], taps0[WIDTH - 1 - k], tl.fma(g1[WIDTH - 1 - k], taps1[WIDTH - 1 - k], dx))
    return dx


@triton.jit
def _store(rows, ptr, stride, at, last, d, ok, order_ptr, ORDERED: tl.constexpr):
    """Rows of positions from `at` on, those before `last`."""
    for i in tl.static_range(len(rows)):
        inside = at + i < last
        row = row_of(at + i, inside, order_ptr, ORDERED)[:, None]
        tl.store(ptr + row * stride + d, rows[i].to(ptr.dtype.element_ty), mask=inside[:, None] & ok)


@triton.jit(do_not_specialize=["runs", "runs_per_sequence", "length"])
def pooled_convolution_backward_kernel(
    x_ptr, x_stride, taps_ptr, skip0_ptr, skip1_ptr,  # (rows, d), (q, w + 1, d) float32, (d,)
    dsum_ptr, dpooled_ptr,  # (rows, d), the gradient of the sum of the directions; (q, lines, d), of the lines
    dx_ptr, dx_stride, partial_ptr,  # (rows, d), (q, programs, w + 2, d) float32
    line_of_ptr, weights_ptr, order_ptr, sequence_ptr, cu_seqlens_ptr, cu_runs_ptr, runs, runs_per_sequence, length,
    channels, line_direction,
    ORDERED: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, programs over runs). The gradient of x, and of taps, bias and D in partial sums.

    A run is STEPS positions of one sequence. A program takes every so many-th GROUPS of them, in order: the sums are
    always the same. What is outside of the sequence is loaded as 0 and adds nothing. With the row of x at a position,
    direction 0 goes back through SiLU there, direction 1 WIDTH - 1 positions before, and that position's dx is done:
    every row is read once and held as long as it is met. WIDTH - 1 positions before the run and as many behind count
    for dx alone.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.zeros([GROUPS, 1], tl.int32) + column[None, :]  # laid out as the tokens: no exchange between threads
    ok = d < channels
    taps = both_taps(taps_ptr, channels, d, ok, WIDTH)
    dpooled1_ptr = dpooled_ptr + line_direction
    taps0 = ()
    taps1 = ()
    sums0 = ()
    sums1 = ()
    for k in tl.static_range(WIDTH + 1):
        taps0 = taps0 + (taps[k],)
        taps1 = taps1 + (taps[WIDTH + 1 + k],)
    for _ in tl.static_range(WIDTH + 2):
        sums0 = sums0 + (tl.zeros([GROUPS, BLOCK], tl.float32),)
        sums1 = sums1 + (tl.zeros([GROUPS, BLOCK], tl.float32),)
    skip0 = tl.load(skip0_ptr + d, mask=ok, other=0.0).to(tl.float32)
    skip1 = tl.load(skip1_ptr + d, mask=ok, other=0.0).to(tl.float32)
    for group in range(tl.program_id(1), tl.cdiv(runs, GROUPS), tl.num_programs(1)):
        run = group * GROUPS + tl.arange(0, GROUPS)
        start, first, last = _run(
            run, runs, sequence_ptr, cu_seqlens_ptr, cu_runs_ptr, runs_per_sequence, length, PACKED, STEPS
        )
        nothing = tl.zeros([GROUPS, BLOCK], tl.float32)
        g0 = ()
        g1 = ()
        for _ in tl.static_range(WIDTH):
            g0 = g0 + (nothing,)
            g1 = g1 + (nothing,)
        x = (nothing,) + floats(
            rows_of(x_ptr, x_stride, start - (WIDTH - 1), first, last, d, ok, order_ptr, ORDERED, WIDTH - 1)
        )
        ds = (nothing,) + floats(
            rows_of(dsum_ptr, channels, start - (WIDTH - 1), first, last, d, ok, order_ptr, ORDERED, WIDTH - 1)
        )
        edge_x = rows_of(x_ptr, x_stride, start, first, last, d, ok, order_ptr, ORDERED, WIDTH - 1)
        edge_ds = rows_of(dsum_ptr, channels, start, first, last, d, ok, order_ptr, ORDERED, WIDTH - 1)
        edge0 = _of_lines(dpooled_ptr, line_of_ptr, weights_ptr, start, first, last, d, ok, channels, WIDTH - 1)
        edge1 = _of_lines(
            dpooled1_ptr, line_of_ptr, weights_ptr, start - (WIDTH - 1), first, last, d, ok, channels, WIDTH - 1
        )
        at = start + (WIDTH - 1)
        ahead_x = rows_of(x_ptr, x_stride, at, first, last, d, ok, order_ptr, ORDERED, WIDTH)
        ahead_ds = rows_of(dsum_ptr, channels, at, first, last, d, ok, order_ptr, ORDERED, WIDTH)
        for i in tl.static_range(WIDTH - 1):
            x, ds, g0, g1, sums0, sums1 = _position(
                x, ds, g0, g1, sums0, sums1, taps0, taps1, skip0, skip1, edge_x[i], edge_ds[i], edge0[i], edge1[i],
                True, False, WIDTH, HARDWARE,
            )  # fmt: skip
        for step in range(WIDTH - 1, STEPS, WIDTH):
            at = start + step
            new_x = ahead_x
            new_ds = ahead_ds
            # all loads before the first store, which could be to where they are from
            ahead_x = rows_of(x_ptr, x_stride, at + WIDTH, first, last, d, ok, order_ptr, ORDERED, WIDTH)
            ahead_ds = rows_of(dsum_ptr, channels, at + WIDTH, first, last, d, ok, order_ptr, ORDERED, WIDTH)
            dpooled0 = _of_lines(dpooled_ptr, line_of_ptr, weights_ptr, at, first, last, d, ok, channels, WIDTH)
            dpooled1 = _of_lines(
                dpooled1_ptr, line_of_ptr, weights_ptr, at - (WIDTH - 1), first, last, d, ok, channels, WIDTH
            )
            dx = ()
            for i in tl.static_range(WIDTH):
                x, ds, g0, g1, sums0, sums1 = _position(
                    x, ds, g0, g1, sums0, sums1, taps0, taps1, skip0, skip1, new_x[i], new_ds[i], dpooled0[i],
                    dpooled1[i], True, True, WIDTH, HARDWARE,
                )  # fmt: skip
                dx = dx + (_dx(g0, g1, taps0, taps1, WIDTH),)
            _store(dx, dx_ptr, dx_stride, at - (WIDTH - 1), last, d, ok, order_ptr, ORDERED)
        at = start + STEPS
        edge0 = _of_lines(dpooled_ptr, line_of_ptr, weights_ptr, at, first, last, d, ok, channels, WIDTH - 1)
        edge1 = _of_lines(
            dpooled1_ptr, line_of_ptr, weights_ptr, at - (WIDTH - 1), first, last, d, ok, channels, WIDTH - 1
        )
        dx = ()
        for i in tl.static_range(WIDTH - 1):
            x, ds, g0, g1, sums0, sums1 = _position(
                x, ds, g0, g1, sums0, sums1, taps0, taps1, skip0, skip1, ahead_x[i], ahead_ds[i], edge0[i],
                edge1[i], False, True, WIDTH, HARDWARE,
            )  # fmt: skip
            dx = dx + (_dx(g0, g1, taps0, taps1, WIDTH),)
        _store(dx, dx_ptr, dx_stride, at - (WIDTH - 1), last, d, ok, order_ptr, ORDERED)
    partial_ptr += tl.program_id(1) * (WIDTH + 2) * channels + column
    behind = tl.num_programs(1) * (WIDTH + 2) * channels
    for k in tl.static_range(WIDTH + 2):
        to = partial_ptr + (WIDTH - 1 - k if k < WIDTH else k) * channels
        tl.store(to, tl.sum(sums0[k], axis=0), mask=column < channels)
        tl.store(to + behind, tl.sum(sums1[k], axis=0), mask=column < channels)
