"""A backbone on one sequence that several processes hold in stretches: see `vim_backbone.stretch`.

    stretch = Stretch.of(tokens.shape[1], tokens.device)
    special, patches = encode_stretch(model, tokens, stretch)

Every process has the whole model, and calls the same functions in the same order; each has a loss of its own patches.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vim_backbone.block import run_blocks
from vim_backbone.errors import UserError
from vim_backbone.inputs import grid_of
from vim_backbone.lines import Grid
from vim_backbone.mixer import ScanMetadata
from vim_backbone.position import windowed_table, with_channels
from vim_backbone.stretch import Stretch, StretchLayout
from vim_backbone.tokens import TokenLayout
from vim_backbone.vim import VisionMamba


def rows_of(grid: Grid, rank: int, size: int) -> range:
    """Rows of patches of a process, as many as the others have, or one more."""
    return range(grid[0] * rank // size, grid[0] * (rank + 1) // size)


@dataclass(frozen=True)
class Rows:
    """What a process holds of a picture: some of its rows of patches, behind those of the processes before it."""

    here: range
    grid: Grid
    """Of the whole picture."""
    group: Any = None
    """The processes, of `torch.distributed`; None for all."""

    def stretch(self, length: int, device: torch.device) -> Stretch:
        """Of a sequence of which this process has `length` tokens; every process of the group must call it."""
        return Stretch.of(length, device, self.group)

    def of_table(self, table: Tensor, layout: TokenLayout, size: Grid) -> Tensor:
        """Positions (1, places here, d_model) of a table made for the grid `size`."""
        return windowed_table(table, layout, size, self.grid)(slice(self.here.start, self.here.stop), slice(None))


def embed_rows(model: VisionMamba, images: Tensor, rows: Rows) -> Tensor:
    """Pixels of some rows of patches (b, c, h, w) -> their tokens (b, l, d_model), as `model.embed_patches` has them.

    Raises UserError for pixels of other rows than these, and for patches that overlap.
    """
    grid = grid_of(images, model.config)
    if grid != (len(rows.here), rows.grid[1]) or model.config.stride != model.config.patch_size:
        expected = f"{len(rows.here)} x {rows.grid[1]} patches that do not overlap"
        raise UserError(f"pictures have {grid[0]} x {grid[1]} patches: for {rows.here} of {rows.grid} give {expected}")
    positions = rows.of_table(model.pos_embed, model.position_layout, model.grid_size)
    if model.channel_embed is not None:
        positions = with_channels(positions, model.channel_embed, model.config.channels_of(images.shape[1]))
    return model.patch_embed(images.to(model.patch_embed.proj.weight.dtype)) + positions


def encode_stretch(model: VisionMamba, patches: Tensor, stretch: Stretch) -> tuple[Tensor, Tensor]:
    """Patch tokens of this process -> normed: special tokens, in every process all, and the patches of this one.

    As `model.encode` of the whole sequence (there batched, not packed).

    Args:
        model: the same in every process.
        patches: (b, l, d_model) with the positions that they have in the picture; masked, the visible ones.
        stretch: where they are in the sequence.

    Returns:
        (b, special, d_model), (b, l, d_model).

    Raises:
        UserError: for a pooled scan, for stochastic depth in training, which each process would draw anew, and for
            a stretch that is shorter than the convolution's taps.
    """
    check(model, patches, stretch)
    layout = StretchLayout(model.layout, stretch)
    h = [model.join_special(patches, layout, patches.shape[0])]
    del patches
    h, residual = run_blocks(model.layers, h, ScanMetadata(stretch=stretch))
    return layout.split(model.norm_f(h, residual)[0])


def pool_stretch(model: VisionMamba, special: Tensor, patches: Tensor, stretch: Stretch) -> Tensor:
    """What `encode_stretch` gave -> the pooled features (b, d_model) of the whole picture, in every process.

    A loss of them is to be in every process, divided by their number.
    """
    if model.global_pool == "token":
        return special[:, 0]
    return stretch.total(patches.sum(dim=1)) / sum(stretch.lengths)


def check(model: VisionMamba, patches: Tensor, stretch: Stretch) -> None:
    """Raise UserError for what cannot be done over several processes."""
    config = model.config
    if config.scan == "pooled":
        raise UserError("scan is 'pooled', whose lines cross the stretches of the processes: take scan 'full'")
    if model.training and config.drop_path_rate:
        raise UserError(
            f"drop_path_rate is {config.drop_path_rate}: every process would drop other blocks; set it to 0"
        )
    stretch.check(config.d_conv)
    if patches.shape[1] != stretch.lengths[stretch.rank]:
        raise UserError(f"there are {patches.shape[1]} patches, the stretch has {stretch.lengths[stretch.rank]}")
