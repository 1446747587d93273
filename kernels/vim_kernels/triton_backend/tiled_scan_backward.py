"""The backward scan in Gluon, for NVIDIA: the same sums as in `scan_backward`, with layouts and shared memory by hand.

A tile of tokens is brought to shared memory at a time, in the order of the scan and with zeros behind its end, so that
the loop over tokens waits for no global load and computes no address. A thread holds STATES_THREAD states of
CHANNELS_THREAD channels; that layout, not the compiler's choice, decides how often B and C are read. Zero tokens leave
the state as it is: their dt is 0, so they decay by 1 and drive by 0.
"""

# ruff: noqa: RUF005 - Triton's language has no starred tuples
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vim_kernels.triton_backend.elementary import LN2, LOG2E
from vim_kernels.triton_backend.tiles import chunk_rows, reciprocal, view_of


@gluon.jit
def _fetch(
    base, stride, start, step, count, column, columns, TILE: gl.constexpr, BLOCK: gl.constexpr, layout: gl.constexpr
):
    """(TILE, BLOCK) of rows start, start + step, ...: zeros beyond `count` rows and `columns` columns."""
    p = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    d = column + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    row = start + step * p
    mask = gl.expand_dims(p < count, 1) & gl.expand_dims(d < columns, 0)
    return gl.load(base + gl.expand_dims(row, 1) * stride + gl.expand_dims(d, 0), mask=mask, other=0.0)


@gluon.jit
def _touch(
    base, stride, start, step, column,
    TILE: gl.constexpr, BLOCK: gl.constexpr, PIECE: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Ask for what `_fetch` will load, PIECE numbers at a time, to lie in the cache by then."""
    p = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    d = column + PIECE * gl.arange(0, BLOCK // PIECE, layout=gl.SliceLayout(0, layout))
    at = base + gl.expand_dims(start + step * p, 1) * stride + gl.expand_dims(d, 0)
    gl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _place(j, intervals, first, count, backwards, INTERVAL: gl.constexpr):
    """Number, rows and first row, in the order of the scan, of the interval that is the j-th to walk back."""
    interval = gl.where(backwards, j, intervals - 1 - j)
    rows = gl.minimum(INTERVAL, count - interval * INTERVAL)
    return interval, rows, first + interval * INTERVAL + gl.where(backwards, rows - 1, 0)


@gluon.jit
def _put(
    base, stride, start, step, count, column, columns, x,
    TILE: gl.constexpr, BLOCK: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Store what `_fetch` would load."""
    p = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    d = column + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    mask = gl.expand_dims(p < count, 1) & gl.expand_dims(d < columns, 0)
    at = base + gl.expand_dims(start + step * p, 1) * stride + gl.expand_dims(d, 0)
    gl.store(at, x, mask=mask)


@gluon.jit
def _of_channels(x, LANES: gl.constexpr):
    """(n, d) summed over the channels of a thread: (lanes, n)."""
    n: gl.constexpr = x.shape[0]
    return gl.permute(gl.sum(gl.reshape(x, [n, LANES, x.shape[1] // LANES]), axis=2), (1, 0))


@gluon.jit
def _of_states(x, LANES: gl.constexpr):
    """(n, d) summed over the states of a thread: (lanes, d)."""
    return gl.sum(gl.reshape(x, [LANES, x.shape[0] // LANES, x.shape[1]]), axis=1)


@gluon.jit
def _pair(a, b):
    """Two (lanes, x) tensors as one (2, lanes, x)."""
    return gl.permute(gl.join(a, b), (2, 0, 1))


@gluon.jit
def tiled_scan_backward_kernel(
    u_ptr, dt_ptr, bc_ptr, dy_ptr, rates_ptr, D0_ptr, D1_ptr, states_ptr, adjoint_ptr,
    du_ptr, ddt_ptr, dbc_ptr, drates_ptr, sums_ptr, dh0_ptr,
    table_ptr, length, chunk_size, chunks_per_sequence, slots_per_sequence,
    channels, u_direction, bc_direction, chunk_direction, slot_direction, block_stride,
    z_ptr, ungated_ptr, dz_ptr, z_stride, dz_stride, gaps_ptr, gaps_direction,
    REVERSE: gl.constexpr, PACKED: gl.constexpr, HAS_D: gl.constexpr, HAS_ADJOINT: gl.constexpr,
    STORE_DH0: gl.constexpr, SOFTPLUS: gl.constexpr, GAPS: gl.constexpr, GATE: gl.constexpr, SCALE: gl.constexpr,
    N: gl.constexpr, BLOCK: gl.constexpr, INTERVAL: gl.constexpr, GROUP: gl.constexpr,
    STATE_LANES: gl.constexpr, CHANNEL_LANES: gl.constexpr,
    state: gl.constexpr, rows_layout: gl.constexpr, bc_layout: gl.constexpr, touch: gl.constexpr,
    pair: gl.constexpr, of_states: gl.constexpr, of_channels: gl.constexpr, pair_bc: gl.constexpr,
    row: gl.constexpr, view: gl.constexpr, view3: gl.constexpr, swizzled3: gl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, chunks, directions); see `scan_backward`. A tile is an interval.

    The states that begin each group of tokens are kept in shared memory instead of global scratch, but for the first
    (it is saved) and the last (it is at hand). What a thread has summed over its own states and channels goes through
    shared memory, two tokens side by side, to threads of which each adds up one sum: no shuffles, and du and ddt are
    computed once, not by every thread that shares a channel. Sums of all tokens of a group are left before any is
    read: threads wait for each other twice a group. Tokens become float32 once a tile, not by every reader.

    dy is the gradient of SCALE y, with GATE of SCALE y silu(z), where y is the sum of the directions, `ungated`. The
    first direction stores dz.
    """
    block = gl.program_id(0)
    chunk = gl.program_id(1)
    direction = gl.program_id(2)
    column = block * BLOCK
    n = gl.arange(0, N, layout=gl.SliceLayout(1, state))
    d = column + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, state))
    ok = gl.expand_dims(d < channels, 0)
    at = gl.expand_dims(n, 1) * channels + gl.expand_dims(d, 0)
    first, count, slot = chunk_rows(
        chunk, table_ptr, length, chunk_size, chunks_per_sequence, slots_per_sequence, INTERVAL, PACKED
    )
    backwards = (direction == 1) != REVERSE
    step = gl.where(backwards, -1, 1)
    u_ptr += direction * u_direction
    dt_ptr += direction * u_direction
    bc_ptr += direction * bc_direction
    states_ptr += direction * slot_direction + slot * N * channels
    state_at = direction * chunk_direction + chunk.to(gl.int64) * N * channels
    rates = gl.load(rates_ptr + direction * N * channels + at, mask=ok, other=0.0)

    # (2, d) and (2, 2 n): what leaves, two tokens at a time
    p = gl.arange(0, 2, layout=gl.SliceLayout(1, pair))
    d_pair = column + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, pair))
    ok_pair = d_pair < channels
    p_bc = gl.arange(0, 2, layout=gl.SliceLayout(1, pair_bc))
    n_bc = gl.expand_dims(gl.arange(0, 2 * N, layout=gl.SliceLayout(0, pair_bc)), 0)
    du_ptr += direction.to(gl.int64) * u_direction + gl.expand_dims(d_pair, 0)  # the sum can need 64 bits
    ddt_ptr += direction.to(gl.int64) * u_direction + gl.expand_dims(d_pair, 0)
    dbc_ptr += (direction * gl.num_programs(0) + block).to(gl.int64) * block_stride + n_bc
    gaps_ptr += direction * gaps_direction
    if HAS_D:
        D_ptr = D0_ptr
        if direction == 1:
            D_ptr = D1_ptr
        skip = gl.expand_dims(gl.load(D_ptr + d_pair, mask=ok_pair, other=0.0).to(gl.float32), 0)

    if HAS_ADJOINT:
        R = gl.load(adjoint_ptr + state_at + at, mask=ok, other=0.0)
    else:
        R = gl.zeros([N, BLOCK], gl.float32, layout=state)
    u_s = gl.allocate_shared_memory(gl.float32, [INTERVAL, BLOCK], row)
    dt_s = gl.allocate_shared_memory(gl.float32, [INTERVAL, BLOCK], row)
    dy_s = gl.allocate_shared_memory(gl.float32, [INTERVAL, BLOCK], row)
    bc_s = gl.allocate_shared_memory(gl.float32, [2 * INTERVAL, N], row)
    h_s = gl.allocate_shared_memory(gl.float32, [INTERVAL // GROUP - 2, N, BLOCK], view)
    along_s = ()
    decayed_s = ()
    dbc_s = ()
    for _ in gl.static_range(GROUP // 2):
        along_s = along_s + (gl.allocate_shared_memory(gl.float32, [2, STATE_LANES, BLOCK], view3),)
        decayed_s = decayed_s + (gl.allocate_shared_memory(gl.float32, [2, STATE_LANES, BLOCK], view3),)
        dbc_s = dbc_s + (gl.allocate_shared_memory(gl.float32, [2, CHANNEL_LANES, 2 * N], swizzled3),)
    u_pairs = view_of(u_s, gl.float32, [INTERVAL // 2, 2, BLOCK], view)
    dt_pairs = view_of(dt_s, gl.float32, [INTERVAL // 2, 2, BLOCK], view)
    dy_pairs = view_of(dy_s, gl.float32, [INTERVAL // 2, 2, BLOCK], view)
    drates = gl.zeros([N, BLOCK], gl.float32, layout=state)
    dD = gl.zeros([2, BLOCK], gl.float32, layout=pair)
    ddt_sum = gl.zeros([2, BLOCK], gl.float32, layout=pair)
    by_channel: gl.constexpr = gl.SliceLayout(0, state)
    by_state: gl.constexpr = gl.SliceLayout(1, state)
    intervals = gl.cdiv(count, INTERVAL)
    for j in range(0, intervals):
        interval, rows, start = _place(j, intervals, first, count, backwards, INTERVAL)
        saved_ptr = states_ptr + interval.to(gl.int64) * N * channels + at
        h = gl.load(saved_ptr, mask=ok, other=0.0).to(gl.float32)
        u = _fetch(u_ptr, channels, start, step, rows, column, channels, INTERVAL, BLOCK, rows_layout)
        dt = _fetch(dt_ptr, channels, start, step, rows, column, channels, INTERVAL, BLOCK, rows_layout)
        dy = _fetch(dy_ptr, channels, start, step, rows, column, channels, INTERVAL, BLOCK, rows_layout)
        bc = _fetch(bc_ptr, 2 * N, start, step, rows, 0, 2 * N, INTERVAL, 2 * N, bc_layout)
        if GATE:
            z = _fetch(z_ptr, z_stride, start, step, rows, column, channels, INTERVAL, BLOCK, rows_layout)
            ours = gl.where(direction == 0, rows, 0)
            y = _fetch(ungated_ptr, channels, start, step, ours, column, channels, INTERVAL, BLOCK, rows_layout)
        # The next tile comes near while this one is worked on: registers for it there are none.
        behind, _rows, next_start = _place(
            gl.minimum(j + 1, intervals - 1), intervals, first, count, backwards, INTERVAL
        )
        _touch(u_ptr, channels, next_start, step, column, INTERVAL, BLOCK, 16, touch)
        _touch(dt_ptr, channels, next_start, step, column, INTERVAL, BLOCK, 16, touch)
        _touch(dy_ptr, channels, next_start, step, column, INTERVAL, BLOCK, 16, touch)
        _touch(bc_ptr, 2 * N, next_start, step, 0, INTERVAL, 2 * N, 8, touch)
        _touch(states_ptr + behind.to(gl.int64) * N * channels, channels, 0, 1, column, N, BLOCK, 16, touch)
        if GATE:
            _touch(z_ptr, z_stride, next_start, step, column, INTERVAL, BLOCK, 16, touch)
            _touch(ungated_ptr, channels, next_start, step, column, INTERVAL, BLOCK, 16, touch)
        dy = SCALE * dy.to(gl.float32)
        if GATE:
            z = z.to(gl.float32)
            gate = reciprocal(1.0 + gl.exp2(z * -LOG2E))
            dy = dy * gate
            if direction == 0:
                dz = dy * y.to(gl.float32) * (1.0 + z * (1.0 - gate))
                _put(dz_ptr, dz_stride, start, step, rows, column, channels, dz, INTERVAL, BLOCK, rows_layout)
            dy = dy * z
        view_of(u_s, gl.float32, [INTERVAL, BLOCK], view).store(u.to(gl.float32))
        view_of(dt_s, gl.float32, [INTERVAL, BLOCK], view).store(dt.to(gl.float32))
        view_of(dy_s, gl.float32, [INTERVAL, BLOCK], view).store(dy)
        view_of(bc_s, gl.float32, [INTERVAL, 2 * N], view).store(bc)
        groups = gl.cdiv(rows, GROUP)
        for group in range(0, groups - 1):
            for k in gl.static_range(GROUP):
                i = group * GROUP + k
                x = u_s.index(i).load(by_channel)
                tau = dt_s.index(i).load(by_channel)
                B = bc_s.index(2 * i).load(by_state)
                h = gl.fma(
                    gl.exp2(gl.expand_dims(tau, 0) * rates), h, gl.expand_dims(tau * x, 0) * gl.expand_dims(B, 1)
                )
            if group < groups - 2:
                h_s.index(group).store(h)
        for back in range(0, groups):
            group = groups - 1 - back
            entered = h
            h_l = ()
            decay_l = ()
            for k in gl.static_range(GROUP):
                i = group * GROUP + k
                x = u_s.index(i).load(by_channel)
                tau = dt_s.index(i).load(by_channel)
                B = bc_s.index(2 * i).load(by_state)
                decay = gl.exp2(gl.expand_dims(tau, 0) * rates)
                h = gl.fma(decay, h, gl.expand_dims(tau * x, 0) * gl.expand_dims(B, 1))
                h_l = h_l + (h,)
                decay_l = decay_l + (decay,)
            for half in gl.static_range(GROUP // 2 - 1, -1, -1):
                along_l = ()
                decayed_l = ()
                dbc_l = ()
                for k in gl.static_range(2 * half + 1, 2 * half - 1, -1):
                    i = group * GROUP + k
                    x = u_s.index(i).load(by_channel)
                    tau = dt_s.index(i).load(by_channel)
                    g_out = dy_s.index(i).load(by_channel)
                    B = bc_s.index(2 * i).load(by_state)
                    C = bc_s.index(2 * i + 1).load(by_state)
                    g = R + gl.expand_dims(C, 1) * gl.expand_dims(g_out, 0)
                    R = decay_l[k] * g
                    decayed = R * (h_l[k - 1] if k > 0 else entered)
                    drates += decayed * gl.expand_dims(tau, 0)
                    dB = _of_channels(g * gl.expand_dims(tau * x, 0), CHANNEL_LANES)
                    dC = _of_channels(h_l[k] * gl.expand_dims(g_out, 0), CHANNEL_LANES)
                    dbc = gl.reshape(gl.permute(gl.join(dB, dC), (0, 2, 1)), [CHANNEL_LANES, 2 * N])
                    along_l = (_of_states(g * gl.expand_dims(B, 1), STATE_LANES),) + along_l
                    decayed_l = (_of_states(decayed * rates, STATE_LANES),) + decayed_l
                    dbc_l = (dbc,) + dbc_l
                along_s[half].store(_pair(along_l[0], along_l[1]))
                decayed_s[half].store(_pair(decayed_l[0], decayed_l[1]))
                dbc_s[half].store(_pair(dbc_l[0], dbc_l[1]))
            for half in gl.static_range(GROUP // 2 - 1, -1, -1):
                position = group * GROUP + 2 * half
                along_B = gl.convert_layout(gl.sum(along_s[half].load(of_states), axis=1), pair)
                ddt = gl.convert_layout(gl.sum(decayed_s[half].load(of_states), axis=1), pair) * LN2
                dbc = gl.convert_layout(gl.sum(dbc_s[half].load(of_channels), axis=1), pair_bc)
                x = u_pairs.index(position // 2).load(pair)
                tau = dt_pairs.index(position // 2).load(pair)
                g_out = dy_pairs.index(position // 2).load(pair)
                ddt = gl.fma(x, along_B, ddt)
                du = tau * along_B
                if HAS_D:
                    du = gl.fma(skip, g_out, du)
                    dD += g_out * x
                if GAPS:
                    gap = gl.load(gaps_ptr + start + step * (position + p), mask=(position + p) < rows, other=1.0)
                    gap = gl.expand_dims(gap, 1)
                    ddt = ddt * gap * (1.0 - gl.exp2(tau * reciprocal(gap) * -LOG2E))
                elif SOFTPLUS:
                    ddt = ddt * (1.0 - gl.exp2(tau * -LOG2E))
                here = gl.expand_dims((position + p) < rows, 1) & gl.expand_dims(ok_pair, 0)
                ddt_sum += gl.where(here, ddt, 0.0)
                at_row = gl.expand_dims(start + step * (position + p), 1) * channels
                gl.store(du_ptr + at_row, du.to(du_ptr.dtype.element_ty), mask=here)
                gl.store(ddt_ptr + at_row, ddt.to(ddt_ptr.dtype.element_ty), mask=here)
                at_row = gl.expand_dims(start + step * (position + p_bc), 1) * (2 * N)
                gl.store(dbc_ptr + at_row, dbc, mask=gl.expand_dims((position + p_bc) < rows, 1))
            if group > 1:
                h = h_s.index(group - 2).load(state)
            else:
                h = gl.load(saved_ptr, mask=ok & (group == 1), other=0.0).to(gl.float32)
    gl.store(drates_ptr + state_at + at, drates, mask=ok)
    sums = sums_ptr + (direction * gl.num_programs(1) + chunk).to(gl.int64) * 2 * channels + d_pair
    gl.store(sums, gl.sum(dD, axis=0), mask=ok_pair)
    gl.store(sums + channels, gl.sum(ddt_sum, axis=0), mask=ok_pair)
    if STORE_DH0:
        gl.store(dh0_ptr + state_at + at, R, mask=ok)
