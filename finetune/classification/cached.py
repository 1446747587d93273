"""Labelled pictures that were decoded before (`data.cache`): a batch is cut at once, on the device."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from finetune.classification.config import AugmentConfig
from finetune.task import BatchedSamples, LabelledBatch
from launch.data.cache import DecodedPictures, crop_numbers
from launch.data.crops import NUMBERS, random_crops
from launch.data.loading import to_device
from vim_backbone.preprocessing import Preprocessing, to_model


class CachedSamples(BatchedSamples):
    """As `ClassSamples`; what is drawn for a sample is a function of (seed, epoch, index), and another than there."""

    def __init__(
        self, pictures: DecodedPictures, labels: Sequence[int], size: int, augment: AugmentConfig,
        preprocessing: Preprocessing, *, centre: bool,
    ) -> None:  # fmt: skip
        """`size`: side in pixels. `centre`: the middle, as an evaluation has it, in place of random crops."""
        self.pictures = pictures
        self.labels = torch.tensor(labels, device=pictures.pixels.device)
        self.size = size
        self.augment = augment
        self.preprocessing = preprocessing
        self.centre = centre

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Name in the source."""
        return self.pictures.source.name(index)

    def batch(self, seed: int, items: Sequence[tuple[int, ...]]) -> LabelledBatch:
        """Pictures (b, c, h, w) normalised, and classes (b,); a bad picture is replaced by the next good one."""
        indices = [item[1] for item in items]
        numbers, bad = self.pictures.usable_of(indices)
        if numbers is None:
            return LabelledBatch(None, None, [], bad, [], [])
        pixels = self._middle(numbers) if self.centre else self._crops(numbers, seed, items)
        targets = self.labels[to_device(torch.tensor(numbers), self.labels.device)]
        counted = [number == item[1] and all(item[2:]) for number, item in zip(numbers, items, strict=True)]
        names = [self.name(number) for number in numbers]
        return LabelledBatch(to_model(pixels, pixels.device, self.preprocessing), targets, names, bad, numbers, counted)

    def _crops(self, numbers: Sequence[int], seed: int, items: Sequence[tuple[int, ...]]) -> Tensor:
        height, width = self.pictures.size
        uniforms = crop_numbers(seed, items, NUMBERS + 1)
        boxes = random_crops(uniforms[:, :NUMBERS], width, height, self.augment.min_scale)
        mirror = uniforms[:, NUMBERS] < self.augment.flip
        return self.pictures.cut(numbers, boxes, (self.size, self.size), mirror, beyond=False)

    def _middle(self, numbers: Sequence[int]) -> Tensor:
        """The shorter side resized to size / crop_pct, and the square in the middle."""
        height, width = self.pictures.size
        shorter = math.floor(self.size / self.augment.crop_pct)
        shape = [int(shorter * side / min(height, width)) for side in (height, width)]
        boxes = np.tile(np.array([0, 0, width, height]), (len(numbers), 1))
        resized = self.pictures.cut(numbers, boxes, (shape[0], shape[1]), beyond=False)
        top, left = (round((side - self.size) / 2) for side in shape)
        return resized[..., top : top + self.size, left : left + self.size]
