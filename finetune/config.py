"""Fields of every fine-tuning run, whatever its task."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from launch.run.config import BlocksConfig, TrainingConfig
from launch.run.optim import OptimConfig, learning_rate
from vim_backbone.errors import UserError, require
from vim_backbone.memory import LEVELS


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(BlocksConfig):
    """How the backbone is taken up."""

    img_size: int | tuple[int, int] | None = None
    """Side, or [height, width], of the pictures in pixels; positions are resampled to it. null: as published."""
    stride: int | None = None
    """Pixels from one patch to the next; 8 under patches of 16 gives four times the tokens. null: as published."""
    drop_path_rate: float = 0.1
    """Stochastic depth at the last block."""
    global_pool: Literal["token", "avg"] | None = None
    """What a classifier reads: class token, or mean of the patch tokens. null: as published."""
    from_scratch: bool = False
    """The same net with fresh weights: what pretraining is to be measured against."""
    freeze: bool = False
    """Train the head alone."""

    def __post_init__(self) -> None:
        remedy = f"only pretraining counts the memory of its model, choose {', '.join(LEVELS)}"
        require(self.recompute != "auto", "model.recompute", self.recompute, remedy)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptim(OptimConfig):
    """AdamW with layer-wise rates, and the schedules of the three recipes."""

    base_lr: float = 5e-4
    """Learning rate per 256 pictures of a step; the rate used is base_lr * batch_size / 256."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors."""
    layer_decay: float = 0.65
    """Factor on the learning rate from one layer to the one below; 1 gives all layers the same."""
    half_rate: bool = True
    """One factor for every two blocks, because Vim has twice the layers of a ViT of its size."""
    schedule: Literal["cosine", "linear", "steps"] = "cosine"
    """After the warm-up: cosine or straight line to min_lr, or a tenth at each of `milestones`."""
    milestones: list[float] = field(default_factory=lambda: [8 / 9, 26 / 27])
    """Shares of the run after which `steps` lowers the rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "it must lie in (0, 1]")

    def rate(self, step: int, batch_size: int, total_steps: int) -> float:
        """Learning rate of step 0 .. total_steps - 1."""
        if self.schedule == "cosine" or step < self.warmup_steps:
            return learning_rate(step, self, batch_size, total_steps)
        peak = self.peak(batch_size)
        if self.schedule == "steps":
            return peak * 0.1 ** sum(step >= share * total_steps for share in self.milestones)
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.min_lr + (peak - self.min_lr) * (1 - progress)

    def layer_scale(self, layer: int, depth: int) -> float:
        """Factor on the rate: layer 0 is the stem, 1 .. depth the blocks, depth + 1 the head, which has 1."""
        below_head = depth + 1 - layer
        return self.layer_decay ** (math.ceil(below_head / 2) if self.half_rate else below_head)


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """Labelled pictures; each task says in which layout."""

    source: str = ""
    """Where the data is."""
    workers: int | None = None
    """Processes that read and augment pictures, for each training process; 0 reads in the training process. null: its
    share of the cores but one, 2 to 16; in a sweep of the CPUs of the trial."""
    max_megapixels: float = 200.0
    """Largest picture that is decoded, in millions of pixels."""
    statistics: str | None = None
    """File of `python -m pretrain.bands`, for pictures of other bands or ranges than those of pretraining; the
    first convolution is adapted to another number of bands. null: bands, range, mean and nodata are the backbone's."""

    def __post_init__(self) -> None:
        require((self.workers or 0) >= 0, "data.workers", self.workers, "it cannot be negative")


Places = tuple[str, str] | str
"""Where files are, below the source or anywhere: of any split, with {split} for its name, or of training and of
evaluation."""


def place_of(source: str, places: Places, split: str, train_split: str) -> Path:
    """Where the files of a split are: below the source, else at that path as it stands."""
    place = places if isinstance(places, str) else places[int(split != train_split)]
    path = Path(place.replace("{split}", split)).expanduser()
    below = Path(source).expanduser() / path
    return path if path.exists() and not below.exists() else below


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Fields that all tasks share."""

    UNSTATED: ClassVar[tuple[int | None, float | None]] = (None, 10)

    mode: str = "train"
    """What the run does; only `train` takes steps."""
    data: LabelledData
    optim: FinetuneOptim = field(default_factory=FinetuneOptim)

    backbone: str = ""
    """Folder of a backbone, as pretraining publishes it, or the id of one on the Hugging Face Hub (OWNER/NAME)."""
    model: BackboneConfig = field(default_factory=BackboneConfig)
    epochs: float | None = None
    """Passes over the training pictures; 10 when neither is given."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    pictures: int = 8
    """Validation pictures to draw predictions on at each evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.backbone), "backbone", self.backbone, "give the folder of a backbone, or OWNER/NAME")
        require(self.pictures >= 1, "pictures", self.pictures, "it must be at least 1")
        require(self.evaluate_every >= 0, "evaluate_every", self.evaluate_every, "it cannot be negative")
        rate = self.model.drop_path_rate
        require(0 <= rate < 1, "model.drop_path_rate", rate, "it must lie in [0, 1)")

    def require_trained(self) -> None:
        """Raise UserError where a model is to be evaluated that no earlier run has trained."""
        if self.mode == "evaluate" and not self.resume:
            raise UserError("mode evaluate needs a trained run: add --resume and the run's --name")
