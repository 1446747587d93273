"""Which samples a step has, on which process: a function of the seed and the step, whatever the number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass, field

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


class Passes:
    """Endless shuffled passes over a source: sample k of a run as (epoch, index)."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position // self.count != self._epoch:
            self._epoch = position // self.count
            self._order = torch.randperm(self.count, generator=generator(self.seed, self._epoch))
        return self._epoch, int(self._order[position % self.count])


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): sample k of the run is the k-th of endless shuffled passes over the source.

    Step s takes samples first_sample + s * batch_size and on, whatever the number of processes; each process takes its
    share.
    """

    def __init__(
        self, count: int, seed: int, plan: BatchPlan, start_batch: int, total_steps: int, first_sample: int = 0
    ) -> None:
        self.count = count
        self.seed = seed
        self.plan = plan
        self.batches = range(start_batch, total_steps * plan.accumulation)
        self.first_sample = first_sample

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, passes = self.plan, Passes(self.count, self.seed)
        for batch in self.batches:
            first = self.first_sample + (batch * plan.world + plan.rank) * plan.micro_batch
            yield [passes[position] for position in range(first, first + plan.micro_batch)]
