"""Forward kernels of the selective scan, in core Triton: one launch scans one or both directions.

Lanes are channels; the n states of a channel live in the registers of one thread, so that the loop over tokens needs no
shuffle and no barrier. Rows are the tokens of all sequences, one after the other, channel-last. A chunk is a run of
rows of one sequence that one program scans; an interval is the run of rows between two saved states. Both are counted
from the first row of a sequence in either direction. Shapes: q directions, n states, d channels.
"""

# ruff: noqa: SIM102, SIM108 - Triton's language has no starred tuples, and folds only plain `if`s on constants
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def chunk_rows(
    chunk,
    table_ptr,  # (chunks, 3) int32 when PACKED
    length,
    chunk_size,
    chunks_per_sequence,
    slots_per_sequence,
    INTERVAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    """First row of a chunk, number of rows (0 for a chunk that does not exist), slot of its first saved state."""
    if PACKED:
        first = tl.load(table_ptr + chunk * 3).to(tl.int64)
        count = tl.load(table_ptr + chunk * 3 + 1)
        slot = tl.load(table_ptr + chunk * 3 + 2).to(tl.int64)
    else:
        sequence = chunk // chunks_per_sequence
        start = (chunk % chunks_per_sequence) * chunk_size
        first = sequence.to(tl.int64) * length + start
        count = tl.minimum(chunk_size, length - start)
        slot = sequence.to(tl.int64) * slots_per_sequence + start // INTERVAL
    return first, count, slot


@triton.jit
def _prefetch(pointers):
    """Ask for the cache lines of `pointers`; no register waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


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
                    _prefetch(bc_row + step * AHEAD * (2 * N) + tl.arange(0, 32))
                    _prefetch(u_row + step * AHEAD * channels + d)
                    _prefetch(dt_row + step * AHEAD * channels + d)
                    if ADD:
                        _prefetch(out_row + step * AHEAD * out_stride + d)
                    if GATE:
                        _prefetch(z_row + step * AHEAD * z_stride + d)
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


@triton.jit(do_not_specialize=["state_stride"])
def chunk_state_kernel(
    u_ptr, dt_ptr, bc_ptr, rates_ptr,  # u is dy (rows, d) when ADJOINT
    state_ptr, total_ptr,  # (q, chunks, n, d), (q, chunks, d), float32
    table_ptr, length, chunk_size, chunks_per_sequence,
    channels, state_stride, u_direction, dt_direction, bc_direction, chunk_direction, total_direction,
    REVERSE: tl.constexpr, ADJOINT: tl.constexpr, PACKED: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, chunks, directions). The state after each chunk if it began at zero, and the sum of its dt.

    ADJOINT runs against the scan: R_t = a_t (C_t dy_t + R_{t+1}), the gradient that leaves the chunk at its beginning.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1)
    direction = tl.program_id(2)
    n = tl.arange(0, N)
    ok = d < channels
    tile = n[:, None] * state_stride + d[None, :]
    first, count, _ = chunk_rows(chunk, table_ptr, length, chunk_size, chunks_per_sequence, 0, 1, PACKED)
    backwards = (direction == 1) != REVERSE
    if ADJOINT:
        backwards = backwards == False  # noqa: E712 - a traced value has no `not`
    step = tl.where(backwards, -1, 1)
    row = first + tl.where(backwards, count - 1, 0)
    rates = tl.load(rates_ptr + direction * N * channels + tile, mask=ok[None, :], other=0.0)
    u_row = u_ptr + direction * u_direction + row * channels
    dt_row = dt_ptr + direction * dt_direction + row * channels
    bc_row = bc_ptr + direction * bc_direction + row * (2 * N)
    h = tl.zeros([N, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count):
        if AHEAD > 0:
            if i + AHEAD < count:
                _prefetch(bc_row + step * AHEAD * (2 * N) + tl.arange(0, 32))
                _prefetch(u_row + step * AHEAD * channels + d)
                _prefetch(dt_row + step * AHEAD * channels + d)
        u = tl.load(u_row + d, mask=ok, other=0.0).to(tl.float32)
        dt = tl.load(dt_row + d, mask=ok, other=0.0).to(tl.float32)
        decay = tl.exp2(dt[None, :] * rates)
        if ADJOINT:
            C = tl.load(bc_row + N + n)
            h = decay * (h + u[None, :] * C[:, None])
        else:
            B = tl.load(bc_row + n)
            h = tl.fma(decay, h, (dt * u)[None, :] * B[:, None])
        total += dt
        u_row += step * channels
        dt_row += step * channels
        bc_row += step * (2 * N)
    tl.store(state_ptr + direction * chunk_direction + chunk.to(tl.int64) * N * channels + tile, h, mask=ok[None, :])
    tl.store(total_ptr + direction * total_direction + chunk.to(tl.int64) * channels + d, total, mask=ok)


@triton.jit
def _then(decay_1, drive_1, decay_2, drive_2):
    return decay_1 * decay_2, tl.fma(decay_2, drive_1, drive_2)


@triton.jit
def carry_kernel(
    state_ptr, total_ptr, rates_ptr,  # (q, chunks, n, d), (q, chunks, d), (q, n, d)
    entering_ptr, initial_ptr, final_ptr,  # (q, chunks, n, d), (q, sequences, n, d), the same
    sequence_ptr, chunks_per_sequence,  # (sequences, 2) int32: first chunk, number of chunks, when PACKED
    channels, chunk_direction, total_direction,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, sequences, q n). From what every chunk does to a zero state: the state that enters every chunk.

    An associative scan over CHUNKS chunks at a time. REVERSE: direction 0 runs from the last chunk to the first.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.program_id(1)
    direction = tl.program_id(2) // N
    n = tl.program_id(2) % N
    ok = d < channels
    if PACKED:
        first = tl.load(sequence_ptr + sequence * 2)
        count = tl.load(sequence_ptr + sequence * 2 + 1)
    else:
        first = sequence * chunks_per_sequence
        count = chunks_per_sequence
    backwards = (direction == 1) != REVERSE
    rates = tl.load(rates_ptr + (direction * N + n) * channels + d, mask=ok, other=0.0)
    ends = ((direction * tl.num_programs(1) + sequence).to(tl.int64) * N + n) * channels + d
    if HAS_INITIAL:
        entering = tl.load(initial_ptr + ends, mask=ok, other=0.0)
    else:
        entering = tl.zeros([BLOCK], tl.float32)
    state_ptr += direction * chunk_direction
    entering_ptr += direction * chunk_direction
    total_ptr += direction * total_direction
    i = tl.arange(0, CHUNKS)
    for start in range(0, count, CHUNKS):
        position = start + i
        chunk = (first + tl.where(backwards, count - 1 - position, position)).to(tl.int64)
        following = (first + tl.where(backwards, count - 2 - position, position + 1)).to(tl.int64)
        here = (position < count)[:, None] & ok[None, :]
        drive = tl.load(state_ptr + (chunk * N + n)[:, None] * channels + d[None, :], mask=here, other=0.0)
        total = tl.load(total_ptr + chunk[:, None] * channels + d[None, :], mask=here, other=0.0)
        decay = tl.exp2(total * rates[None, :])
        drive = tl.where((i == 0)[:, None], tl.fma(decay, entering[None, :] + tl.zeros_like(drive), drive), drive)
        _, after = tl.associative_scan((decay, drive), 0, _then)
        opening = (i == 0)[:, None] & ok[None, :]
        tl.store(
            entering_ptr + (chunk * N + n)[:, None] * channels + d[None, :],
            entering[None, :] + tl.zeros_like(drive),
            mask=opening,
        )
        inside = ((position + 1 < count) & (i + 1 < CHUNKS))[:, None] & ok[None, :]
        tl.store(entering_ptr + (following * N + n)[:, None] * channels + d[None, :], after, mask=inside)
        entering = tl.sum(tl.where((i == CHUNKS - 1)[:, None], after, 0.0), axis=0)
    if STORE_FINAL:
        tl.store(final_ptr + ends, entering, mask=ok)


@triton.jit
def chunk_table_kernel(
    cu_seqlens_ptr, table_ptr, sequence_ptr,  # (sequences + 1,), (chunks, 3), (sequences, 2), int32
    sequences, chunks, chunk_size,
    INTERVAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of chunks,). Cuts packed sequences into chunks on the device, without a wait for the host."""
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    slot = tl.zeros([BLOCK], tl.int32)
    before = 0
    start = tl.load(cu_seqlens_ptr)
    for sequence in range(0, sequences):
        stop = tl.load(cu_seqlens_ptr + sequence + 1)
        own = tl.cdiv(stop - start, chunk_size)
        inside = (chunk >= before) & (chunk < before + own)
        offset = (chunk - before) * chunk_size
        row = tl.where(inside, start + offset, row)
        count = tl.where(inside, tl.minimum(stop - start - offset, chunk_size), count)
        slot = tl.where(inside, start // INTERVAL + sequence + offset // INTERVAL, slot)
        if tl.program_id(0) == 0:
            tl.store(sequence_ptr + sequence * 2, before)
            tl.store(sequence_ptr + sequence * 2 + 1, own)
        before += own
        start = stop
    ok = chunk < chunks
    tl.store(table_ptr + chunk * 3, row, mask=ok)
    tl.store(table_ptr + chunk * 3 + 1, count, mask=ok)
    tl.store(table_ptr + chunk * 3 + 2, slot, mask=ok)
