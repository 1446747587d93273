"""Stages of a run, such as small views first and large ones last: fields, steps and samples of each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch.utils.data import Sampler

from launch.data.order import BatchPlan, StepSampler
from vim_backbone.errors import UserError, require

Size = tuple[int, int]
"""Height and width in pixels."""
Item = tuple[int, int, Size]
"""Epoch, index of the picture, and `img_size` of the view to cut from it."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stretch of the run; what it leaves out is as the run has it."""

    until: float = 1.0
    """Share of the run's steps at which it ends; 1 for the last stage."""
    img_size: int | tuple[int, int] | None = None
    """Side, or [height, width], of its views in pixels; null for model.img_size."""
    batch_size: int | None = None
    """Pictures of one of its steps; null for the run's batch_size."""


@dataclass(frozen=True)
class Stage:
    """Steps whose views, and whose batches, have one size."""

    steps: range
    """Counted through the run."""
    img_size: Size
    """As `View.img_size`."""
    plan: BatchPlan
    number: int = 1
    """Of the stage in the run."""
    first_sample: int = 0
    """Samples of the run before it, where every step has `plan.batch_size`."""

    def metrics(self) -> dict[str, float]:
        """What a row of metrics has of it."""
        return {"stage": self.number, "height": self.img_size[0], "width": self.img_size[1]}


@contextmanager
def errors_of(number: int) -> Iterator[None]:
    """Name the stage in a UserError of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"stages[{number}]: {error}") from error


def check_stages(stages: Sequence[StageConfig]) -> None:
    """Raise UserError where their shares of the run do not rise to 1."""
    require(bool(stages), "stages", stages, "give a stage or more, or null")
    before = 0.0
    for number, stage in enumerate(stages):
        name = f"stages[{number}].until"
        last = number == len(stages) - 1
        require(not last or stage.until == 1, name, stage.until, "the last stage ends with the run, at 1")
        require(before < stage.until <= 1, name, stage.until, f"it must be above {before:g}, and 1 at most")
        before = stage.until


def borders(stages: Sequence[StageConfig], total_steps: int) -> list[range]:
    """Steps of each stage. Raises UserError where one has none."""
    ends = [round(stage.until * total_steps) for stage in stages]
    stretches = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    for number, (stage, steps) in enumerate(zip(stages, stretches, strict=True)):
        remedy = f"that leaves it none of {total_steps} steps; give more steps, or a longer stage"
        require(len(steps) > 0, f"stages[{number}].until", stage.until, remedy)
    return stretches


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of a step; the last one for what comes after the run."""
    return next((stage for stage in stages if step < stage.steps.stop), stages[-1])


def pixels_of(stages: Sequence[Stage]) -> Callable[[int], float]:
    """Number of steps -> pixels of so many first steps, which the time for them goes with."""

    def pixels(steps: int) -> float:
        total = 0
        for stage in stages:
            height, width = stage.img_size
            total += len(stage.steps[: max(0, steps - stage.steps.start)]) * stage.plan.batch_size * height * width
        return float(total)

    return pixels


class StageSampler(Sampler[list[Item]]):
    """Batches of one process: the samples of `StepSampler`, whose order goes on through the stages."""

    def __init__(
        self, counts: int | Sequence[int], seed: int, stages: Sequence[Stage], start_batch: int,
        weights: Sequence[float] = (1.0,),
    ) -> None:  # fmt: skip
        """`counts` and `weights` as `StepSampler`; `start_batch`: batches of this process that are done, in all."""
        self.counts = counts
        self.weights = weights
        self.seed = seed
        self.stages = stages
        self.start_batch = start_batch

    def __len__(self) -> int:
        last = self.stages[-1]
        return max(0, last.steps.stop * last.plan.accumulation - self.start_batch)

    def __iter__(self) -> Iterator[list[Item]]:
        for stage in self.stages:
            done = max(0, self.start_batch - stage.steps.start * stage.plan.accumulation)
            steps = len(stage.steps)
            for items in StepSampler(self.counts, self.seed, stage.plan, done, steps, self.weights, stage.first_sample):
                yield [(epoch, index, stage.img_size) for epoch, index in items]
