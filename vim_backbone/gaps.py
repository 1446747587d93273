"""How many steps of a whole scan each token of a masked one stands for.

In the state space model dt is a time (Mamba, arXiv 2312.00752, equation 4): how long the state decays, and how long a
token's input is held. Where hidden patches are left out of the scan, the time from one visible patch to the next is
that of all patches up to it. Both directions then have at every visible patch the time that they have there in the
whole picture, in which every gap is 1; a border of the picture counts as visible.

Shape letters: b batch, l patch tokens of a picture, v visible ones.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vim_backbone.packing import PackedLayout
from vim_backbone.tokens import TokenLayout


def scan_gaps(visible: Tensor, patches: int | Sequence[int], lengths: Sequence[int] | None = None) -> Tensor:
    """Patches from the visible one before, and to the visible one after: (2, b, v) float32, 1 where it is next.

    Args:
        visible: (b, v) indices, ascending; of packed pictures (1, v), counted through all patches of all pictures.
        patches: l, hidden ones too; of each picture where they are packed.
        lengths: visible patches of each packed picture, one or more.
    """
    if lengths is None:
        assert isinstance(patches, int)
        first, end = torch.zeros_like(visible[:1, :1]), torch.full_like(visible[:1, :1], patches)
    else:
        assert not isinstance(patches, int)
        ends = torch.tensor(list(accumulate(patches)))
        picture = torch.repeat_interleave(
            torch.arange(len(lengths)), torch.tensor(lengths), output_size=visible.shape[1]
        )
        first, end = torch.stack([ends - torch.tensor(patches), ends])[:, picture].to(visible.device)[:, None]
    nothing = torch.full_like(visible[:, :1], -1)
    before = torch.maximum(torch.cat([nothing, visible[:, :-1]], dim=1), first - 1)
    after = torch.minimum(torch.cat([visible[:, 1:], end[:, -1:].expand_as(nothing)], dim=1), end)
    return torch.stack([visible - before, after - visible]).float()


def with_special_tokens(gaps: Tensor, layout: TokenLayout | PackedLayout, pictures: int) -> Tensor:
    """Gaps (2, b, v) of patches -> those of a sequence with special tokens, which stand for one step each."""
    special = gaps.new_ones(pictures, layout.num_special, 2)
    return layout.join(special, gaps.permute(1, 2, 0)).permute(2, 0, 1).contiguous()
