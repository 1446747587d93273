"""Who computes what: sequences, tiles and channel blocks dealt to the worker threads, the same way every time."""

import functools
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba.core import config
from torch import Tensor

from vim_kernels.cpu_backend.records import TILE
from vim_kernels.cpu_backend.vector import LANES

TOLERATED_IMBALANCE = 1.03


class Plan(NamedTuple):
    """Int64 arrays for the kernels; `tokens` counts all of them, `groups` the groups of channel blocks."""

    tokens: int
    sequences: int
    groups: int
    workers: int
    widest: int
    """Most channel blocks of a task."""
    borders: np.ndarray
    """(sequences + 1,) first token of each sequence."""
    chunks: np.ndarray
    """(sequences,) first tile of each sequence among all tiles."""
    tasks: np.ndarray
    """(tasks, 4): sequence, first block, last block, group; sorted by worker."""
    task_starts: np.ndarray
    """(workers + 1,)"""
    pieces: np.ndarray
    """(pieces, 3): sequence, first token, end; sorted by worker."""
    piece_starts: np.ndarray
    """(workers + 1,)"""

    def scratch(self, vectors: int) -> np.ndarray:
        """For each worker, float32 memory of so many vectors and what `aligned` may skip.

        The kernels work on bare addresses, so an array of their own would be freed after its last mention in the code,
        which comes before its last use.
        """
        return np.empty((self.workers, LANES * (vectors + 1)), np.float32)


def plan_for(x: Tensor, cu_seqlens: Tensor | None) -> Plan:
    """The plan of tokens (b, l, d), d a multiple of 16, for the threads that PyTorch may use now."""
    workers = thread_count()
    blocks = x.shape[-1] // LANES
    if cu_seqlens is None:
        return _plan_batch(x.shape[0], x.shape[1], blocks, workers)
    return _plan(tuple(cu_seqlens.tolist()), blocks, workers)


def thread_count() -> int:
    """PyTorch's number of threads, which Numba is told too."""
    threads = torch.get_num_threads()
    workers = min(threads, config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]
    numba.set_num_threads(workers)
    if torch.get_num_threads() != threads:  # Numba, when it starts its threads, changes OpenMP's number for all
        torch.set_num_threads(threads)
    return workers


def tile_bound(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Tiles that any cu_seqlens of this many images needs at most; exact without packing."""
    if cu_seqlens is None:
        return x.shape[0] * ((x.shape[1] + TILE - 1) // TILE)
    return x.shape[1] // TILE + cu_seqlens.shape[0] - 1


@functools.lru_cache(maxsize=64)
def _plan_batch(batch: int, length: int, blocks: int, workers: int) -> Plan:
    return _plan(tuple(length * i for i in range(batch + 1)), blocks, workers)


@functools.lru_cache(maxsize=64)
def _plan(borders: tuple[int, ...], blocks: int, workers: int) -> Plan:
    lengths = np.diff(borders)
    tiles = (lengths + TILE - 1) // TILE
    groups, shares = _deal(lengths, blocks, workers)
    tasks = [
        (sequence, blocks * group // groups, blocks * (group + 1) // groups, group)
        for items in shares
        for sequence, group in items
    ]
    pieces = _cut(borders, workers)
    return Plan(
        tokens=borders[-1],
        sequences=len(lengths),
        groups=groups,
        workers=workers,
        widest=max((last - first for _, first, last, _ in tasks), default=0),
        borders=np.array(borders, np.int64),
        chunks=(np.cumsum(tiles) - tiles).astype(np.int64),
        tasks=np.array(tasks, np.int64).reshape(-1, 4),
        task_starts=_starts(shares),
        pieces=np.array([piece for items in pieces for piece in items], np.int64).reshape(-1, 3),
        piece_starts=_starts(pieces),
    )


def _starts(items: list[list]) -> np.ndarray:
    return np.cumsum([0, *map(len, items)]).astype(np.int64)


def _deal(lengths: np.ndarray, blocks: int, workers: int) -> tuple[int, list[list[tuple[int, int]]]]:
    """Fewest groups of channel blocks that load the workers evenly, and each worker's (sequence, group) pairs.

    Few groups, because every group reads B and C again and, in the backward, keeps partial sums of its own.
    """
    best: tuple[float, int, list] = (float("inf"), 1, [[] for _ in range(workers)])
    ideal = float(lengths.sum()) * blocks / workers
    for groups in range(1, max(blocks, 1) + 1):
        sizes = [blocks * (group + 1) // groups - blocks * group // groups for group in range(groups)]
        items = sorted(
            ((int(length) * size, s, g) for s, length in enumerate(lengths) for g, size in enumerate(sizes)),
            key=lambda item: (-item[0], item[1], item[2]),
        )
        loads, shares = [0] * workers, [[] for _ in range(workers)]
        for cost, sequence, group in items:
            least = min(range(workers), key=loads.__getitem__)
            loads[least] += cost
            shares[least].append((sequence, group))
        if max(loads) < best[0]:
            best = (max(loads), groups, shares)
        if max(loads) <= TOLERATED_IMBALANCE * ideal:
            break
    return best[1], best[2]


def _cut(borders: tuple[int, ...], workers: int) -> list[list[tuple[int, int, int]]]:
    """The tokens in `workers` even runs, each cut at the borders of sequences: (sequence, first token, end)."""
    total, sequence, runs = borders[-1], 0, []
    for worker in range(workers):
        first, end, run = total * worker // workers, total * (worker + 1) // workers, []
        while first < end:
            while borders[sequence + 1] <= first:
                sequence += 1
            stop = min(end, borders[sequence + 1])
            run.append((sequence, first, stop))
            first = stop
        runs.append(run)
    return runs
