"""Labelled samples to batches: for training in the order of pretraining, for evaluation each sample exactly once."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

from accelerate import Accelerator
from torch.utils.data import Dataset

from finetune.task import BatchedSamples, LabelledBatch, Samples
from launch.data.bad_pictures import first_usable
from launch.data.loading import loader_of
from launch.data.order import BatchPlan, StepSampler
from launch.run.randomness import seeded
from vim_backbone.errors import UserError


class ReadSample(NamedTuple):
    """One sample as a data-loading process gives it."""

    sample: tuple[Any, Any] | None
    """None where no sample could be used."""
    number: int
    name: str
    counted: bool
    """Whether it is the sample of the index: else it stands in, and an evaluation leaves it out."""
    bad: list[tuple[str, str]]
    """Samples passed over, with the reason."""


class KeyedSamples(Dataset[ReadSample]):
    """Item (epoch, index, counted) -> the sample, its randomness keyed by (seed, epoch, index).

    A bad sample is replaced by the next good one.
    """

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __getitem__(self, item: tuple[int, ...]) -> ReadSample:
        epoch, index = item[:2]

        def read(candidate: int, attempt: int) -> tuple[Any, Any]:
            # another key for what stands in: where augmentation failed, the same draws would fail again
            with seeded(self.seed, epoch, index, *([attempt] if attempt else [])):
                return self.samples.draw(candidate)

        sample, number, bad = first_usable(self.samples, index, read)
        if sample is None:
            return ReadSample(None, index, "", False, bad)
        return ReadSample(sample, number, self.samples.name(number), not bad and all(item[2:]), bad)


class Collate:
    """Samples to a batch."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, reads: list[ReadSample]) -> LabelledBatch:
        """No pictures where a sample is missing."""
        bad = [entry for read in reads for entry in read.bad]
        good = [read.sample for read in reads if read.sample is not None]
        images, targets = self.samples.collate(good) if len(good) == len(reads) else (None, None)
        names, numbers, counted = ([getattr(r, key) for r in reads] for key in ("name", "number", "counted"))
        return LabelledBatch(images, targets, names, bad, numbers, counted)


def training_batches(
    samples: Samples | BatchedSamples,
    seed: int,
    plan: BatchPlan,
    start_batch: int,
    total_steps: int,
    workers: int | None,
) -> Iterator[LabelledBatch]:
    """Batches of this process, each for one forward pass, from number `start_batch` on."""
    sampler = StepSampler(len(samples), seed, plan, start_batch, total_steps)
    return iter(_batches(samples, seed, workers, sampler))


def evaluation_batches(
    samples: Samples | BatchedSamples, accelerator: Accelerator, batch_size: int, workers: int | None
) -> Iterator[LabelledBatch]:
    """The share of this process of all samples, each sample counted on one process alone.

    All processes get the same number of batches, because under ZeRO-3 a forward pass is for all of them; what fills up
    a share is not counted. Raises UserError where no sample of a batch can be read.
    """
    rank, world, total = accelerator.process_index, accelerator.num_processes, len(samples)
    batches = math.ceil(math.ceil(total / world) / batch_size)
    items = [(0, index, True) for index in range(rank, total, world)] or [(0, 0, False)]
    batched = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    batched += [[(0, items[0][1], False)]] * (batches - len(batched))
    for batch in _batches(samples, 0, workers, batched):
        if batch.images is None:
            raise UserError(f"validation data cannot be read: {batch.bad[0][0]} ({batch.bad[0][1]}) and others")
        yield batch


def _batches(
    samples: Samples | BatchedSamples, seed: int, workers: int | None, sampler: Iterable[list[Any]]
) -> Iterable[LabelledBatch]:
    if isinstance(samples, BatchedSamples):
        return (samples.batch(seed, items) for items in sampler)
    keyed, collate = KeyedSamples(samples, seed), Collate(samples)
    return cast("Iterable[LabelledBatch]", loader_of(keyed, collate, seed, workers, 2, batch_sampler=sampler))
