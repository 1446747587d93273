"""A backbone on one sequence that several processes hold in stretches: see `vim_backbone.stretch`.

    stretch = Stretch.of(tokens.shape[1], tokens.device)
    special, patches = encode_stretch(model, tokens, stretch)

Every process has the whole model, and calls the same functions in the same order; each has a loss of its own patches.
"""

from torch import Tensor

from vim_backbone.errors import UserError
from vim_backbone.hand_over import Given, hand_over
from vim_backbone.lines import Grid
from vim_backbone.stretch import Stretch, StretchLayout
from vim_backbone.vim import VisionMamba


def rows_of(grid: Grid, rank: int, size: int) -> range:
    """Rows of patches of a process, as many as the others have, or one more."""
    return range(grid[0] * rank // size, grid[0] * (rank + 1) // size)


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
    h: Tensor = model.join_special(patches, layout, patches.shape[0])
    residual: Tensor | None = None
    del patches  # as in `model.encode`, the memory of what is used up is free while the blocks run
    for block in model.layers:
        given: tuple[Given[Tensor], Given[Tensor | None]] = hand_over(h, block), hand_over(residual, block)
        del h, residual
        h, residual = block(*given, stretch=stretch)
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


__all__ = ["Stretch", "check", "encode_stretch", "pool_stretch", "rows_of"]
