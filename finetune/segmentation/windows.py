"""Pictures of any size through a segmenter: as overlapping windows or as a whole, mirrored or not."""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from finetune.segmentation.config import TestConfig
from vim_backbone import VimConfig


@dataclass(frozen=True)
class Windows:
    """Segments pictures of any size."""

    size: tuple[int, int]
    """Height and width of a window."""
    step: tuple[int, int]
    """From one window to the next; (0, 0) takes the picture as a whole."""
    multiple: int
    """What divides the sides that the model takes."""
    smallest: int
    """Shortest side that it takes."""
    flip: bool

    def logits(self, model: nn.Module, image: Tensor) -> Tensor:
        """(1, c, h, w) normalised -> (1, classes, h, w); of mirror images, the mean of the shares' logarithms."""
        logits = self._once(model, image)
        if self.flip:
            mirrored = self._once(model, image.flip(-1)).flip(-1)
            logits = ((logits.softmax(1) + mirrored.softmax(1)) / 2).log()
        return logits

    def passes(self, height: int, width: int) -> int:
        """Forward passes that a picture takes."""
        sides = zip((height, width), self.size, self.step, strict=True)
        once = math.prod(len(starts(max(side, size), size, step)) if step else 1 for side, size, step in sides)
        return (1 + self.flip) * once

    def idle(self, model: nn.Module, image: Tensor, passes: int) -> None:
        """So many more forward passes for nothing: under ZeRO-3 all processes must take as many."""
        for _ in range(passes):
            model(image.new_zeros(1, image.shape[1], *self.size))

    def _once(self, model: nn.Module, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if not any(self.step):
            sides = (-(-max(side, self.smallest) // self.multiple) * self.multiple for side in (height, width))
            return model(pad_to(image, *sides))[..., :height, :width]
        image = pad_to(image, max(height, self.size[0]), max(width, self.size[1]))
        total, count = None, image.new_zeros(1, 1, *image.shape[-2:])
        for top in starts(image.shape[-2], self.size[0], self.step[0]):
            for left in starts(image.shape[-1], self.size[1], self.step[1]):
                box = (..., slice(top, top + self.size[0]), slice(left, left + self.size[1]))
                part = model(image[box])
                total = part.new_zeros(1, part.shape[1], *image.shape[-2:]) if total is None else total
                total[box] += part
                count[box] += 1
        assert total is not None
        return (total / count)[..., :height, :width]


def starts(length: int, window: int, step: int) -> list[int]:
    """Where windows begin: every `step`, the last one flush with the end."""
    return [min(i * step, length - window) for i in range(math.ceil((length - window) / step) + 1)]


def pad_to(image: Tensor, height: int, width: int) -> Tensor:
    """Zeros, which are the mean colour, below and to the right."""
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))


def windows_of(config: VimConfig, test: TestConfig) -> Windows:
    """How the config says that pictures are segmented."""
    height, width = config.img_size
    step = (max(1, int(height * test.stride)), max(1, int(width * test.stride))) if test.mode == "slide" else (0, 0)
    return Windows((height, width), step, config.stride, config.patch_size, test.flip)
