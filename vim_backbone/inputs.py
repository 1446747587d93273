"""What the model takes, and what it says about anything else."""

from collections.abc import Sequence

from torch import Tensor

from vim_backbone.config import VimConfig
from vim_backbone.errors import UserError
from vim_backbone.lines import Grid

Images = Tensor | Sequence[Tensor]
"""Pictures (b, c, h, w), or a list of pictures (c, h, w) of any sizes."""


def number_of(images: Images) -> int:
    """How many pictures; a symbol in an exported program, which len() could not give."""
    return images.shape[0] if isinstance(images, Tensor) else len(images)


def grid_of(images: Tensor, config: VimConfig) -> Grid:
    """Rows and columns of patches of a batch (b, c, h, w). Raises UserError, saying what to do, for anything else."""
    shape = tuple(images.shape)
    if images.dim() != 4:
        remedy = "a picture alone has no batch axis, add it as images[None]" if images.dim() == 3 else "give a batch"
        raise UserError(f"pictures have shape {shape}, they must be (batch, channels, h, w): {remedy}")
    if not images.is_floating_point():
        raise UserError(
            f"pictures are {images.dtype}: the model takes normalised floats, which the transform of "
            "vim_backbone.load makes of them"
        )
    try:
        config.channels_of(shape[1])
    except UserError as error:
        last = ": channels come first, as images.permute(0, 3, 1, 2)" if shape[3] == config.in_chans else ""
        raise UserError(f"{error}{last}") from error
    try:
        return config.grid(*shape[-2:])
    except UserError as error:
        raise UserError(f"{error}; the transform of vim_backbone.load pads pictures") from error
