"""UperNet over the features of four Vim blocks, with an auxiliary head.

Small enough to be ours: the decoders of libraries carry BatchNorm, whose statistics would depend on how many pictures
a process holds. Group norm gives one curve for any number of processes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.segmentation.config import SegmentationHead
from finetune.segmentation.data import IGNORED
from finetune.task import TaskModel
from vim_backbone import UserError, VimConfig
from vim_backbone.vim import Images
from vim_kernels.dispatch.call import exporting

POOLED = (1, 2, 3, 6)
"""Rows and columns of the pooled maps of the pyramid pooling module (PSPNet)."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups of 8 channels or more, so that a single pixel has something to be normalised by."""
    return nn.GroupNorm(math.gcd(32, channels, channels // 8 or 1), channels)


def conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution that keeps the size, group norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), group_norm(outputs), nn.ReLU()
    )


def resize(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear, corners not aligned, as mmsegmentation."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


class MeanOfCells(nn.Module):
    """Adaptive average pooling to n x n, which an exported program, whose sizes are open, does by two products."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, maps: Tensor) -> Tensor:
        """(b, width, h, w) -> (b, width, n, n)."""
        if not exporting():
            return F.adaptive_avg_pool2d(maps, self.n)
        rows, columns = (cell_weights(self.n, side, maps) for side in maps.shape[-2:])
        return rows @ maps @ columns.mT


def cell_weights(n: int, side: int, like: Tensor) -> Tensor:
    """(n, side): what each place adds to the mean of a cell, from floor(i side / n) to ceil((i + 1) side / n)."""
    cell, place = torch.arange(n, device=like.device)[:, None], torch.arange(side, device=like.device)
    inside = (place >= cell * side // n) & (place < ((cell + 1) * side + n - 1) // n)
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)


class Pyramid(nn.Module):
    """Four maps of one stride -> four, two, one and half times their size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, 2), group_norm(width), nn.GELU(), nn.ConvTranspose2d(width, width, 2, 2)
        )
        self.up2 = nn.ConvTranspose2d(width, width, 2, 2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Each (b, width, h, w)."""
        half = F.max_pool2d(maps[3], 2, ceil_mode=True)
        return [self.up4(maps[0]), self.up2(maps[1]), maps[2], half]


class UperHead(nn.Module):
    """Pyramid pooling on the smallest map, then a feature pyramid, fused (arXiv 1807.10221)."""

    def __init__(self, width: int, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.pooled = nn.ModuleList(nn.Sequential(MeanOfCells(n), conv(width, channels, 1)) for n in POOLED)
        self.top = conv(width + len(POOLED) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(channels, channels, 3) for _ in range(3))
        self.fuse = conv(4 * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, classes, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps, largest first -> logits of the size of the first."""
        size = maps[3].shape[-2:]
        levels = [self.top(torch.cat([maps[3], *(resize(pool(maps[3]), size) for pool in self.pooled)], dim=1))]
        for level in (2, 1, 0):
            lateral = self.laterals[level](maps[level])
            levels.insert(0, lateral + resize(levels[0], lateral.shape[-2:]))
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, levels[:3], strict=True)]
        size = smoothed[0].shape[-2:]
        return self.classify(self.fuse(torch.cat([resize(level, size) for level in (*smoothed, levels[3])], dim=1)))


class Segmenter(TaskModel):
    """Backbone, pyramid, UperNet, and the losses as part of the forward pass."""

    def __init__(self, config: VimConfig, head: SegmentationHead, classes: int) -> None:
        super().__init__(config)
        self.layers = feature_layers(head.layers, config.depth)
        self.auxiliary_weight = head.auxiliary_weight
        self.loss = LOSSES[head.loss]
        width = config.d_model
        self.pyramid = Pyramid(width)
        self.head = UperHead(width, head.channels, classes, head.dropout)
        self.auxiliary = None
        if head.auxiliary_weight:
            self.auxiliary = nn.Sequential(
                conv(width, head.auxiliary_channels, 3),
                nn.Dropout2d(head.dropout),
                nn.Conv2d(head.auxiliary_channels, classes, 1),
            )

    def forward(self, images: Images, targets: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """(b, c, h, w), or a list of (c, h, w), -> logits (b, classes, h, w); with targets (b, h, w), named losses."""
        indices = [layer - 1 for layer in self.layers]
        maps = self.feature_maps(images, indices)
        levels, size = self.pyramid(maps), images[0].shape[-2:]
        logits = resize(self.head(levels).float(), size)
        if targets is None:
            return logits
        losses = {"loss_segmentation": self.loss(logits, targets)}
        if self.auxiliary is not None:
            guess = resize(self.auxiliary(levels[2]).float(), size)
            losses["loss_auxiliary"] = self.auxiliary_weight * self.loss(guess, targets)
        return losses


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over labelled pixels; 0 where there are none."""
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Soft Dice (V-Net, arXiv 1606.04797) over labelled pixels: 1 - 2 sum(p g) / (sum(p) + sum(g)).

    Mean over pictures of the mean over the classes that a picture has: one that it has not gives no gradient, and how
    pictures are shared out among processes changes nothing. A picture without a label has 0.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    true = targets[:, None] == classes
    probabilities = logits.softmax(1).masked_fill((targets == IGNORED)[:, None], 0)
    hit, pixels = (probabilities * true).sum((2, 3)), true.sum((2, 3))
    present = pixels > 0
    loss = 1 - 2 * hit / (probabilities.sum((2, 3)) + pixels).masked_fill(~present, 1)
    return ((loss * present).sum(1) / present.sum(1).clamp(min=1)).mean()


def dice_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Soft Dice and cross-entropy, added up, as nnU-Net (Isensee et al. 2021) has them."""
    return dice_loss(logits, targets) + pixel_loss(logits, targets)


LOSSES = {"cross_entropy": pixel_loss, "dice_ce": dice_ce}
"""What `head.loss` names."""


def feature_layers(layers: list[int] | None, depth: int) -> list[int]:
    """Four blocks, counted from 1, the last one of the backbone among them.

    Raises UserError for others: blocks after the last one taken would learn nothing.
    """
    blocks = layers or [max(1, round(depth * share / 4)) for share in (1, 2, 3, 4)]
    for layer in blocks:
        if not 1 <= layer <= depth:
            raise UserError(f"head.layers has {layer}: the backbone has blocks 1 to {depth}")
    if blocks[-1] != depth:
        raise UserError(f"head.layers ends with {blocks[-1]}: it must end with the last block, {depth}")
    return blocks
