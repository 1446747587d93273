"""Labelled pictures as samples of a classifier."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finetune.pixels import pixels_of, stacked
from launch.data.labelled import Labelled
from vim_backbone.preprocessing import Preprocessing
from vim_backbone.vim import Images


class ClassSamples:
    """Labelled pictures, transformed."""

    def __init__(
        self, data: Labelled, transform: Callable[[Tensor], Any], preprocessing: Preprocessing, max_megapixels: float
    ) -> None:
        self.data = data
        self.transform = transform
        self.preprocessing = preprocessing
        self.max_megapixels = max_megapixels

    def __len__(self) -> int:
        return len(self.data.labels)

    def name(self, index: int) -> str:
        """Name in the source."""
        return self.data.source.name(index)

    def draw(self, index: int) -> tuple[Tensor, int]:
        """(c, h, w) normalised, and the class."""
        with self.data.source.open(index) as picture:
            pixels = pixels_of(picture, self.preprocessing, self.max_megapixels)
        return self.transform(pixels), self.data.labels[index]

    def collate(self, samples: list[tuple[Any, Any]]) -> tuple[Images, Tensor]:
        """(b, c, h, w), or a list where bands differ, and (b,)."""
        return stacked([picture for picture, _ in samples], self.preprocessing), torch.tensor([k for _, k in samples])
