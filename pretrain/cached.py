"""Views of pictures that were decoded before (`data.cache`): those of a batch drawn and cut at once, on the device."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from launch.data.cache import EXTRA, DecodedPictures, crop_numbers, decoded, hashes_of
from launch.data.crops import NUMBERS, random_crops
from launch.data.sources import Source, shares_of
from launch.data.streams import Stream
from pretrain.data import Batch, DataConfig, View
from pretrain.stages import Item, Stage, StageSampler


def decode_once(source: Source, data: DataConfig, device: torch.device) -> DecodedPictures | None:
    """All pictures on this process's device, where `data.cache` asks for it. Raises UserError as `decoded`."""
    if data.cache == "none":
        return None
    assert not isinstance(source, Stream)
    return decoded(source, data.preprocessing, data.max_megapixels, data.workers, device)


def cached_batches(
    pictures: DecodedPictures,
    view: View,
    draw_batch: Callable[[tuple[int, int], np.ndarray], Tensor],
    seed: int,
    stages: Sequence[Stage],
    start_batch: int = 0,
) -> Iterator[Batch]:
    """Batches of this process as `build_loader` orders them, from number `start_batch` on; images are on the device.

    What is drawn for a view is a function of (seed, epoch, index), and another than `Views` draws.

    Args:
        draw_batch: what the objective adds to the views (`Objective.draw_batch`).
    """
    counts, weights = shares_of(pictures.source)
    for items in StageSampler(counts, seed, stages, start_batch, weights):
        yield cut_batch(pictures, view.sized(items[0][2]), draw_batch, seed, items)


def cut_batch(
    pictures: DecodedPictures,
    view: View,
    draw_batch: Callable[[tuple[int, int], np.ndarray], Tensor],
    seed: int,
    items: Sequence[Item],
) -> Batch:
    """Views of pictures (epoch, index, ...); a bad one is replaced by the next good one, as `Views` does."""
    numbers, bad = pictures.usable_of([item[1] for item in items])
    if numbers is None:
        return Batch(None, [], [], bad)
    height, width = pictures.size
    drawn = crop_numbers(seed, items, NUMBERS + 1)
    boxes = random_crops(drawn[:, :NUMBERS], width, height, view.data.min_scale)
    mirror = (drawn[:, NUMBERS] < 0.5) & view.data.flip
    images = pictures.cut(numbers, boxes, view.img_size, mirror, beyond=True)
    extras = draw_batch(view.grid, hashes_of(seed, items, EXTRA))
    if images.device.type == "cuda":
        extras = extras.pin_memory()  # as a loader does: the host does not wait for the copy
    return Batch(images, extras, [pictures.source.name(number) for number in numbers], bad)
