"""Parts of a batch of small pictures at the size of a view, all at once on their device, by Pillow's bicubic filter.

Shape letters: b pictures, c channels, h and w rows and columns of a picture.
"""

import torch
from torch import Tensor

SUPPORT = 2.0
"""Pixels on each side that the filter takes where it does not shrink."""
GRAIN = 2.0**14
"""Weights are whole multiples of its inverse: products with bytes, and sums of these, are then exact in float32,
and a picture has the same values in every batch and on every device."""
MOST_WEIGHTS = 2**22
"""Of the filter along one side, in the pictures that are resized together: 32 MB in float64, a few times over."""


def resized_parts(
    pictures: Tensor, boxes: Tensor, size: tuple[int, int], mirror: Tensor | None = None, *, beyond: bool
) -> Tensor:
    """A box of each picture, bicubic with antialiasing, as Pillow resizes it but for a level of 255 or two.

    Across first and then down, each rounded to bytes, as Pillow (Resample.c) where the height does not shrink; where it
    does, Pillow 13 may go down first, and where bytes were clipped in between values differ by more.

    Args:
        pictures: (b, c, h, w) uint8.
        boxes: (b, 4) left, upper, right and lower edge in pixels, on the device of the pictures.
        size: height and width.
        mirror: (b,) bool, which are turned left to right after that.
        beyond: the filter sees pixels outside of the box, as `Image.resize(box=...)`; else the box is cut out before.

    Returns:
        (b, c, height, width) uint8.
    """
    together = max(1, MOST_WEIGHTS // max(size[0] * pictures.shape[-2], size[1] * pictures.shape[-1]))
    if len(pictures) > together:
        mirrors = [None] * -(-len(pictures) // together) if mirror is None else mirror.split(together)
        parts = zip(pictures.split(together), boxes.split(together), mirrors, strict=True)
        return torch.cat([resized_parts(part, its, size, flips, beyond=beyond) for part, its, flips in parts])
    left, upper, right, lower = boxes.double().unbind(1)
    across = filter_matrices(left, right, pictures.shape[-1], size[1], beyond=beyond)
    down = filter_matrices(upper, lower, pictures.shape[-2], size[0], beyond=beyond)
    if mirror is not None:
        across = torch.where(mirror.view(-1, 1, 1), across.flip(1), across)
    with torch.autocast(pictures.device.type, enabled=False):
        rows = _bytes(pictures.float() @ across.mT.unsqueeze(1))
        return _bytes(down.unsqueeze(1) @ rows).to(torch.uint8)


def filter_matrices(start: Tensor, end: Tensor, full: int, size: int, *, beyond: bool) -> Tensor:
    """Weights (b, size, full) float32 of the pixels of a line in the new ones, which the stretch from `start` to `end`
    becomes; both (b,) float64, in pixels of a line of `full`. `beyond` as in `resized_parts`.
    """
    scale = (end - start).view(-1, 1, 1) / size
    reach = scale.clamp(min=1)  # of the filter, which widens where it shrinks
    new, old = (torch.arange(n, dtype=torch.float64, device=start.device) for n in (size, full))
    centre = start.view(-1, 1, 1) + (new.view(1, -1, 1) + 0.5) * scale
    first = (centre - SUPPORT * reach + 0.5).floor()
    last = (centre + SUPPORT * reach + 0.5).floor()
    if not beyond:
        first, last = first.maximum(start.view(-1, 1, 1)), last.minimum(end.view(-1, 1, 1))
    weights = _bicubic((old + 0.5 - centre) / reach).where((old >= first) & (old < last), 0)
    return (weights / weights.sum(-1, keepdim=True)).mul_(GRAIN).round_().div_(GRAIN).float()


def _bicubic(x: Tensor) -> Tensor:
    """Keys' filter with a = -0.5, 0 beyond SUPPORT."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far).where(x < SUPPORT, 0)


def _bytes(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)
