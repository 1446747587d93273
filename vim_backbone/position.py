"""The position table: made, and resampled to another grid with the class slot left alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_backbone.tokens import TokenLayout
from vim_kernels.dispatch.call import exporting


def sincos_table(grid: tuple[int, int], d_model: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of MAE (arXiv 2111.06377): (rows * columns, d_model).

    The first half of the channels encodes the row and the second the column, each as sines then cosines of
    geometrically spaced frequencies from 1 to 1/10000 per patch.
    """
    quarter = d_model // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (row, column)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def resize_table(table: Tensor, layout: TokenLayout, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, l + class, d_model) for grid `old` -> the same for `new`: bicubic over patches, the class slot moved along.

    `layout` says where the class slot is; it must have no registers, which own no position.
    """
    if exporting():
        return _resize_for_any_grid(table, layout, old, new)
    if old == new:
        return table
    special, patches = layout.split(table)
    image = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image.float(), size=new, mode="bicubic", antialias=True, align_corners=False)
    return layout.join(special, image.flatten(2).transpose(1, 2).to(table.dtype))


def windowed_table(
    table: Tensor, layout: TokenLayout, old: tuple[int, int], new: tuple[int, int]
) -> Callable[[slice, slice], Tensor]:
    """The patches of `resize_table` without the whole of it: rows and columns of `new` -> (1, places, d_model)."""
    _, patches = layout.split(table)
    image = patches.view(*old, -1)
    if old == new:
        return lambda rows, columns: image[rows, columns].flatten(0, 1)[None]
    down, across = (bicubic_weights(*sides, device=table.device) for sides in zip(old, new, strict=True))

    def window(rows: slice, columns: slice) -> Tensor:
        resized = torch.einsum("yr,rcd,xc->yxd", down[rows], image.float(), across[columns])
        return resized.flatten(0, 1)[None].to(table.dtype)

    return window


def with_channels(positions: Tensor, embeddings: Tensor, channels: Sequence[int]) -> Tensor:
    """Positions (1, places, d) and all channels' embeddings (1, c, d) -> (1, places * channels, d), their sums."""
    chosen = torch.stack([embeddings[:, channel] for channel in channels], dim=1)  # an index would wait for a GPU
    return (positions[:, :, None] + chosen[:, None]).flatten(1, 2)


def _resize_for_any_grid(table: Tensor, layout: TokenLayout, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The same by two products, for a program whose `new` is open: it cannot ask whether that is `old`."""
    special, patches = layout.split(table)
    image = patches.reshape(*old, -1).float()
    rows, columns = (bicubic_weights(*sides, device=table.device) for sides in zip(old, new, strict=True))
    image = (rows @ image.flatten(1)).unflatten(1, (old[1], -1))
    return layout.join(special, (columns @ image).flatten(0, 1)[None].to(table.dtype))


def bicubic_weights(old: int, new: int, device: torch.device) -> Tensor:
    """(new, old): what each old place adds to a new one, in antialiased bicubic resizing as PyTorch and Pillow have it.

    Keys' kernel with a = -0.5, as wide as the new place where that is larger, and normalised where it is cut off.
    """
    width: Any = torch.sym_max(1.0, old / new)
    centres = (torch.arange(new, device=device) + 0.5) * (old / new)
    x = ((torch.arange(old, device=device) + 0.5 - centres[:, None]) / width).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)
