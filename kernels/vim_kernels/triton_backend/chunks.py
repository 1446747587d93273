"""Kernels of a scan in chunks, in core Triton: where a chunk lies, what it does to a state, the state that enters it.

A chunk is a run of rows of one sequence that one program scans; an interval is the run of rows between two saved
states. Both are counted from the first row of a sequence in either direction.
Shapes: q directions, n states, d channels.
"""

# ruff: noqa: SIM102, SIM108 - Triton's language folds only plain `if`s on constants
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl


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
def prefetch(pointers):
    """Ask for the cache lines of `pointers`; no register waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


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
                prefetch(bc_row + step * AHEAD * (2 * N) + tl.arange(0, 32))
                prefetch(u_row + step * AHEAD * channels + d)
                prefetch(dt_row + step * AHEAD * channels + d)
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
        pieces = tl.cdiv(stop - start, chunk_size)
        inside = (chunk >= before) & (chunk < before + pieces)
        offset = (chunk - before) * chunk_size
        row = tl.where(inside, start + offset, row)
        count = tl.where(inside, tl.minimum(stop - start - offset, chunk_size), count)
        slot = tl.where(inside, start // INTERVAL + sequence + offset // INTERVAL, slot)
        if tl.program_id(0) == 0:
            tl.store(sequence_ptr + sequence * 2, before)
            tl.store(sequence_ptr + sequence * 2 + 1, pieces)
        before += pieces
        start = stop
    ok = chunk < chunks
    tl.store(table_ptr + chunk * 3, row, mask=ok)
    tl.store(table_ptr + chunk * 3 + 1, count, mask=ok)
    tl.store(table_ptr + chunk * 3 + 2, slot, mask=ok)
