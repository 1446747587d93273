"""The forward scan in Gluon, for NVIDIA: the same sums as in `scan_forward`, with layouts and shared memory by hand.

Both directions run at once, one half of the warps each, and meet in the middle of the chunk: until there each leaves
its sum in `out`, from there on it adds to what the other left and applies the gate. A tile of tokens is brought to
shared memory at a time, in the order of its direction and with zeros behind its end, so that the loop over tokens waits
for no global load and computes no address. Zero tokens leave the state as it is: their dt is 0, so they decay by 1 and
drive by 0. A thread holds STATES_THREAD states of a channel; where that is not all of them, the threads that share a
channel leave their parts of the sum over the states side by side in shared memory, where a tile of sums is kept anyway.

Shapes: q directions, t tokens of a tile, n states, s threads that share a channel, d channels of a block.
"""

# ruff: noqa: RUF005, RET505 - Triton's language has no starred tuples, and folds only plain `if`s with an `else`
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vim_kernels.triton_backend.elementary import LOG2E
from vim_kernels.triton_backend.tiles import barrier, chunk_rows, reciprocal, view_of


@gluon.jit
def _outer(length: gl.constexpr, layout: gl.constexpr):
    """0 .. length - 1 as (length, 1, 1) of a tile in `layout`."""
    i = gl.arange(0, length, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    return gl.expand_dims(gl.expand_dims(i, 1), 2)


@gluon.jit
def _middle(length: gl.constexpr, layout: gl.constexpr):
    """0 .. length - 1 as (1, length, 1)."""
    i = gl.arange(0, length, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    return gl.expand_dims(gl.expand_dims(i, 0), 2)


@gluon.jit
def _inner(length: gl.constexpr, layout: gl.constexpr):
    """0 .. length - 1 as (1, 1, length)."""
    i = gl.arange(0, length, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    return gl.expand_dims(gl.expand_dims(i, 0), 1)


@gluon.jit
def _rows(
    j, tiles, first, count, DIRECTIONS: gl.constexpr, REVERSE: gl.constexpr, TILE: gl.constexpr, layout: gl.constexpr
):
    """(t, q, 1): the row at every position of the j-th tile that a direction takes, and whether there is one."""
    p = _outer(TILE, layout)
    q = _middle(DIRECTIONS, layout)
    backwards = (q == 1) != REVERSE
    tile = gl.where(backwards, tiles - 1 - j, j)
    rows = gl.minimum(TILE, count - tile * TILE)
    row = first + tile * TILE + gl.where(backwards, rows - 1 - p, p)
    return row, (p < rows) & (tile >= 0)


@gluon.jit
def tiled_scan_forward_kernel(
    u_ptr, dt_ptr, bc_ptr, z_ptr, out_ptr, ungated_ptr, rates_ptr, D0_ptr, D1_ptr, h0_ptr, final_ptr, states_ptr,
    total_ptr, table_ptr, length, chunk_size, chunks_per_sequence, slots_per_sequence,
    channels, z_stride, out_stride, u_direction, bc_direction, chunk_direction, slot_direction,
    DIRECTIONS: gl.constexpr, REVERSE: gl.constexpr, PACKED: gl.constexpr, GATE: gl.constexpr, SAVE: gl.constexpr,
    HAS_D: gl.constexpr, HAS_H0: gl.constexpr, STORE_FINAL: gl.constexpr,
    STATES_ONLY: gl.constexpr, ADJOINT: gl.constexpr, SCALE: gl.constexpr,
    N: gl.constexpr, BLOCK: gl.constexpr, INTERVAL: gl.constexpr, TILE: gl.constexpr, STEP: gl.constexpr,
    STATE_LANES: gl.constexpr,
    state: gl.constexpr, rows_layout: gl.constexpr, bc_layout: gl.constexpr, parts: gl.constexpr,
    token: gl.constexpr, tile: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, chunks); arguments as in `scan_forward.scan_forward_kernel`.

    STATES_ONLY: no output, but the final state and the sum of dt of every chunk, `total` (q, chunks, d) float32.
    ADJOINT, beside it: u is the gradient of the gated output (rows, d), z its gate's input where GATE, and the state is
    the gradient of the scan's, R_t = a_t (C_t dy_t + R_{t+1}): the order is against the scan's.
    """
    column = gl.program_id(0) * BLOCK
    chunk = gl.program_id(1)
    first, count, slot = chunk_rows(
        chunk, table_ptr, length, chunk_size, chunks_per_sequence, slots_per_sequence, INTERVAL, PACKED
    )
    by_channel: gl.constexpr = gl.SliceLayout(1, state)  # (q, d)
    by_state: gl.constexpr = gl.SliceLayout(2, state)  # (q, n)
    u_s = gl.allocate_shared_memory(u_ptr.dtype.element_ty, [TILE, DIRECTIONS, BLOCK], token)
    dt_s = gl.allocate_shared_memory(dt_ptr.dtype.element_ty, [TILE, DIRECTIONS, BLOCK], token)
    b_s = gl.allocate_shared_memory(gl.float32, [TILE, DIRECTIONS, N], token)
    c_s = gl.allocate_shared_memory(gl.float32, [TILE, DIRECTIONS, N], token)
    y_s = gl.allocate_shared_memory(gl.float32, [TILE // STEP, STEP, DIRECTIONS, STATE_LANES, BLOCK], sums)

    # (q, n, d): rates, state, where states are saved
    q = _outer(DIRECTIONS, state)
    d = column + _inner(BLOCK, state)
    ok = d < channels
    at = _middle(N, state) * channels + d
    rates = gl.load(rates_ptr + q * (N * channels) + at, mask=ok, other=0.0)
    of_chunk = q * chunk_direction + chunk.to(gl.int64) * (N * channels) + at
    if HAS_H0:
        h = gl.load(h0_ptr + of_chunk, mask=ok, other=0.0)
    else:
        h = gl.zeros([DIRECTIONS, N, BLOCK], gl.float32, layout=state)
    saved_ptr = states_ptr + q * slot_direction + slot * (N * channels) + at
    channel = column + gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(0, by_channel)), 0)
    direction = gl.expand_dims(gl.arange(0, DIRECTIONS, layout=gl.SliceLayout(1, by_channel)), 1)
    total = gl.zeros([DIRECTIONS, BLOCK], gl.float32, layout=by_channel)
    if HAS_D:
        skip = gl.load(D0_ptr + d, mask=ok, other=0.0).to(gl.float32)
        if DIRECTIONS == 2:
            skip_1 = gl.load(D1_ptr + d, mask=ok, other=0.0).to(gl.float32)
            skip = gl.where(q == 1, skip_1, skip)
        # of the threads that share a channel one adds it, that of the first state
        skip = _of_states(gl.where(_middle(N, state) == 0, skip, 0.0), STATE_LANES)

    # (t, q, d) and (t, q, n): tiles of what is read and written
    q_row = _middle(DIRECTIONS, rows_layout)
    d_row = column + _inner(BLOCK, rows_layout)
    ok_row = d_row < channels
    q_bc = _middle(DIRECTIONS, bc_layout)
    if ADJOINT:
        u_ptr += q_row * 0 + d_row
    else:
        u_ptr += q_row.to(gl.int64) * u_direction + d_row  # the sum can need 64 bits where the stride does not
    dt_ptr += q_row.to(gl.int64) * u_direction + d_row
    bc_ptr += q_bc.to(gl.int64) * bc_direction + _inner(N, bc_layout)
    tiles = gl.cdiv(count, TILE)
    row, here = _rows(0, tiles, first, count, DIRECTIONS, REVERSE, TILE, rows_layout)
    row_bc, here_bc = _rows(0, tiles, first, count, DIRECTIONS, REVERSE, TILE, bc_layout)
    u = gl.load(u_ptr + row * channels, mask=here & ok_row, other=0.0)
    dt = gl.load(dt_ptr + row * channels, mask=here & ok_row, other=0.0)
    B = gl.load(bc_ptr + row_bc * (2 * N), mask=here_bc, other=0.0)
    C = gl.load(bc_ptr + row_bc * (2 * N) + N, mask=here_bc, other=0.0)
    if ADJOINT:
        z = gl.load(z_ptr + row * z_stride + d_row, mask=here & (ok_row & GATE), other=0.0)
    for j in range(0, tiles):
        at_row = row * channels + d_row
        at_out = row * out_stride + d_row
        at_z = row * z_stride + d_row
        mask = here & ok_row
        last_visit = (DIRECTIONS == 1) | (2 * j + 1 >= tiles)
        # In the tile in the middle, of an odd number of them, both directions are at once: there the first goes before.
        meets = 2 * j + 1 == tiles
        # What the other direction left is loaded ahead, but for the tiles that it has only just been in.
        fresh = meets | (2 * j == tiles)
        if ADJOINT:
            u = _gated(u.to(gl.float32), z, GATE, SCALE).to(u_s.dtype)
        view_of(u_s, u_s.dtype, [TILE, DIRECTIONS, BLOCK], tile).store(u)
        view_of(dt_s, dt_s.dtype, [TILE, DIRECTIONS, BLOCK], tile).store(dt)
        view_of(b_s, gl.float32, [TILE, DIRECTIONS, N], tile).store(B)
        view_of(c_s, gl.float32, [TILE, DIRECTIONS, N], tile).store(C)
        # The next tile is on its way while this one is scanned.
        row, here = _rows(j + 1, tiles, first, count, DIRECTIONS, REVERSE, TILE, rows_layout)
        row_bc, here_bc = _rows(j + 1, tiles, first, count, DIRECTIONS, REVERSE, TILE, bc_layout)
        u = gl.load(u_ptr + row * channels, mask=here & ok_row, other=0.0)
        dt = gl.load(dt_ptr + row * channels, mask=here & ok_row, other=0.0)
        B = gl.load(bc_ptr + row_bc * (2 * N), mask=here_bc, other=0.0)
        C = gl.load(bc_ptr + row_bc * (2 * N) + N, mask=here_bc, other=0.0)
        if ADJOINT:
            z = gl.load(z_ptr + row * z_stride + d_row, mask=here & (ok_row & GATE), other=0.0)
        if not STATES_ONLY:  # what the end of the tile will need, too; before the middle that is nothing
            z = gl.load(z_ptr + at_z, mask=mask & (last_visit & GATE), other=0.0)
        if DIRECTIONS == 2 and not STATES_ONLY:
            other = gl.load(out_ptr + at_out, mask=mask & (2 * j > tiles), other=0.0)
        if SAVE:
            # The state enters an interval at its first row, or when scanned backwards behind its last one.
            RATIO: gl.constexpr = INTERVAL // TILE
            last = tiles - 1 - j
            opens = j % RATIO == 0
            closes = ((last + 1) % RATIO == 0) | (j == 0)
            if opens | closes:
                backwards = (q == 1) != REVERSE
                interval = gl.where(backwards, last, j) // RATIO
                entered = gl.where(backwards, closes, opens)
                gl.store(
                    saved_ptr + interval.to(gl.int64) * (N * channels),
                    h,
                    mask=ok & entered,
                )
        for group in range(0, TILE // STEP):
            # All loads before all stores: the compiler takes them for the same memory, and may overlap tokens only so.
            u_l = ()
            dt_l = ()
            B_l = ()
            C_l = ()
            for k in gl.static_range(STEP):
                i = group * STEP + k
                u_l = u_l + (u_s.index(i).load(by_channel).to(gl.float32),)
                dt_l = dt_l + (dt_s.index(i).load(by_channel).to(gl.float32),)
                B_l = B_l + (b_s.index(i).load(by_state),)
                if not STATES_ONLY or ADJOINT:
                    C_l = C_l + (c_s.index(i).load(by_state),)
            y_l = ()
            for k in gl.static_range(STEP):
                decay = gl.exp2(gl.expand_dims(dt_l[k], 1) * rates)
                if ADJOINT:
                    h = decay * gl.fma(gl.expand_dims(u_l[k], 1), gl.expand_dims(C_l[k], 2), h)
                else:
                    h = gl.fma(decay, h, gl.expand_dims(dt_l[k] * u_l[k], 1) * gl.expand_dims(B_l[k], 2))
                if STATES_ONLY:
                    total += dt_l[k]
                else:
                    y = _of_states(h * gl.expand_dims(C_l[k], 2), STATE_LANES)
                    if HAS_D:
                        y = gl.fma(skip, gl.convert_layout(gl.expand_dims(u_l[k], 1), y.type.layout), y)
                    y_l = y_l + (y,)
            if not STATES_ONLY:
                y_s.index(group).store(_stack(y_l, STEP, DIRECTIONS, STATE_LANES, BLOCK))
        if not STATES_ONLY:
            y = view_of(y_s, gl.float32, [TILE, DIRECTIONS, STATE_LANES, BLOCK], sums).load(parts)
            y = gl.convert_layout(gl.sum(y, axis=2), rows_layout)
            if DIRECTIONS == 2:
                if meets | (2 * j < tiles):
                    left = mask & ((q_row == 0) | (not meets))
                    gl.store(out_ptr + at_out, y.to(out_ptr.dtype.element_ty), mask=left)
                if last_visit:
                    if fresh:
                        barrier()
                        other = gl.load(out_ptr + at_out, mask=mask, other=0.0)
                    y += other.to(gl.float32)
                    mask = mask & ((q_row == 1) | (not meets))
                    _finish(y, z, at_out, at_row, mask, out_ptr, ungated_ptr, GATE, SAVE, SCALE)
            else:
                _finish(y, z, at_out, at_row, mask, out_ptr, ungated_ptr, GATE, SAVE, SCALE)
    if STORE_FINAL:
        gl.store(final_ptr + of_chunk, h, mask=ok)
    if STATES_ONLY:
        at_chunk = direction * (chunk_direction // N) + chunk.to(gl.int64) * channels + channel
        gl.store(total_ptr + at_chunk, total, mask=channel < channels)


@gluon.jit
def _of_states(x, LANES: gl.constexpr):
    """(q, n, d) summed over the states of a thread: (q, s, d)."""
    return gl.sum(gl.reshape(x, [x.shape[0], LANES, x.shape[1] // LANES, x.shape[2]]), axis=2)


@gluon.jit
def _joined(parts, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """COUNT (q, s, d) tensors as (q, s, d, 2, 2, ...), the lowest bit of their number first."""
    if COUNT == 1:
        return parts[FIRST]
    else:
        return gl.join(_joined(parts, FIRST, COUNT // 2), _joined(parts, FIRST + COUNT // 2, COUNT // 2))


@gluon.jit
def _stack(parts, COUNT: gl.constexpr, DIRECTIONS: gl.constexpr, LANES: gl.constexpr, BLOCK: gl.constexpr):
    """COUNT (q, s, d) tensors as one (COUNT, q, s, d), for one store to shared memory: each store takes a barrier."""
    joined = _joined(parts, 0, COUNT)
    if COUNT == 2:
        joined = gl.permute(joined, (3, 0, 1, 2))
    if COUNT == 4:
        joined = gl.permute(joined, (4, 3, 0, 1, 2))
    if COUNT == 8:
        joined = gl.permute(joined, (5, 4, 3, 0, 1, 2))
    if COUNT == 16:
        joined = gl.permute(joined, (6, 5, 4, 3, 0, 1, 2))
    return gl.reshape(joined, [COUNT, DIRECTIONS, LANES, BLOCK])


@gluon.jit
def _finish(
    y, z, at_out, at_row, mask, out_ptr, ungated_ptr, GATE: gl.constexpr, SAVE: gl.constexpr, SCALE: gl.constexpr
):
    """Gate and store the sum of all directions."""
    if GATE and SAVE:
        gl.store(ungated_ptr + at_row, y.to(ungated_ptr.dtype.element_ty), mask=mask)
    gl.store(out_ptr + at_out, _gated(y, z, GATE, SCALE).to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _gated(y, z, GATE: gl.constexpr, SCALE: gl.constexpr):
    """SCALE y silu(z), or SCALE y."""
    if GATE:
        z = z.to(gl.float32)
        y = y * (SCALE * z) * reciprocal(1.0 + gl.exp2(z * -LOG2E))
    else:
        y = y * SCALE
    return y
