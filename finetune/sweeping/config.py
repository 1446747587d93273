"""Fields of a sweep."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.registry import TASKS
from vim_backbone.errors import UserError, nearest, require


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Which trials go on. Time is the percent of a trial's own training that is done, whatever its steps."""

    kind: Literal["none", "asha", "median", "pbt"] = "asha"
    """asha: at percents grace, grace * reduction, ... only the best 1 / reduction go on; median: what is worse than the
    median of the running means stops; pbt: the worst quarter takes over weights and fields of the best."""
    grace: float = 20.0
    """Percent of the training before which no trial is stopped; of pbt, percent from one exchange to the next."""
    reduction: float = 3.0
    """Of asha: the factor from one rung to the next."""

    def __post_init__(self) -> None:
        require(0 < self.grace < 100, "scheduler.grace", self.grace, "it must lie in (0, 100)")
        require(self.reduction > 1, "scheduler.reduction", self.reduction, "it must be above 1")


@dataclass(frozen=True, kw_only=True)
class ResourceConfig:
    """What one trial takes."""

    cpus: float = 1.0
    """CPU cores of each of its processes."""
    gpus: float = 0.0
    """GPU of each of its processes; 0.5 lets two trials share one, where a trial is one process."""
    workers: int = 1
    """Training processes; several train as one, by Ray Train and Accelerate."""

    def __post_init__(self) -> None:
        require(self.cpus >= 0, "resources.cpus", self.cpus, "it cannot be negative")
        require(self.gpus >= 0, "resources.gpus", self.gpus, "it cannot be negative")
        require(self.cpus + self.gpus > 0, "resources.cpus", self.cpus, "a trial must take a CPU or a GPU")
        require(self.workers >= 1, "resources.workers", self.workers, "it must be at least 1")
        require(self.gpus <= 1, "resources.gpus", self.gpus, "a process uses one GPU: raise resources.workers for more")
        shared = self.workers > 1 and 0 < self.gpus < 1
        require(not shared, "resources.gpus", self.gpus, "processes of one trial cannot share a GPU (NCCL): set 1")


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Where the trials run."""

    address: str | None = None
    """HOST:PORT of a running cluster, or auto; null takes RAY_ADDRESS, and without it starts Ray on this machine."""
    cpus: int | None = None
    """CPU slots of the Ray that is started on this machine; all cores when not given."""
    gpus: int | None = None
    """GPU slots of it; all GPUs when not given."""
    dashboard: bool = False
    """Start Ray's dashboard, on 127.0.0.1; needs ray[default]."""
    wait_seconds: float = 10.0
    """How long an address may take to answer."""
    autoscaling: bool = False
    """The cluster adds nodes: wait for resources that no present node has, instead of refusing them."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep: many fine-tuning runs of one task, over a space of their fields."""

    task: str
    """What is fine-tuned: a task of finetune/main.py."""
    base: str | None = None
    """YAML file for finetune/main.py that every trial starts from."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Dotted field of finetune/main.py -> value, the same in every trial; they come after `base`."""
    space: dict[str, Any] = field(default_factory=dict)
    """Dotted field -> {choice: [...]}, {grid: [...]}, {uniform: [low, high]} or {loguniform: [low, high]}."""
    metric: str = ""
    """Score of a trial: a name in its evaluations' metrics.json, such as top1, mIoU or box_AP."""
    mode: Literal["max", "min"] = "max"
    """Whether a higher score is better."""
    searcher: Literal["random", "grid", "tpe"] = "tpe"
    """random; grid: every combination of choices once; tpe: Optuna's tree-structured Parzen estimator."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    trials: int | None = None
    """Trials in all; when not given, as many as the grid has combinations."""
    hours: float | None = None
    """Stop then; --resume with a larger number goes on."""
    concurrent: int | None = None
    """Trials at a time at most; when not given, as many as there are resources for."""
    retries: int = 2
    """How often a trial that died is started again, from its newest checkpoint."""
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    storage: str | None = None
    """Folder or URL (s3://, gs://, file://) of the trials' checkpoints, which every node must reach; null: in the
    sweep's folder."""
    name: str = "sweep"
    """Name of the sweep; its folder is OUT/NAME."""
    out: str = "runs"
    """Folder that holds the sweeps."""
    seed: int = 0
    """Seed of what is drawn from the space."""
    resume: bool | Literal["auto"] = False
    """Go on with the sweep of this name: finished trials stay, running ones go on from their checkpoints; auto: begin
    it where there is none."""
    overwrite: bool = False
    """Delete an earlier sweep of the same name first."""
    top: int = 0
    """Run nothing: print the commands that repeat the best so many trials of this sweep without Ray."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UserError(f"name is {self.name!r}: it must be a plain folder name")
        require(self.seed >= 0, "seed", self.seed, "it cannot be negative")
        require(bool(self.space), "space", self.space, "give at least one field to search over")
        if self.task not in TASKS:
            raise UserError(f"task is {self.task!r}: there is no such task; {nearest(self.task, TASKS)}")
        metrics = TASKS[self.task].metrics
        if self.metric not in metrics:
            raise UserError(f"metric is {self.metric!r}: {self.task} reports no such; {nearest(self.metric, metrics)}")
        for name in ("trials", "concurrent"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "it must be at least 1")
        require(self.hours is None or self.hours > 0, "hours", self.hours, "it must be positive")
        require(self.retries >= 0, "retries", self.retries, "it cannot be negative")
        require(self.top >= 0, "top", self.top, "it cannot be negative")

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path(self.out) / self.name
