"""Steps of as many native views as a budget of patches holds, the same on any number of processes."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from launch.data.sources import ImageSource, passes_over
from launch.run.randomness import generator
from pretrain.data import View
from pretrain.stages import Item, Stage, stage_at

READERS = 16
"""Threads that read how large pictures are."""
STEPS_IN_CHECKPOINT = 4
"""Steps whose beginnings a checkpoint has: it may be of a step before the last."""
STARTS = "starts"
"""Where a checkpoint has them."""


class Packs:
    """Which samples each step has, where a batch counts patches.

    A step takes samples of the run's order one after the other, as long as their patches fit into those of `batch_size`
    views of the largest area: a function of the seed, the order and the sizes of the pictures. They are dealt out to
    processes and forward passes so that these have nearly as many patches each, one view of the largest area more than
    their share at most.
    """

    def __init__(
        self, source: ImageSource, view: View, seed: int, stages: Sequence[Stage], step: int, saved: dict[str, Any]
    ) -> None:
        """`saved`: what a checkpoint of `step` has of `state`; empty for a fresh run, or one that counted views."""
        self.source = source
        self.view = view
        self.seed = seed
        self.stages = stages
        stage = stage_at(stages, step)
        uniform = stage.first_sample + (step - stage.steps.start) * stage.plan.batch_size
        self.starts: dict[int, int] = {step: uniform} | {int(other): first for other, first in saved.items()}
        """First sample of each step, as far as steps are drawn."""
        self._passes = passes_over(source, seed)
        self._sizes = np.zeros((len(source), 2), np.int32)

    def state(self, step: int) -> dict[str, int]:
        """What a checkpoint of `step`, or of one shortly before, must have; older steps are forgotten."""
        self.starts = {other: start for other, start in self.starts.items() if other > step - STEPS_IN_CHECKPOINT}
        return {str(other): start for other, start in self.starts.items() if other <= step}

    def views(self, step: int) -> int:
        """Views of a step, of which a batch was read, over all processes."""
        return self.starts[step + 1] - self.starts[step]

    def weight(self, step: int, views: int) -> float:
        """What the mean loss of a forward pass of so many views is multiplied with, so that each view counts alike."""
        plan = stage_at(self.stages, step).plan
        return views * plan.world * plan.accumulation / self.views(step)

    def draw(self, step: int) -> list[list[Item]]:
        """Items of each forward pass of the step: the first of every process, then the second, and on."""
        stage = stage_at(self.stages, step)
        view, plan = self.view.sized(stage.img_size), stage.plan
        largest = view.grid[0] * view.grid[1]
        left = plan.batch_size * largest
        items: list[Item] = []
        patches: list[int] = []
        for position in itertools.count(self.starts[step]):
            if len(items) % plan.batch_size == 0:
                self._read_sizes(position, plan.batch_size)
            epoch, index = self._passes[position]
            height, width = self._sizes[index].tolist()
            # of what cannot be opened the most: another picture stands in, of any size
            count = view.patches((height, width), generator(self.seed, epoch, index)) if height > 0 else largest
            if count > left:
                break
            left -= count
            items.append((epoch, index, stage.img_size))
            patches.append(count)
        self.starts[step + 1] = self.starts[step] + len(items)
        return [[items[number] for number in part] for part in balanced(patches, plan.world * plan.accumulation)]

    def _read_sizes(self, position: int, count: int) -> None:
        """Learn height and width of so many pictures of the order, where they are not known; -1 for what cannot be
        opened.
        """
        indices = {self._passes[position + ahead][1] for ahead in range(count)}
        unknown = [index for index in sorted(indices) if not self._sizes[index, 0]]
        if not unknown:
            return
        with ThreadPoolExecutor(READERS) as threads:  # which ends here, so that no process is forked beside it
            for index, size in zip(unknown, threads.map(self._size, unknown), strict=True):
                self._sizes[index] = size

    def _size(self, index: int) -> tuple[int, int]:
        try:
            with self.source.open(index) as picture:
                return picture.size
        except Exception:  # a decoder may raise anything on damaged data; the reader of the picture says so
            return -1, -1


class PackSampler(Sampler[list[Item]]):
    """Batches of one process, from number `start_batch` on."""

    def __init__(self, packs: Packs, start_batch: int) -> None:
        self.packs = packs
        self.start_batch = start_batch

    def __len__(self) -> int:
        last = self.packs.stages[-1]
        return last.steps.stop * last.plan.accumulation - self.start_batch

    def __iter__(self) -> Iterator[list[Item]]:
        stages, plan = self.packs.stages, self.packs.stages[0].plan
        first, done = divmod(self.start_batch, plan.accumulation)
        for step in range(first, stages[-1].steps.stop):
            yield from self.packs.draw(step)[plan.rank :: plan.world][done:]
            done = 0


def balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Numbers of the items of each part, in order: the longest first, each to the part that has the least.

    No part has more than the mean and the longest item together.
    """
    loads = [0] * parts
    numbers: list[list[int]] = [[] for _ in range(parts)]
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        part = loads.index(min(loads))
        loads[part] += lengths[number]
        numbers[part].append(number)
    return [sorted(part) for part in numbers]
