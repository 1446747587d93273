"""Backward kernel of the selective scan, in core Triton. Shapes and chunks as in `scan_forward`.

With g_t = dL/dh_t: R_t = a_t g_t is what passes to the token before, g_t = C_t dy_t + R_{t+1}, and
a_t h_{t-1} = h_t - dt_t u_t B_t, so that no state is divided by its decay. One interval at a time, from the last to the
first: the states are computed again from the saved one, every GROUP-th is kept in scratch, then the tokens are walked
back with a group of states in registers. Every sum has a fixed order: over the channels of a program in registers, over
programs by a second reduction of the partial sums. No atomics.
"""

# ruff: noqa: RUF005 - Triton's language has no starred tuples, and folds only plain `if`s on constants
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.chunks import chunk_rows
from vim_kernels.triton_backend.elementary import LN2, LOG2E


# With a row stride known to be a multiple of 16 the tile spreads over 4 states x 4 channels a thread, and the sums over
# channels need a quarter of the shuffles: here, unlike in the forward kernel, that is wanted.
@triton.jit
def scan_backward_kernel(
    u_ptr, dt_ptr, bc_ptr, dy_ptr,  # (q, rows, d), (q, rows, d), (q, rows, 2 n) float32, (rows, d)
    rates_ptr, D0_ptr, D1_ptr,  # (q, n, d) float32, (d,)
    states_ptr, adjoint_ptr,  # (q, slots, n, d), (q, chunks, n, d)
    du_ptr, ddt_ptr, dbc_ptr,  # (q, rows, d), (q, rows, d), (q, blocks, rows, 2 n) partial sums
    drates_ptr, sums_ptr, dh0_ptr,  # (q, chunks, n, d), (q, chunks, 2, d) partial sums of D and dt, (q, chunks, n, d)
    table_ptr, length, chunk_size, chunks_per_sequence, slots_per_sequence,
    channels, u_direction, bc_direction, chunk_direction, slot_direction, block_stride,
    scratch_ptr, scratch_stride,  # a block a program
    gaps_ptr, gaps_direction,  # (q, rows) float32, where GAPS
    REVERSE: tl.constexpr, PACKED: tl.constexpr, HAS_D: tl.constexpr, HAS_ADJOINT: tl.constexpr,
    STORE_DH0: tl.constexpr, SOFTPLUS: tl.constexpr, GAPS: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, INTERVAL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, chunks, directions). SOFTPLUS: ddt is for the value before softplus.

    With GAPS dt is the gap times softplus, whose slope 1 - exp(-softplus) is found from dt over the gap.
    """
    block = tl.program_id(0)
    chunk = tl.program_id(1)
    direction = tl.program_id(2)
    n = tl.arange(0, N)
    d = block * BLOCK + tl.arange(0, BLOCK)
    ok = d < channels
    tile = n[:, None] * channels + d[None, :]
    first, count, slot = chunk_rows(
        chunk, table_ptr, length, chunk_size, chunks_per_sequence, slots_per_sequence, INTERVAL, PACKED
    )
    backwards = (direction == 1) != REVERSE
    step = tl.where(backwards, -1, 1)
    u_ptr += direction * u_direction
    dt_ptr += direction * u_direction
    bc_ptr += direction * bc_direction
    du_ptr += direction * u_direction
    ddt_ptr += direction * u_direction
    dbc_ptr += (direction * tl.num_programs(0) + block).to(tl.int64) * block_stride
    gaps_ptr += direction * gaps_direction
    states_ptr += direction * slot_direction + slot * N * channels
    state = direction * chunk_direction + chunk.to(tl.int64) * N * channels
    rates = tl.load(rates_ptr + direction * N * channels + tile, mask=ok[None, :], other=0.0)
    if HAS_D:
        D_ptr = D0_ptr if direction == 0 else D1_ptr
        skip = tl.load(D_ptr + d, mask=ok, other=0.0).to(tl.float32)
    if HAS_ADJOINT:
        R = tl.load(adjoint_ptr + state + tile, mask=ok[None, :], other=0.0)
    else:
        R = tl.zeros([N, BLOCK], tl.float32)
    program = (direction * tl.num_programs(1) + chunk).to(tl.int64) * tl.num_programs(0) + block
    scratch = scratch_ptr + program * scratch_stride + n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    drates = tl.zeros([N, BLOCK], tl.float32)
    dD = tl.zeros([BLOCK], tl.float32)
    ddt_sum = tl.zeros([BLOCK], tl.float32)
    intervals = tl.cdiv(count, INTERVAL)
    for j in range(0, intervals):
        interval = tl.where(backwards, j, intervals - 1 - j)
        rows = tl.minimum(INTERVAL, count - interval * INTERVAL)
        start = first + interval * INTERVAL + tl.where(backwards, rows - 1, 0)
        h = tl.load(states_ptr + interval.to(tl.int64) * N * channels + tile, mask=ok[None, :], other=0.0).to(
            tl.float32
        )
        groups = tl.cdiv(rows, GROUP)
        tl.store(scratch, h)
        for group in range(0, groups - 1):
            for i in tl.static_range(GROUP):
                row = start + step * (group * GROUP + i)
                u = tl.load(u_ptr + row * channels + d, mask=ok, other=0.0).to(tl.float32)
                dt = tl.load(dt_ptr + row * channels + d, mask=ok, other=0.0).to(tl.float32)
                B = tl.load(bc_ptr + row * (2 * N) + n)
                h = tl.fma(tl.exp2(dt[None, :] * rates), h, (dt * u)[None, :] * B[:, None])
            tl.store(scratch + (group + 1) * (N * BLOCK), h)
        tl.debug_barrier()
        for k in range(0, groups):
            group = groups - 1 - k
            h = tl.load(scratch + group * (N * BLOCK))
            u_l = ()
            dt_l = ()
            h_l = ()
            decay_l = ()
            for i in tl.static_range(GROUP):
                position = group * GROUP + i
                row = start + step * position
                here = ok & ((d * 0 + position) < rows)  # a block of comparisons: a scalar one cannot join a mask
                u = tl.load(u_ptr + row * channels + d, mask=here, other=0.0).to(tl.float32)
                dt = tl.load(dt_ptr + row * channels + d, mask=here, other=0.0).to(tl.float32)
                B = tl.load(bc_ptr + row * (2 * N) + n, mask=(n * 0 + position) < rows, other=0.0)
                decay = tl.exp2(dt[None, :] * rates)
                h = tl.fma(decay, h, (dt * u)[None, :] * B[:, None])
                u_l = u_l + (u,)
                dt_l = dt_l + (dt,)
                h_l = h_l + (h,)
                decay_l = decay_l + (decay,)
            for i in tl.static_range(GROUP - 1, -1, -1):
                position = group * GROUP + i
                row = start + step * position
                here = ok & ((d * 0 + position) < rows)
                inside = (n * 0 + position) < rows
                B = tl.load(bc_ptr + row * (2 * N) + n, mask=inside, other=0.0)
                C = tl.load(bc_ptr + row * (2 * N) + N + n, mask=inside, other=0.0)
                dy = tl.load(dy_ptr + row * channels + d, mask=here, other=0.0).to(tl.float32)
                u = u_l[i]
                dt = dt_l[i]
                drive = dt * u
                g = R + C[:, None] * dy[None, :]
                along_B = tl.sum(g * B[:, None], axis=0)
                R = decay_l[i] * g
                # the state before the group is read again: held, its registers would spill
                decayed = R * (h_l[i - 1] if i > 0 else tl.load(scratch + group * (N * BLOCK)))
                drates += decayed * dt[None, :]
                ddt = tl.sum(decayed * rates, axis=0) * LN2 + u * along_B
                du = dt * along_B
                if HAS_D:
                    du = tl.fma(skip, dy, du)
                    dD += dy * u
                if GAPS:
                    gap = tl.load(gaps_ptr + row + d * 0, mask=here, other=1.0)
                    ddt = ddt * gap * (1.0 - tl.exp2(dt / gap * -LOG2E))
                elif SOFTPLUS:
                    ddt = ddt * (1.0 - tl.exp2(dt * -LOG2E))
                ddt_sum += tl.where(here, ddt, 0.0)
                tl.store(du_ptr + row * channels + d, du.to(du_ptr.dtype.element_ty), mask=here)
                tl.store(ddt_ptr + row * channels + d, ddt.to(ddt_ptr.dtype.element_ty), mask=here)
                tl.store(dbc_ptr + row * (2 * N) + n, tl.sum(g * drive[None, :], axis=1), mask=inside)
                tl.store(dbc_ptr + row * (2 * N) + N + n, tl.sum(h_l[i] * dy[None, :], axis=1), mask=inside)
        tl.debug_barrier()  # the next interval writes the scratch again
    tl.store(drates_ptr + state + tile, drates, mask=ok[None, :])
    sums = sums_ptr + (direction * tl.num_programs(1) + chunk).to(tl.int64) * 2 * channels + d
    tl.store(sums, dD, mask=ok)
    tl.store(sums + channels, ddt_sum, mask=ok)
    if STORE_DH0:
        tl.store(dh0_ptr + state + tile, R, mask=ok[None, :])
