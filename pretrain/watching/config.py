"""Fields that say how a run is watched."""

from dataclasses import dataclass

from launch.data.labelled import LabelledSource
from vim_backbone.errors import require


@dataclass(frozen=True, kw_only=True)
class EvalConfig(LabelledSource):
    """How a run is watched. Nothing is evaluated without `share` or `source`."""

    share: float = 0.0
    """Share of the pictures that is held out: they are never trained on, and their loss is taken at each evaluation,
    with the same crops and masks every time. Which ones is a function of the seed and a picture's name. 0.01 or 0.02
    are enough where there are thousands."""
    source: str = ""
    """Labelled pictures, on whose features nearest neighbours and a linear probe are scored: a folder with
    train/CLASS/* and val/CLASS/*, or CLASS/* alone with `holdout`; or a data set: .parquet, .arrow, .tar or .zip
    file(s) by path, glob or URL, with {split} where splits have files of their own, a folder of `save_to_disk`, or
    hf:NAME."""
    pictures: int = 2048
    """Most pictures of a kind that an evaluation reads: held out, labelled to learn from, labelled to score."""
    every: int | None = None
    """Steps between evaluations; there is one before the first step and one after the last in any case. null: as many
    as train on 100 times the pictures that an evaluation reads, which keeps it below 2 % of the time."""

    def __post_init__(self) -> None:
        require(0 <= self.share < 1, "eval.share", self.share, "it must lie in [0, 1)")
        require(0 <= self.holdout < 1, "eval.holdout", self.holdout, "it must lie in [0, 1)")
        require(self.shots is None or self.shots >= 1, "eval.shots", self.shots, "it must be at least 1")
        require(self.pictures >= 2, "eval.pictures", self.pictures, "it must be at least 2")
        require(self.every is None or self.every >= 1, "eval.every", self.every, "it must be at least 1")
