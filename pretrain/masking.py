"""Which patches are hidden: a bool mask in scan order, True = hidden, always the same count for one grid."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vim_backbone.errors import require


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What the encoder does not see."""

    ratio: float = 0.75
    """Share of the patches that is hidden, between 0 and 1."""
    kind: Literal["random", "block"] = "random"
    """random: patch by patch. block: in square units, for high resolution, where neighbouring patches are alike."""
    unit: int = 2
    """Side of a block in patches (kind=block)."""

    def __post_init__(self) -> None:
        require(0.0 < self.ratio < 1.0, "mask.ratio", self.ratio, "it must lie between 0 and 1, both excluded")
        require(self.unit >= 1, "mask.unit", self.unit, "it must be at least 1 patch")

    def num_masked(self, num_patches: int) -> int:
        """Hidden patches out of `num_patches`: at least one, and at least one left to see."""
        return min(max(1, round(self.ratio * num_patches)), num_patches - 1)


def draw_mask(grid: tuple[int, int], config: MaskConfig, generator: torch.Generator) -> Tensor:
    """A mask (rows * columns,) with exactly `config.num_masked` True.

    Every unit gets a random score and whole units are hidden from the highest down; the last one is hidden in part
    where the count does not come out even. Units at the right and lower edge are cut off by the picture.
    """
    rows, columns = grid
    unit = config.unit if config.kind == "block" else 1
    score = torch.rand(-(-rows // unit), -(-columns // unit), generator=generator).numpy()
    if unit > 1:
        score = score.repeat(unit, 0)[:rows].repeat(unit, 1)[:, :columns]
    within_unit = torch.rand(rows * columns, generator=generator).numpy()
    # bits of a float that is not negative are in its order: patches by their score, highest first, then within a unit
    place = (~score.view(np.uint32).ravel()).astype(np.uint64) << 32 | within_unit.view(np.uint32)
    count = config.num_masked(rows * columns)
    mask = np.zeros(rows * columns, bool)
    mask[np.argpartition(place, count - 1)[:count]] = True
    return torch.from_numpy(mask)
