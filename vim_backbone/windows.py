"""A picture too large for memory as one sequence: patches are embedded window by window, as they are read.

Shape letters: b = 1 picture, c h w a window in pixels, l patch tokens of the whole picture.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vim_backbone.config import VimConfig
from vim_backbone.errors import UserError
from vim_backbone.lines import Grid, batch_lines
from vim_backbone.position import windowed_table, with_channels
from vim_backbone.vim import VisionMamba


class Window(NamedTuple):
    """Patches of a grid from one row and column to before another."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        return self.bottom - self.top, self.right - self.left

    def pixels(self, config: VimConfig) -> tuple[int, int, int, int]:
        """Left, upper, right and lower edge in pixels of what its patches see."""
        more = config.patch_size - config.stride
        top, left, bottom, right = (config.stride * edge for edge in self)
        return left, top, right + more, bottom + more


def windows(grid: Grid, side: int, rows: range | None = None) -> Iterator[Window]:
    """Windows of at most `side` rows and columns that cover a grid, or some of its rows, row by row."""
    if side < 1:
        raise UserError(f"windows of {side} patches are none: give at least 1")
    rows = range(grid[0]) if rows is None else rows
    for top in range(rows.start, rows.stop, side):
        for left in range(0, grid[1], side):
            yield Window(top, left, min(top + side, rows.stop), min(left + side, grid[1]))


Read = Callable[[Window], Tensor]
"""A window -> its pixels (1, c, h, w), normalised floats, h and w those of `Window.pixels`."""


@torch.inference_mode()
def embed_by_window(model: VisionMamba, grid: Grid, read: Read, side: int = 128, rows: range | None = None) -> Tensor:
    """Patch tokens with their positions (1, l, d_model), as `model.embed_patches` makes them of the whole picture.

    Beside the tokens no more than a window is held at a time.

    Args:
        model: the backbone; tokens are in the dtype and on the device of its weights.
        grid: rows and columns of patches of the whole picture.
        read: gives the pixels of a window; it is asked for each once, row by row.
        side: rows and columns of patches of a window.
        rows: of patches, of which alone tokens are made; None: all.

    Raises:
        UserError: for a window of another size, or with channels that the model does not take.
    """
    config, weight = model.config, model.patch_embed.proj.weight
    positions_of = windowed_table(model.pos_embed, model.position_layout, model.grid_size, grid)
    rows = range(grid[0]) if rows is None else rows
    tokens = weight.new_empty(0)
    for window in windows(grid, side, rows):
        pixels = read(window)
        left, top, right, bottom = window.pixels(config)
        if pixels.shape[0] != 1 or pixels.shape[2:] != (bottom - top, right - left):
            expected = f"(1, channels, {bottom - top}, {right - left})"
            raise UserError(f"the window {tuple(window)} has pixels {tuple(pixels.shape)}, they must be {expected}")
        channels = config.channels_of(pixels.shape[1])
        if not tokens.numel():
            tokens = weight.new_empty(len(rows), grid[1], config.tokens_a_patch(len(channels)), config.d_model)
        positions = positions_of(slice(window.top, window.bottom), slice(window.left, window.right))
        if model.channel_embed is not None:
            positions = with_channels(positions, model.channel_embed, channels)
        embedded = model.patch_embed(pixels.to(weight)) + positions
        there = tokens[window.top - rows.start : window.bottom - rows.start, window.left : window.right]
        there.copy_(embedded.reshape(there.shape))
    return tokens.view(1, -1, config.d_model)


@torch.inference_mode()
def encode_by_window(model: VisionMamba, grid: Grid, read: Read, side: int = 128) -> tuple[Tensor, Tensor]:
    """One picture as one sequence: special tokens (1, special, d_model), patches (1, l, d_model), all normed.

    As `model.forward_features` of the whole picture; arguments and errors are those of `embed_by_window`.
    """
    tokens = [embed_by_window(model, grid, read, side)]
    lines = None
    if model.config.scan == "pooled":
        a_patch = tokens[0].shape[1] // (grid[0] * grid[1])
        lines = batch_lines(1, grid, tokens[0].device, share=model.config.visible_share, tokens=a_patch)
    return model.encode(tokens.pop(), lines=lines)
