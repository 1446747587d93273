"""Small pictures that are decoded once in a process and stay on its device, as bytes."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from launch.data.bad_pictures import first_usable
from launch.data.batch_views import resized_parts
from launch.data.data_sets import HubDataset
from launch.data.folders import ImageFiles
from launch.data.loading import enduring, loader_of, to_device
from launch.data.reading import read_pixels
from launch.data.sources import ImageSource, MixedPictures, Picked, TitledPictures, stand_ins
from launch.run.randomness import hashes, uniforms
from vim_backbone.errors import UserError
from vim_backbone.images import BadPictureError, reason
from vim_backbone.preprocessing import Preprocessing

Cache = Literal["none", "device"]
MOST_SIDE = 128
"""Longest side, in pixels, of pictures that are kept."""
MOST_GIGABYTES = 16.0
"""Most that they may take, all that a process keeps together; of a GPU no more than half of what is free."""
READ_AT_ONCE = 256
"""Pictures that a process which reads hands over together."""
REMEDY = "set data.cache none"


@dataclass(frozen=True)
class DecodedPictures:
    """All pictures of a source, of one size, on a device."""

    source: ImageSource
    pixels: Tensor
    """(n, c, h, w) uint8."""
    bad: dict[int, str]
    """Pictures that cannot be used, with the reason; their pixels are 0."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def usable(self, index: int) -> tuple[int | None, list[tuple[str, str]]]:
        """Picture `index`, or the next one that is good, as `first_usable` has it, and those passed over."""
        if index not in self.bad:
            return index, []

        def good(candidate: int, attempt: int) -> int:
            del attempt
            if candidate in self.bad:
                raise BadPictureError(self.bad[candidate])
            return candidate

        _, number, bad = first_usable(self.source, index, good, stand_ins(self.source, index))
        return (None if number in self.bad else number), bad

    def usable_of(self, indices: Sequence[int]) -> tuple[list[int] | None, list[tuple[str, str]]]:
        """As `usable`, of a batch; None where one of its pictures has to be given up."""
        if not self.bad:
            return list(indices), []
        numbers, bad = zip(*map(self.usable, indices), strict=True)
        passed_over = [entry for each in bad for entry in each]
        return (None if None in numbers else list(numbers)), passed_over

    def cut(
        self, numbers: Sequence[int], boxes: np.ndarray, size: tuple[int, int], mirror: np.ndarray | None = None,
        *, beyond: bool,
    ) -> Tensor:  # fmt: skip
        """Parts of pictures as `resized_parts` has them: boxes (b, 4), which are mirrored (b,) -> (b, c, *size)."""
        device = self.pixels.device
        chosen = self.pixels[to_device(torch.tensor(numbers), device)]
        mirrored = None if mirror is None else to_device(torch.from_numpy(mirror), device)
        return resized_parts(chosen, to_device(torch.from_numpy(boxes), device), size, mirrored, beyond=beyond)


class WholePictures(Dataset[Any]):
    """Pixels of a picture, or why it cannot be used."""

    def __init__(self, source: ImageSource, preprocessing: Preprocessing, max_megapixels: float) -> None:
        self.source = source
        self.preprocessing = preprocessing
        self.max_megapixels = max_megapixels

    def __getitem__(self, index: int) -> np.ndarray | str:
        """(c, h, w) as `read_pixels` gives it; no tensor, each of which would take a file descriptor on its way."""
        try:
            with self.source.open(index) as picture:
                check_side(self.source.name(index), *picture.size)
                return read_pixels(picture, self.preprocessing, self.max_megapixels).numpy()
        except UserError:
            raise
        except Exception as error:  # a decoder may raise anything on damaged data
            return reason(error)


_MEMORY: dict[Any, tuple[Tensor, dict[int, str]]] = {}
"""What was decoded in this process, the oldest first, for another run of it."""


def decoded(
    source: ImageSource, preprocessing: Preprocessing, max_megapixels: float, workers: int | None, device: torch.device
) -> DecodedPictures:
    """All pictures of a source, read by `workers` processes, or kept from an earlier run of this process.

    Raises UserError for pictures that are too large, too many, of several sizes or of more than 8 bits, and where none
    can be used.
    """
    key = (identity(source), preprocessing, max_megapixels, device)
    if key not in _MEMORY:
        pictures = WholePictures(source, preprocessing, max_megapixels)
        pixels, bad = _decode(pictures, workers, device)
        free_memory(limit_of(device) - pixels.nbytes, device)
        _MEMORY[key] = pixels, bad
    _MEMORY[key] = _MEMORY.pop(key)  # the latest
    return DecodedPictures(source, *_MEMORY[key])


def _decode(pictures: WholePictures, workers: int | None, device: torch.device) -> tuple[Tensor, dict[int, str]]:
    source, total = pictures.source, len(pictures.source)
    pixels: Tensor | None = None
    bad: dict[int, str] = {}
    batches = [range(i, min(i + READ_AT_ONCE, total)) for i in range(0, total, READ_AT_ONCE)]

    def loader_from(first: int) -> Iterator[list[np.ndarray | str]]:
        loader = partial(loader_of, pictures, list, 0, workers, 2)
        return iter(cast("Any", loader(batch_sampler=batches[first:])))

    for batch, read in zip(batches, enduring(loader_from, 0, print), strict=True):
        bad |= {index: each for index, each in zip(batch, read, strict=True) if isinstance(each, str)}
        good = [(index, each) for index, each in zip(batch, read, strict=True) if not isinstance(each, str)]
        for index, each in good:
            if pixels is None:
                pixels = _room_for(each, source.name(index), total, device)
            check_alike(source.name(index), each, pixels)
        if good and pixels is not None:
            pixels[[index for index, _ in good]] = torch.from_numpy(np.stack([each for _, each in good]))
    if pixels is None:
        raise UserError(f"{total} pictures cannot be used, the first {source.name(0)} ({bad[0]}): see data.source")
    return pixels.to(device), bad


def check_side(name: str, height: int, width: int) -> None:
    """Raise UserError for a picture that is too large."""
    if max(height, width) > MOST_SIDE:
        raise UserError(
            f"data.cache is 'device': it takes pictures of up to {MOST_SIDE} px a side, {name} has {height} x {width}; "
            f"{REMEDY}"
        )


def check_alike(name: str, picture: np.ndarray, others: Tensor) -> None:
    """Raise UserError for a picture (c, h, w) of another size than the others (n, c, h, w)."""
    if picture.shape != tuple(others.shape[1:]):
        ours, theirs = ("{1} x {2} px of {0} bands".format(*shape) for shape in (picture.shape, others.shape[1:]))
        raise UserError(
            f"data.cache is 'device': it takes pictures of one size, {name} has {ours}, others {theirs}; {REMEDY}"
        )


def _room_for(picture: np.ndarray, name: str, total: int, device: torch.device) -> Tensor:
    """Zeros for so many such pictures, in the memory of the host. Raises UserError where that is too much."""
    if picture.dtype != np.uint8:
        raise UserError(f"data.cache is 'device': it takes pictures of 8 bits, {name} has {picture.dtype}; {REMEDY}")
    limit = limit_of(device)
    if total * picture.nbytes > limit:
        raise UserError(
            f"data.cache is 'device': {total} pictures as {name} take {total * picture.nbytes / 1e9:.1f} GB, and it "
            f"may take {limit / 1e9:.1f}; {REMEDY}"
        )
    return torch.zeros(total, *picture.shape, dtype=torch.uint8)


def limit_of(device: torch.device) -> float:
    """Bytes that pictures may take on a device."""
    most = MOST_GIGABYTES * 1e9
    return most if device.type != "cuda" else min(most, torch.cuda.mem_get_info(device)[0] / 2)


def free_memory(limit: float, device: torch.device) -> None:
    """Forget the oldest pictures on a device, until the rest takes no more than `limit` bytes."""
    sizes = {key: pixels.nbytes for key, (pixels, _) in _MEMORY.items() if key[-1] == device}
    for key in list(sizes):
        if sum(sizes.values()) > limit:
            del _MEMORY[key], sizes[key]


def identity(source: Any) -> Any:
    """What a source's pictures are known by: the same for another source of the same pictures, unless they changed."""
    if isinstance(source, MixedPictures):
        return tuple(identity(part) for part in source.parts)
    if isinstance(source, TitledPictures):
        return identity(source.source)
    if isinstance(source, Picked):
        return identity(source.source), np.asarray(source.indices, np.int64).tobytes()
    if isinstance(source, HubDataset):
        return source.data._fingerprint, source.column
    if isinstance(source, ImageFiles):
        return tuple((path, _changed(path)) for path in source.paths)
    return object()  # equal to none


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


CROP, EXTRA = 1, 2
"""Ends of the keys that crops, and what else a view needs, are drawn with."""


def crop_numbers(seed: int, items: Sequence[Sequence[Any]], count: int) -> np.ndarray:
    """Uniform numbers (b, count) for the crops of items (epoch, index, ...)."""
    return uniforms(hashes_of(seed, items, CROP), count)


def hashes_of(seed: int, items: Sequence[Sequence[Any]], what: int) -> np.ndarray:
    """A hash (b,) of each item (epoch, index, ...) with the seed, for one kind of draw."""
    epochs, indices = (np.array([item[place] for item in items], np.int64) for place in (0, 1))
    return hashes(seed, epochs, indices, what)
