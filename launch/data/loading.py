"""The processes that read pictures: how many there are, how they are started, and batches that outlive them."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import joblib
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from launch.data.temporary import take_temporary_folder
from launch.run.randomness import generator
from launch.run.signals import STOPPING, die_with_parent, in_main_thread
from launch.state.checkpoint import TrainState
from vim_backbone.errors import UserError

Item = TypeVar("Item")
RESTARTS = 3
"""Losses of a data-loading process with no batch in between, after which the run ends."""
MOST_WORKERS = 16
"""Data-loading processes of a training process that is not told how many it has."""
STREAM = "stream"
"""Where a checkpoint keeps how many processes read its stream."""


def workers_for(cores: float) -> int:
    """Data-loading processes for a training process that may use so many cores: all but one, at most MOST_WORKERS.

    On two cores both, because decoding waits for files and training for pictures; never none.
    """
    whole = max(1, int(cores))
    return max(min(2, whole), min(MOST_WORKERS, whole - 1))


def number_of_workers(workers: int | None) -> int:
    """As asked for, else by this training process's share of the cores that affinity and the container's quota leave.

    LOKY_MAX_CPU_COUNT lowers the number of cores.
    """
    if workers is None:
        return workers_for(joblib.cpu_count() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return workers


def workers_of_stream(workers: int | None, processes: int, state: TrainState) -> tuple[int, list[str]]:
    """How many processes read a stream for each of so many training processes, and lines where it is not as it was.

    Which rows come next depends on it: where nothing is asked for, a resumed run has as many as before, whatever the
    machine. What is taken is noted in the state, which a checkpoint keeps.
    """
    before = state.extra.get(STREAM)
    number = before["workers"] if workers is None and before else number_of_workers(workers)
    state.extra[STREAM] = now = {"processes": processes, "workers": number}
    if not state.step or before == now:
        return number, []
    earlier = f"{before['processes']} x {before['workers']}" if before else "an unknown number of"
    return number, [
        f"the stream was read by {earlier} processes and is by {processes} x {number} now: it does not go on exactly, "
        "rows of this pass may come again or not at all"
    ]


def loader_of(
    dataset: Dataset[Any], collate: Callable[[list[Any]], Item], seed: int, workers: int | None, ahead: int,
    **options: Any,
) -> DataLoader[Any]:  # fmt: skip
    """A loader whose processes leave signals to the trainer and draw from no global generator.

    Args:
        collate: samples -> a batch.
        workers: processes that read, no more than there are batches; 0 reads in this one. None: `number_of_workers`.
        ahead: batches that each of them reads ahead.
        options: which samples are in a batch, and more for `DataLoader`.
    """
    workers = number_of_workers(workers)
    if "batch_sampler" in options:
        workers = min(workers, len(options["batch_sampler"]))
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
    signal.set_wakeup_fd(-1)  # it is a copy of the trainer's, who would take the worker's signals for its own
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
    deaths = 0
    while True:
        try:
            batches = iter(loader_from(start))
            # PyTorch would raise at whatever line is running when a child dies, halfway through a step perhaps;
            # without its handler the loss shows when the next batch is asked for
            if in_main_thread():  # elsewhere PyTorch sets none
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for batch in batches:
                yield batch
                start, deaths = start + 1, 0
            return
        except UserError as error:  # from another process it comes with that one's traceback
            # frames would hold the loader until this process ends, which would then wait for the loader's processes
            batches = None
            line = str(error).strip().splitlines()[-1].split("UserError: ")[-1]
            raise UserError(line) from error.with_traceback(None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            deaths += 1
            cause = " ".join(str(error).split())[:200]
            if deaths > RESTARTS:
                raise UserError(
                    f"data-loading processes died {deaths} times at batch {start} ({cause}): is memory short? "
                    "lower data.workers"
                ) from error
            say(f"a data-loading process was lost, its batches are read again: {cause}")
