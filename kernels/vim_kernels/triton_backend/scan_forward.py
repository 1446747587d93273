"""Forward kernel of the selective scan, in core Triton: one launch scans one or both directions.

Lanes are channels; the n states of a channel live in the registers of one thread, so that the loop over tokens needs no
shuffle and no barrier. Rows are the tokens of all sequences, one after the other, channel-last. Chunks and
intervals are those of `chunks`. Shapes: q directions, n states, d channels.
"""

# ruff: noqa: SIM102, SIM108 - Triton's language has no starred tuples, and folds only plain `if`s on constants
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.chunks import chunk_rows, prefetch
from vim_kernels.triton_backend.elementary import LOG2E


@triton.jit
def _scan_direction(
    u_ptr, dt_ptr, bc_ptr, z_ptr, out_ptr, ungated_ptr, rates_ptr, D_ptr, h0_ptr, final_ptr, states_ptr,
    first, count, channel, channels, state_stride, z_stride, out_stride,
    REVERSE: tl.constexpr, ADD: tl.constexpr, LAST: tl.constexpr, GATE: tl.constexpr, SAVE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_H0: tl.constexpr, STORE_FINAL: tl.constexpr, SCALE: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, INTERVAL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Scan rows first .. first + count - 1; ADD to what the other direction left in `out`, gate and scale if LAST."""
    n = tl.arange(0, N)
    d = channel + tl.arange(0, BLOCK)
    ok = d < channels
    tile = n[:, None] * state_stride + d[None, :]
    rates = tl.load(rates_ptr + tile, mask=ok[None, :], other=0.0)
    if HAS_D:
        skip = tl.load(D_ptr + d, mask=ok, other=0.0).to(tl.float32)
    if HAS_H0:
        h = tl.load(h0_ptr + tile, mask=ok[None, :], other=0.0)
    else:
        h = tl.zeros([N, BLOCK], tl.float32)
    step = -1 if REVERSE else 1
    for j in range(0, tl.cdiv(count, INTERVAL)):
        interval = tl.cdiv(count, INTERVAL) - 1 - j if REVERSE else j
        rows = tl.minimum(INTERVAL, count - interval * INTERVAL)
        row = first + interval * INTERVAL + (rows - 1 if REVERSE else 0)
        if SAVE:
            tl.store(states_ptr + interval.to(tl.int64) * N * channels + tile, h, mask=ok[None, :])
        u_row = u_ptr + row * channels
        dt_row = dt_ptr + row * channels
        bc_row = bc_ptr + row * (2 * N)
        out_row = out_ptr + row * out_stride
        z_row = z_ptr + row * z_stride
        ungated_row = ungated_ptr + row * channels
        for i in range(0, rows):
            if AHEAD > 0:
                if i + AHEAD < rows:
                    prefetch(bc_row + step * AHEAD * (2 * N) + tl.arange(0, 32))
                    prefetch(u_row + step * AHEAD * channels + d)
                    prefetch(dt_row + step * AHEAD * channels + d)
                    if ADD:
                        prefetch(out_row + step * AHEAD * out_stride + d)
                    if GATE:
                        prefetch(z_row + step * AHEAD * z_stride + d)
            B = tl.load(bc_row + n)
            C = tl.load(bc_row + N + n)
            u = tl.load(u_row + d, mask=ok, other=0.0).to(tl.float32)
            dt = tl.load(dt_row + d, mask=ok, other=0.0).to(tl.float32)
            h = tl.fma(tl.exp2(dt[None, :] * rates), h, (dt * u)[None, :] * B[:, None])
            y = tl.sum(h * C[:, None], axis=0)
            if HAS_D:
                y = tl.fma(skip, u, y)
            if ADD:
                y += tl.load(out_row + d, mask=ok, other=0.0).to(tl.float32)
            if LAST:
                if SAVE and GATE:
                    tl.store(ungated_row + d, y.to(ungated_ptr.dtype.element_ty), mask=ok)
                if GATE:
                    z = tl.load(z_row + d, mask=ok, other=0.0).to(tl.float32)
                    y = y * (SCALE * z) / (1.0 + tl.exp2(z * -LOG2E))
                else:
                    y = y * SCALE
            tl.store(out_row + d, y.to(out_ptr.dtype.element_ty), mask=ok)
            u_row += step * channels
            dt_row += step * channels
            bc_row += step * (2 * N)
            out_row += step * out_stride
            z_row += step * z_stride
            ungated_row += step * channels
    if STORE_FINAL:
        tl.store(final_ptr + tile, h, mask=ok[None, :])


# A row stride of the decay rates known to be a multiple of 16 would move the lanes onto the states: shuffles, barriers.
@triton.jit(do_not_specialize=["state_stride"])
def scan_forward_kernel(
    u_ptr, dt_ptr, bc_ptr,  # (q, rows, d), (q, rows, d), (q, rows, 2 n) float32
    z_ptr, out_ptr,  # (rows, d) with row strides z_stride, out_stride
    ungated_ptr,  # (rows, d) the sum before the gate
    rates_ptr, D0_ptr, D1_ptr,  # (q, n, d) float32, A log2(e); (d,) of either direction
    h0_ptr, final_ptr, states_ptr,  # (q, chunks, n, d), the same, (q, slots, n, d), all float32
    table_ptr, length, chunk_size, chunks_per_sequence, slots_per_sequence,
    channels, state_stride, z_stride, out_stride, u_direction, bc_direction, chunk_direction, slot_direction,
    DIRECTIONS: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, GATE: tl.constexpr, SAVE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_H0: tl.constexpr, STORE_FINAL: tl.constexpr, SCALE: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, INTERVAL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, chunks). With DIRECTIONS = 2 the second one reads from the last token to the first."""
    channel = tl.program_id(0) * BLOCK
    chunk = tl.program_id(1)
    first, count, slot = chunk_rows(
        chunk, table_ptr, length, chunk_size, chunks_per_sequence, slots_per_sequence, INTERVAL, PACKED
    )
    state = chunk.to(tl.int64) * N * channels
    saved = slot * N * channels
    _scan_direction(
        u_ptr, dt_ptr, bc_ptr, z_ptr, out_ptr, ungated_ptr, rates_ptr, D0_ptr,
        h0_ptr + state, final_ptr + state, states_ptr + saved,
        first, count, channel, channels, state_stride, z_stride, out_stride,
        REVERSE, False, DIRECTIONS == 1, GATE and DIRECTIONS == 1, SAVE,
        HAS_D, HAS_H0, STORE_FINAL, SCALE, N, BLOCK, INTERVAL, AHEAD,
    )  # fmt: skip
    if DIRECTIONS == 2:
        tl.debug_barrier()  # the second direction reads what the first wrote, whatever layouts were chosen
        _scan_direction(
            u_ptr + u_direction, dt_ptr + u_direction, bc_ptr + bc_direction, z_ptr, out_ptr, ungated_ptr,
            rates_ptr + N * channels, D1_ptr, h0_ptr + chunk_direction + state, final_ptr + chunk_direction + state,
            states_ptr + slot_direction + saved,
            first, count, channel, channels, state_stride, z_stride, out_stride,
            True, True, True, GATE, SAVE, HAS_D, HAS_H0, STORE_FINAL, SCALE, N, BLOCK, INTERVAL, AHEAD,
        )  # fmt: skip
