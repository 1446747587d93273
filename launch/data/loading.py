"""The processes that read pictures: how they are started, and batches that outlive them."""

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from launch.data.temporary import take_temporary_folder
from launch.run.randomness import generator
from launch.run.signals import STOPPING, die_with_parent, in_main_thread
from vim_backbone.errors import UserError

Item = TypeVar("Item")
RESTARTS = 3
"""Losses of a data-loading process with no batch in between, after which the run ends."""


def loader_of(
    dataset: Dataset[Any], collate: Callable[[list[Any]], Item], seed: int, workers: int, ahead: int, **options: Any
) -> DataLoader[Any]:
    """A loader whose processes leave signals to the trainer and draw from no global generator.

    Args:
        collate: samples -> a batch.
        workers: processes that read; 0 reads in this one.
        ahead: batches that each of them reads ahead.
        options: which samples are in a batch, and more for `DataLoader`.
    """
    if workers:
        take_temporary_folder()
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_trainer,
        prefetch_factor=ahead if workers else None,
        # workers draw nothing from it; without its own generator a loader would advance torch's global one
        generator=generator(seed),
        **options,
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; the host does not wait for the copy, which pageable memory would make it do."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Let signals reach only the training process, which stops its workers after it has saved, and die with it."""
    del worker
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)  # a worker that is stopped does not see by itself that its parent is gone


def enduring(loader_from: Callable[[int], Iterable[Item]], start: int, say: Callable[[str], None]) -> Iterator[Item]:
    """Batches from number `start` on; when a data-loading process dies, a new loader begins where the old one was.

    Args:
        loader_from: makes the loader whose first batch is that of the number given.
        start: number of the first batch.
        say: takes a line on each loss.

    Raises:
        UserError: data-loading processes die again and again.
    """
    lost = 0
    while True:
        try:
            batches = iter(loader_from(start))
            # PyTorch would raise at whatever line is running when a child dies, halfway through a step perhaps;
            # without its handler the loss shows when the next batch is asked for
            if in_main_thread():  # elsewhere PyTorch sets none
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for batch in batches:
                yield batch
                start, lost = start + 1, 0
            return
        except UserError as error:  # from another process it comes with that one's traceback
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            lost += 1
            cause = " ".join(str(error).split())[:200]
            if lost > RESTARTS:
                raise UserError(
                    f"data-loading processes died {lost} times at batch {start} ({cause}): is memory short? "
                    "lower data.workers"
                ) from error
            say(f"a data-loading process was lost, its batches are read again: {cause}")
