"""Test-time augmentation: a picture in squares of one size or several, mirrored or not, and its detections joined."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import batched_nms

from finetune.detection.config import TestConfig
from finetune.pixels import fill_of, resize_pixels
from vim_backbone import VimConfig
from vim_backbone.preprocessing import RGB, Preprocessing
from vim_backbone.vim import Images

SAME_OBJECT = 0.5
"""IoU from which boxes of two views are of one object: that of the heads' own suppression."""
Sizes = tuple[int, int, int, int]
"""Height and width of a picture in its square, and before."""


@dataclass(frozen=True)
class TestTimeAugmentation:
    """Squares that a detector sees a picture in, and what makes one list of their detections."""

    __test__ = False  # no test case, whatever pytest makes of its name

    squares: list[tuple[int, int]]
    """Height and width of each."""
    flip: bool
    """Detect in the mirror images too."""
    most: int
    """Detections of a picture, at most."""
    preprocessing: Preprocessing = RGB

    def fit(self, picture: Tensor) -> list[tuple[Tensor, Sizes]]:
        """(c, h, w) -> for each square what `fit` gives."""
        return [fit(picture, square, self.preprocessing) for square in self.squares]

    def detect(self, model: nn.Module, images: Sequence[Images], sizes: list[list[Sizes]]) -> list[dict[str, Tensor]]:
        """For each square a batch (b, c, h, w) normalised, or a list, and its sizes -> detections in the b pictures."""
        by_picture: list[list[dict[str, Tensor]]] = [[] for _ in sizes[0]]
        for batch, of_square in zip(images, sizes, strict=True):
            inside = [entry[:2] for entry in of_square]
            for detections, entry, parts in zip(model(batch, sizes=inside), of_square, by_picture, strict=True):
                parts.append(enlarged(detections, entry))
            if self.flip:
                flipped = batch.clone() if isinstance(batch, Tensor) else [picture.clone() for picture in batch]
                for picture, (height, width) in zip(flipped, inside, strict=True):
                    picture[:, :height, :width] = picture[:, :height, :width].flip(-1)
                for detections, entry, parts in zip(model(flipped, sizes=inside), of_square, by_picture, strict=True):
                    parts.append(enlarged(mirrored(detections, entry[1]), entry))
        return [parts[0] if len(parts) == 1 else joined(parts, self.most) for parts in by_picture]


def fit(picture: Tensor, size: Sequence[int], preprocessing: Preprocessing = RGB) -> tuple[Tensor, Sizes]:
    """(c, h, w) -> (c, *size), padded below and to the right; height and width in it, height and width before."""
    full_height, full_width = picture.shape[1:]
    factor = min(size[0] / full_height, size[1] / full_width)
    height, width = (max(1, round(side * factor)) for side in (full_height, full_width))
    canvas = fill_of(picture, preprocessing).repeat(1, *size)
    canvas[:, :height, :width] = resize_pixels(picture, (height, width))
    return canvas, (height, width, full_height, full_width)


def enlarged(detections: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Boxes in pixels of the square -> in pixels of the picture as it was."""
    height, width, full_height, full_width = sizes
    scale = torch.tensor([full_width / width, full_height / height] * 2, device=detections["boxes"].device)
    return detections | {"boxes": detections["boxes"] * scale}


def mirrored(detections: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Detections in the mirror image of a picture that is so many pixels wide -> in the picture."""
    left, top, right, below = detections["boxes"].unbind(1)
    back = detections | {"boxes": torch.stack([width - right, top, width - left, below], dim=1)}
    return back | ({"masks": detections["masks"].flip(-1)} if "masks" in detections else {})


def joined(parts: list[dict[str, Tensor]], most: int) -> dict[str, Tensor]:
    """Detections of several views: the best of those that overlap."""
    together = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    best = batched_nms(together["boxes"], together["scores"], together["labels"], SAME_OBJECT)[:most]
    return {key: value[best] for key, value in together.items()}


def with_pasted_masks(detections: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
    """Masks (n, 1, 28, 28) within their boxes -> (n, h, w) uint8 of the whole picture; all on the CPU."""
    pasted: dict[str, Any] = dict(detections)
    if "masks" in detections:
        shares = paste_masks_in_image(detections["masks"].float(), detections["boxes"], size)
        pasted["masks"] = (shares[:, 0] > 0.5).to(torch.uint8)
    return {key: value.cpu() for key, value in pasted.items()}


def tta_of(config: VimConfig, test: TestConfig, most: int, preprocessing: Preprocessing = RGB) -> TestTimeAugmentation:
    """As the config says."""

    def side(length: int, scale: float) -> int:
        return max(config.patch_size, round(scale * length / config.stride) * config.stride)

    height, width = config.img_size
    squares = [(side(height, scale), side(width, scale)) for scale in test.scales]
    return TestTimeAugmentation(squares, test.flip, most, preprocessing)
