"""Where the class token and the registers sit among the patch tokens: the only code that knows.

Shapes: b batch, l patch tokens (all, or the visible ones), special: class token, then registers. The same
rule serves any number of patch tokens, so a masked sequence and a whole one share one layout.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Class token "middle", "first" or "none", and registers spread evenly over the scan."""

    class_token: str
    num_registers: int

    @property
    def num_special(self) -> int:
        """Class token and registers."""
        return (self.class_token != "none") + self.num_registers

    def slots(self, num_patches: int) -> list[int]:
        """Index of each special token in the joined sequence, class token first.

        The middle class token goes before patch l // 2, as in the official checkpoints; register i of r before patch
        (i + 1) l / (r + 1), which cuts the patches into r + 1 runs of nearly equal length.
        """
        before = {"middle": [num_patches // 2], "first": [0], "none": []}[self.class_token]
        runs = self.num_registers + 1
        before += [round((i + 1) * num_patches / runs) for i in range(self.num_registers)]
        order = sorted(range(len(before)), key=lambda token: (before[token], token))
        slots = [0] * len(before)
        for ahead, token in enumerate(order):
            slots[token] = before[token] + ahead
        return slots

    def join(self, special: Tensor, patches: Tensor) -> Tensor:
        """(b, special, d_model) and (b, l, d_model) -> (b, special + l, d_model) in scan order."""
        slots = self.slots(patches.shape[1])
        pieces, start = [], 0
        for ahead, token in enumerate(sorted(range(len(slots)), key=slots.__getitem__)):
            until = slots[token] - ahead
            pieces += [patches[:, start:until], special[:, token : token + 1]]
            start = until
        return torch.cat([*pieces, patches[:, start:]], dim=1)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `join`: (b, special + l, d_model) -> (b, special, d_model), (b, l, d_model)."""
        total = tokens.shape[1]
        slots = self.slots(total - self.num_special)
        borders = [-1, *sorted(slots), total]
        patches = torch.cat([tokens[:, a + 1 : b] for a, b in pairwise(borders)], dim=1)
        return torch.cat([tokens[:, :0], *(tokens[:, slot : slot + 1] for slot in slots)], dim=1), patches
