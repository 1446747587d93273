"""Layouts of the Gluon kernels: which thread holds what of a tile, and what lies where in shared memory."""

import functools
from typing import Any

from triton.experimental.gluon import language as gl


@functools.cache
def tile_layouts(states_thread: int, channels_thread: int, warps: int, block: int, n: int) -> dict[str, Any]:
    """Compile-time layouts for tiles of `block` channels and n states."""
    rows_vector = 8  # 16 bytes of a 16-bit type
    across = min(32, block // rows_vector)
    pair_across = min(32, 2 * n // 4)
    return {
        "state": gl.BlockedLayout(
            [states_thread, channels_thread], [n // states_thread, 32 * states_thread // n], [1, warps], [1, 0]
        ),
        "rows_layout": gl.BlockedLayout([1, rows_vector], [32 // across, across], [warps, 1], [1, 0]),
        "bc_layout": gl.BlockedLayout([1, 4], [32 // pair_across, pair_across], [warps, 1], [1, 0]),
        "row": gl.SwizzledSharedLayout(1, 1, 1, order=[0]),
        "view": gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]),
    }


def block_of(states_thread: int, channels_thread: int, warps: int, n: int) -> int:
    """Channels a program: the lanes that are not on states, times channels a thread, times warps."""
    return 32 * states_thread // n * channels_thread * warps
