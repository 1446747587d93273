"""Layouts of the Gluon kernels: which thread holds what of a tile, and what lies where in shared memory."""

import functools
from typing import Any

from triton.experimental.gluon import language as gl


def _vectors(elements: int, threads: int, row: int, widest: int) -> tuple[int, int]:
    """Elements a thread moves at a time, and threads along a row of `row` elements."""
    vector = max(1, min(widest, elements // threads, row))
    return vector, min(32, row // vector)


@functools.cache
def forward_layouts(
    directions: int, states_thread: int, channels_thread: int, warps: int, tile: int, n: int
) -> dict[str, Any]:
    """Compile-time layouts of the forward kernel, `warps` warps a direction, and how many threads share a channel."""
    block, state_lanes = block_of(states_thread, channels_thread, warps, n), n // states_thread
    vector, across = _vectors(tile * block, 32 * warps, block, 8)  # 16 bytes of a 16-bit type
    bc_vector, bc_across = _vectors(tile * n, 32 * warps, n, 4)
    return {
        "STATE_LANES": state_lanes,
        "state": gl.BlockedLayout(
            [1, states_thread, channels_thread],
            [1, state_lanes, 32 // state_lanes],
            [directions, 1, warps],
            [2, 1, 0],
        ),
        "rows_layout": gl.BlockedLayout([1, 1, vector], [32 // across, 1, across], [warps, directions, 1], [2, 1, 0]),
        "parts": gl.BlockedLayout(
            [1, 1, state_lanes, vector], [32 // across, 1, 1, across], [warps, directions, 1, 1], [3, 2, 1, 0]
        ),
        "bc_layout": gl.BlockedLayout(
            [1, 1, bc_vector], [32 // bc_across, 1, bc_across], [warps, directions, 1], [2, 1, 0]
        ),
        "token": gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]),
        "tile": gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0]),
        # the threads of a warp that share a channel must not meet in a bank
        "sums": gl.SwizzledSharedLayout(block // warps, max(1, 32 // block), warps, order=[3, 2, 1, 0]),
    }


@functools.cache
def backward_layouts(states_thread: int, channels_thread: int, warps: int, n: int) -> dict[str, Any]:
    """Compile-time layouts of the backward kernel, and how many threads share a channel and a state."""
    block = block_of(states_thread, channels_thread, warps, n)
    state_lanes, channel_lanes = n // states_thread, block // channels_thread
    rows_vector = 8  # 16 bytes of a 16-bit type
    across = min(32, block // rows_vector)
    bc_across = min(32, 2 * n // 4)
    vector, pair_across = _vectors(2 * block, 32 * warps, block, 4)
    dbc_vector, dbc_across = _vectors(2 * 2 * n, 32 * warps, 2 * n, 4)
    return {
        "STATE_LANES": state_lanes,
        "CHANNEL_LANES": channel_lanes,
        "state": gl.BlockedLayout(
            [states_thread, channels_thread], [state_lanes, 32 // state_lanes], [1, warps], [1, 0]
        ),
        "rows_layout": gl.BlockedLayout([1, rows_vector], [32 // across, across], [warps, 1], [1, 0]),
        "bc_layout": gl.BlockedLayout([1, 4], [32 // bc_across, bc_across], [warps, 1], [1, 0]),
        "touch": gl.BlockedLayout([1, 1], [16, 2], [1, warps], [1, 0]),
        "pair": gl.BlockedLayout([1, vector], [32 // pair_across, pair_across], [warps, 1], [1, 0]),
        "of_states": gl.BlockedLayout(
            [1, state_lanes, vector], [32 // pair_across, 1, pair_across], [warps, 1, 1], [2, 1, 0]
        ),
        "pair_bc": gl.BlockedLayout([1, dbc_vector], [32 // dbc_across, dbc_across], [warps, 1], [1, 0]),
        "of_channels": gl.BlockedLayout(
            [1, channel_lanes, dbc_vector], [32 // dbc_across, 1, dbc_across], [warps, 1, 1], [2, 1, 0]
        ),
        "row": gl.SwizzledSharedLayout(1, 1, 1, order=[0]),
        "view": gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]),
        "view3": gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0]),
        "swizzled3": gl.SwizzledSharedLayout(4, 1, 8, order=[2, 1, 0]),
    }


def block_of(states_thread: int, channels_thread: int, warps: int, n: int) -> int:
    """Channels a program: the lanes that are not on states, times channels a thread, times warps of a direction."""
    return 32 * states_thread // n * channels_thread * warps
