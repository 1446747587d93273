"""The devices that a trial runs on, as its processes find them."""

import os
import socket
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Place(NamedTuple):
    """The device of a process."""

    host: str
    device: str
    """CPU, or GPU and its number on the host."""
    model: str
    """Such as NVIDIA H100 80GB HBM3; empty for a CPU."""


def places() -> list[Place]:
    """The device of each process of this trial; for all of them to call."""
    mine = Place(socket.gethostname(), "CPU", "")
    if torch.cuda.is_available():
        numbers = os.environ["CUDA_VISIBLE_DEVICES"].split(",")  # of the host, which Ray sets
        mine = Place(mine.host, f"GPU {numbers[torch.cuda.current_device()]}", torch.cuda.get_device_name())
    if not dist.is_initialized():
        return [mine]
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    return of_all
