"""Which samples a step has, on which process: a function of the seed and the step, whatever the number of processes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Sampler

from launch.run.accelerator import on_main
from launch.run.randomness import generator
from vim_backbone.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How the images of one step are spread over processes and forward passes."""

    batch_size: int
    accumulation: int
    world: int
    rank: int
    micro_batch: int = field(init=False)

    def __post_init__(self) -> None:
        parts = self.world * self.accumulation
        if self.batch_size % parts:
            raise UserError(
                f"batch_size {self.batch_size} does not divide into {self.world} processes x {self.accumulation} "
                f"accumulation steps: use a multiple of {parts}"
            )
        object.__setattr__(self, "micro_batch", self.batch_size // parts)


def plan_batches(accelerator: Accelerator, batch_size: int, accumulation: int) -> BatchPlan:
    """The plan of this process. For all processes; a batch that does not divide is an error, printed once."""
    world = accelerator.num_processes
    on_main(accelerator, lambda: BatchPlan(batch_size, accumulation, world, rank=0))
    return BatchPlan(batch_size, accumulation, world, accelerator.process_index)


class Turns:
    """Which source each sample comes from, so that every stretch of samples has each source's share of it.

    Closed form: of any number of samples, each source has had its share, to a sample or two.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights`: of the sources, positive."""
        exact = [Fraction(weight) for weight in weights]
        rest = [sum(exact[number:], Fraction(0)) for number in range(len(exact))]
        self.shares = [weight / left for weight, left in zip(exact, rest, strict=True)]
        """Of what the sources before leave; the last takes all."""

    def before(self, position: int) -> list[int]:
        """How many of the first `position` samples each source has."""
        counts = []
        for share in self.shares:
            counts.append(math.floor(position * share + Fraction(1, 2)))  # exact, and never falls
            position -= counts[-1]
        return counts

    def at(self, position: int) -> tuple[int, int]:
        """Number of the source that sample `position` is of, and how many samples that has had before."""
        now, then = self.before(position), self.before(position + 1)
        number = next(number for number, count in enumerate(now) if then[number] > count)
        return number, now[number]


class Passes:
    """Endless shuffled passes over one source, or over several in turns; their indices follow one another."""

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """`counts`: samples of each source."""
        self.counts = counts
        self.firsts = [sum(counts[:number]) for number in range(len(counts))]
        self.turns = Turns(weights)
        self.seed = seed
        self.orders = [(-1, np.empty(0, np.int64))] * len(counts)
        """Pass that each source is in, and its order."""

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Sample `position` as (pass over its source, index)."""
        number, epoch, place = self._turn(position)
        if epoch != self.orders[number][0]:
            key = (self.seed, epoch, *([number] if number else []))  # the first keeps the order that it has alone
            self.orders[number] = epoch, torch.randperm(self.counts[number], generator=generator(*key)).numpy()
        return epoch, self.firsts[number] + int(self.orders[number][1][place])

    def in_order(self, position: int) -> tuple[int, int]:
        """What sample `position` would be if nothing were shuffled."""
        number, epoch, place = self._turn(position)
        return epoch, self.firsts[number] + place

    def _turn(self, position: int) -> tuple[int, int, int]:
        """Number of the source, pass over it, and place in the pass."""
        if len(self.counts) == 1:  # as below, without the fractions: a tenth of the time
            return 0, *divmod(position, self.counts[0])
        number, turn = self.turns.at(position)
        return number, *divmod(turn, self.counts[number])


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): sample k of the run is the k-th of endless shuffled passes (`Passes`).

    Step s takes samples first_sample + s * batch_size and on, whatever the number of processes; each process takes its
    share.
    """

    def __init__(
        self, counts: int | Sequence[int], seed: int, plan: BatchPlan, start_batch: int, total_steps: int,
        weights: Sequence[float] = (1.0,), first_sample: int = 0,
    ) -> None:  # fmt: skip
        """`counts`: samples of the source, or of each of several, whose weights are `weights`."""
        self.counts = [counts] if isinstance(counts, int) else counts
        self.weights = weights
        self.seed = seed
        self.plan = plan
        self.batches = range(start_batch, total_steps * plan.accumulation)
        self.first_sample = first_sample

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, passes = self.plan, Passes(self.counts, self.weights, self.seed)
        for batch in self.batches:
            first = self.first_sample + (batch * plan.world + plan.rank) * plan.micro_batch
            yield [passes[position] for position in range(first, first + plan.micro_batch)]
