"""Pictures of different sizes in one row of tokens, without padding: which token is whose.

Shapes: l patches of all pictures, total: tokens of all pictures, special: class token and registers of each.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from vim_backbone.tokens import TokenLayout


class Layout(Protocol):
    """Which of the tokens are special, in a batch, in a row, or in a part of them."""

    def join(self, special: Tensor, patches: Tensor) -> Tensor:
        """All tokens in scan order."""
        ...

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse: special tokens, patches."""
        ...


class PackedLayout:
    """What `TokenLayout` is for a batch, for a row: every picture has special tokens of its own among its patches."""

    def __init__(self, layout: TokenLayout, lengths: Sequence[int], device: torch.device) -> None:
        """`lengths`: patches of each picture, in the order of the row."""
        self.num_special = layout.num_special
        order: list[int] = []
        first_patch = len(lengths) * self.num_special
        for picture, length in enumerate(lengths):
            patches = list(range(first_patch, first_patch + length))
            slots = layout.slots(length)
            for token in sorted(range(len(slots)), key=slots.__getitem__):
                patches.insert(slots[token], picture * self.num_special + token)
            order += patches
            first_patch += length
        self._order = torch.tensor(order, device=device)
        self._places = torch.argsort(self._order)
        borders = [0, *accumulate([length + self.num_special for length in lengths])]  # PyTorch 2.7 traces lists alone
        self.cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=device)
        """(pictures + 1,) borders of the pictures in the row, as the ops take them."""

    def join(self, special: Tensor, patches: Tensor) -> Tensor:
        """(pictures, special, d_model) and (1, l, d_model) -> (1, total, d_model) in scan order."""
        return torch.cat([special.flatten(0, 1), patches[0]]).index_select(0, self._order)[None]

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `join`: (1, total, d_model) -> (pictures, special, d_model), (1, l, d_model)."""
        pictures = len(self.cu_seqlens) - 1
        special, patches = tokens[0].index_select(0, self._places).tensor_split([pictures * self.num_special])
        return special.unflatten(0, (pictures, self.num_special)), patches[None]


def layout_of(
    layout: TokenLayout, lengths: Sequence[int] | None, device: torch.device
) -> tuple[TokenLayout | PackedLayout, Tensor | None]:
    """The layout itself for a batch (no `lengths`); else that of a row, and its cu_seqlens."""
    if lengths is None:
        return layout, None
    packed = PackedLayout(layout, lengths, device)
    return packed, packed.cu_seqlens


def joined(special: Tensor, patches: Tensor, lengths: list[int] | None) -> Tensor | list[Tensor]:
    """Special tokens before the patches; of each packed picture where there are `lengths`."""
    if lengths is None:
        return torch.cat([special, patches], dim=1)
    return [torch.cat(pair) for pair in zip(special, patches[0].split(lengths), strict=True)]
