"""Which patches are hidden: a bool mask in scan order, True = hidden, always the same count for one grid."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from launch.run.randomness import uniforms
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
    return masks_of(grid, config, lambda count: torch.rand(1, count, generator=generator).numpy())[0]


def draw_masks(grid: tuple[int, int], config: MaskConfig, seeds: np.ndarray) -> Tensor:
    """As `draw_mask`, one for each seed (b,) uint64 of `uniforms`: (b, rows * columns)."""
    units = number_of_units(grid, config)
    numbers = uniforms(seeds, units + grid[0] * grid[1])
    parts = iter(np.split(numbers, [units], axis=1))
    return masks_of(grid, config, lambda count: np.ascontiguousarray(next(parts)[:, :count]))


def number_of_units(grid: tuple[int, int], config: MaskConfig) -> int:
    """Units that are hidden as one."""
    unit = config.unit if config.kind == "block" else 1
    return -(-grid[0] // unit) * -(-grid[1] // unit)


def masks_of(grid: tuple[int, int], config: MaskConfig, draw: Callable[[int], np.ndarray]) -> Tensor:
    """Masks (b, rows * columns); `draw` gives uniform numbers (b, count) float32, for units and then for patches."""
    rows, columns = grid
    unit = config.unit if config.kind == "block" else 1
    score = draw(number_of_units(grid, config))
    if unit > 1:
        score = score.reshape(len(score), -(-rows // unit), -1)
        score = score.repeat(unit, 1)[:, :rows].repeat(unit, 2)[:, :, :columns].reshape(len(score), -1)
    within_unit = draw(rows * columns)
    # bits of a float that is not negative are in its order: patches by their score, highest first, then within a unit
    place = (~score.view(np.uint32)).astype(np.uint64) << 32 | within_unit.view(np.uint32)
    count = config.num_masked(rows * columns)
    masks = np.zeros(place.shape, bool)
    np.put_along_axis(masks, np.argpartition(place, count - 1, axis=1)[:, :count], True, axis=1)
    return torch.from_numpy(masks)
