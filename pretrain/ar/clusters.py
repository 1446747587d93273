"""Clusters of patches, one predicted from those before it: their numbers, their order, and what predicts which patch.

Shape letters: l patches, m patches that are predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vim_backbone.errors import require


@dataclass(frozen=True, kw_only=True)
class ARConfig:
    """What is predicted at a time, and the decoder, which is thrown away after pretraining."""

    cluster: int | None = None
    """Side in patches of the squares that are predicted one after the other, and scanned so while pretraining (ARM);
    null: a row of patches at a time, in the order of every Vim's scan (MAP)."""
    width: int = 512
    """Channels of the decoder."""
    depth: int = 2
    """Its blocks, which work on each patch by itself."""

    def __post_init__(self) -> None:
        require(
            self.cluster is None or self.cluster >= 1,
            "ar.cluster",
            self.cluster,
            "it must be at least 1 patch, or null",
        )
        require(self.width >= 4 and self.width % 4 == 0, "ar.width", self.width, "it must be a multiple of 4")
        require(self.depth >= 1, "ar.depth", self.depth, "it must be at least 1")


class Targets(NamedTuple):
    """What one direction predicts, as places in scan order: (m,) each."""

    patches: Tensor
    near: Tensor
    """The patch of the cluster before that is at the same place in it, or its last one."""
    whole: Tensor
    """The patch at which all of the cluster before was seen."""


class Plan(NamedTuple):
    """Of pictures of one shape, or of all in a row."""

    order: Tensor
    """(l,) the patch at every place in scan order."""
    ahead: Targets
    back: Targets
    counts: list[int] | None = None
    """Patches that are predicted of each picture, by both directions; None where all have one shape."""


def number_clusters(grid: tuple[int, int], cluster: int | None) -> Tensor:
    """The cluster (l,) of each patch, row by row. Those at the right and lower edge are cut off by the picture.

    Where all would be one cluster, each patch is one.
    """
    rows, columns = grid
    down, across = (1, columns) if cluster is None else (cluster, cluster)
    wide = -(-columns // across)
    numbers = (torch.arange(rows)[:, None] // down * wide + torch.arange(columns) // across).flatten()
    return numbers if numbers[-1] > 0 else torch.arange(rows * columns)


def plan(numbers: Tensor) -> Plan:
    """From the cluster (l,) of each patch; clusters follow each other by their numbers, each with its patches in order.

    The backward direction sees the clusters from the last one to the first, and the patches of each likewise.
    """
    of_place, order = torch.sort(numbers, stable=True)
    sizes = torch.bincount(numbers)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(numbers))
    within = place - starts[of_place]
    patches, after = place[of_place > 0], of_place[of_place > 0] - 1
    ahead = Targets(
        patches, starts[after] + torch.minimum(within[patches], sizes[after] - 1), starts[after] + sizes[after] - 1
    )
    patches, after = place[of_place < len(sizes) - 1], of_place[of_place < len(sizes) - 1] + 1
    back = Targets(patches, starts[after] + torch.minimum(within[patches], sizes[after] - 1), starts[after])
    return Plan(order, ahead, back)


def packed_plan(numbers: Sequence[Tensor]) -> Plan:
    """Of pictures in a row, each alone."""
    plans = [plan(each) for each in numbers]
    starts = [0]
    for each in plans:
        starts.append(starts[-1] + len(each.order))

    def row(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part + start for part, start in zip(parts, starts, strict=False)])

    ahead = Targets(*(row(parts) for parts in zip(*(each.ahead for each in plans), strict=True)))
    back = Targets(*(row(parts) for parts in zip(*(each.back for each in plans), strict=True)))
    counts = [len(each.ahead.patches) for each in plans], [len(each.back.patches) for each in plans]
    return Plan(row([each.order for each in plans]), ahead, back, [*counts[0], *counts[1]])
