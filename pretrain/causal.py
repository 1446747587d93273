"""What objectives that predict what comes next share: which encoders they can train, and what a step costs them.

The two directions of a Vim are two causal networks here (`VisionMamba.encode` with `apart`): in no block does one see
what the other made, so that nothing comes back from the patches that are to be predicted. The forward one predicts what
comes next, the backward one what came before.
"""

from torch import Tensor

from launch.planning.memory import Stack
from pretrain.objective import require_no_overlap
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.errors import require
from vim_backbone.memory import Recompute
from vim_backbone.vim import Images


def check_causal(architecture: VimConfig, objective: str) -> None:
    """Raise UserError for an encoder that lets a patch see what comes after it, or has nothing that does."""
    remedy = f"objective {objective} predicts patches, and the mean of a line holds later ones; set model.scan to full"
    require(architecture.scan == "full", "model.scan", architecture.scan, remedy)
    require_no_overlap(architecture, "show what is to be predicted")
    rows, columns = architecture.grid(*architecture.img_size)
    size = list(architecture.img_size)
    require(rows * columns > 1, "model.img_size", size, f"objective {objective} needs two patches at least")


def apart(encoder: VisionMamba, images: Images, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the forward and the backward direction make of pictures: normed patches (b, l, d_model) each.

    Of a list, one row (1, l, d_model) each. `order` (l,): the patches in which they are scanned; None: row by row.
    """
    patches = encoder.embed(images)
    patches = patches if order is None else patches[:, order]
    forward, backward = encoder.encode(patches, encoder.lengths(images), apart=True)[1].chunk(2)
    return forward, backward


def encoder_stack(architecture: VimConfig, recompute: Recompute) -> Stack:
    """The encoder's blocks, over all patches of a picture, in each direction apart."""
    rows, columns = architecture.grid(*architecture.img_size)
    patches = rows * columns * architecture.tokens_a_patch(architecture.in_chans)
    return Stack(architecture, patches + architecture.num_special, recompute, apart=True)
