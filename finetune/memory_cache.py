"""Pictures and maps of a small set, decoded once and held in memory, where all processes that read them share them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import psutil
import torch
from torch import Tensor

from launch.data.images import BadPictureError
from launch.data.loading import number_of_workers
from vim_backbone.errors import UserError
from vim_backbone.images import reason

Cache = Literal["none", "memory"]
MOST = 0.5
"""Share of the memory that is free which the training processes of a host may fill together."""
ALIGNED = 8
"""Bytes that the place of a tensor is a multiple of, as its type may ask for."""


class TensorCache:
    """What `read` gives of each index, one or more tensors; one tensor of bytes, which a forked process shares.

    Raises UserError where it takes more than MOST of the memory.
    """

    def __init__(self, read: Callable[[int], tuple[Tensor, ...]], total: int, workers: int | None) -> None:
        limit = MOST * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._samples: list[list[tuple[int, torch.Size, torch.dtype]] | str] = []
        """Where in the bytes each tensor of a sample begins, its shape and type; or why it cannot be read."""
        parts, size = [], 0
        with ThreadPoolExecutor(number_of_workers(workers) or 1) as pool:
            for tensors in pool.map(lambda index: _read(read, index), range(total)):
                if isinstance(tensors, str):
                    self._samples.append(tensors)
                    continue
                places = []
                for tensor in tensors:
                    part = tensor.contiguous().view(-1).view(torch.uint8)
                    places.append((size, tensor.shape, tensor.dtype))
                    parts.append((size, part))
                    size += -(-len(part) // ALIGNED) * ALIGNED
                self._samples.append(places)
                if size > limit:
                    pool.shutdown(cancel_futures=True)
                    raise UserError(
                        f"data.cache is 'memory': {len(self._samples)} of {total} samples take {size / 1e9:.1f} GB, "
                        f"and each training process may fill {limit / 1e9:.1f}; set data.cache none"
                    )
        self._bytes = torch.empty(size, dtype=torch.uint8)
        while parts:  # from the end, so that no picture is there twice for long
            start, part = parts.pop()
            self._bytes[start : start + len(part)] = part

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """The tensors of an index, which must not be written to. Raises BadPictureError where they cannot be read."""
        places = self._samples[index]
        if isinstance(places, str):
            raise BadPictureError(places)
        return tuple(self._tensor(*place) for place in places)

    def _tensor(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self._bytes[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _read(read: Callable[[int], tuple[Tensor, ...]], index: int) -> tuple[Tensor, ...] | str:
    try:
        return read(index)
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged data
        return reason(error)
