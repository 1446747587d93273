"""The parts of a run's configuration that all kinds of runs share, and the resolved file that records it."""

from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from launch.run.guard import GuardConfig
from vim_backbone.errors import UserError, nearest, require
from vim_backbone.files import write_text
from vim_backbone.memory import Recompute


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, how it starts again, and how it is watched."""

    name: str = "run"
    """Name of the run; its folder is OUT/NAME."""
    out: str = "runs"
    """Folder that holds the runs."""
    resume: bool | Literal["auto"] = False
    """Go on from the newest checkpoint that is whole; auto: if there is one, and start afresh if not."""
    overwrite: bool = False
    """Delete an earlier run of the same name first."""
    seed: int = 0
    """Seed of weights, data order, and all that is drawn for a picture."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; parameters, scan state and residual stream stay float32."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one more is written at the end and on an interrupt."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Keep the checkpoints of steps that this divides for ever; 0 for none."""
    async_checkpoints: bool = True
    """Write checkpoints beside the training, from a copy in CPU memory."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    hang_seconds: float = 1800.0
    """A step that takes longer ends the run, with a line on which process holds it up."""
    start_seconds: float = 3600.0
    """The same limit until the first step is done: kernels are compiled and, under ZeRO, DeepSpeed's operations."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers of Accelerate that get the metrics too: tensorboard, wandb, trackio, ..."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UserError(f"name is {self.name!r}: it must be a plain folder name")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        require(self.seed >= 0, "seed", self.seed, "it cannot be negative")
        require(self.keep_every >= 0, "keep_every", self.keep_every, "it cannot be negative")
        for tracker in (name for name in self.trackers if name != "all"):
            builtin = tracker in LOGGER_TYPE_TO_CLASS
            require(builtin, "trackers", tracker, f"there is no such tracker, {nearest(tracker, LOGGER_TYPE_TO_CLASS)}")
            installed = tracker in [str(available) for available in get_available_trackers()]
            require(installed, "trackers", tracker, f"it is not installed: pip install {tracker.replace('_', '-')}")
        for name in ("hang_seconds", "start_seconds"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be positive")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out) / self.name


@dataclass(frozen=True, kw_only=True)
class BlocksConfig:
    """What the blocks of the trained model keep for the backward pass."""

    recompute: Literal[Recompute, "auto"] = "inputs"
    """What the backward pass makes again to save memory; each level makes what those before it do, too. none: nothing,
    the fastest; keeps half as much more of a block than inputs (on CPU the same). inputs: convolutions and projections
    before the scan, a twentieth of the time. states: the scan's states by one more forward scan, a tenth of the time;
    keeps three fifths of inputs, but with scan=pooled, which has few states, hardly less. products: all of a block but
    its stream and norm, by one product more; keeps a fifth of inputs, with scan=pooled a third. auto: the fastest with
    which the batch fits into the GPU by launch/plan.py's count; on CPU inputs. Only pretraining can count."""

    @property
    def level(self) -> Recompute:
        """What the backward pass makes again, where nothing counts."""
        return "inputs" if self.recompute == "auto" else self.recompute


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """How long a run trains, and on how many pictures at a time."""

    UNSTATED: ClassVar[tuple[int | None, float | None]] = (None, None)
    """Steps and epochs of a run that is given neither."""

    steps: int | None = None
    """Optimiser steps; give this or epochs."""
    epochs: float | None = None
    """Passes over the training pictures."""
    batch_size: int = 32
    """Pictures of one optimiser step, over all processes and accumulation steps."""
    accumulation: int = 1
    """Forward passes that one optimiser step gathers."""
    ema_decay: float | None = None
    """Averages the weights with this factor a step, such as 0.9999; the average is evaluated and published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "accumulation"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        require(self.steps is None or self.epochs is None, "epochs", self.epochs, "give steps or epochs, not both")
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "it must be at least 1")
        require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "it must be positive")
        require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "it must lie in (0, 1)")

    @property
    def mean_batch_size(self) -> float:
        """Pictures of a step, over the whole run."""
        return self.batch_size

    def total_steps(self, pictures: int | None) -> int:
        """Optimiser steps of the run over so many training pictures (None: a stream)."""
        steps, epochs = (self.steps, self.epochs) if self.steps or self.epochs else self.UNSTATED
        if steps is not None:
            return steps
        require(pictures is not None, "epochs", epochs, "a stream has no length, give steps instead")
        return max(1, round((epochs or 0) * (pictures or 0) / self.mean_batch_size))


def plain(config: Any) -> dict[str, Any]:
    """A config as plain data: dicts, lists, strings and numbers."""
    return _listed(asdict(config))


def write_config(config: Any, path: Path) -> None:
    """Write the resolved config as YAML that `--config` reads again."""
    write_text(path, yaml.safe_dump(plain(config), sort_keys=False))


def differences(config: Any, path: Path) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (value in the file, value now) for every field that differs.

    A field that the file lacks, because the version that wrote it did not have it, has its default there. Raises
    UserError where the file cannot be read or holds no fields.
    """
    remedy = "put its last version back, or start with --overwrite"
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())[:200]}; {remedy}") from error
    if not isinstance(saved, dict) or not saved:
        raise UserError(f"{path} has no fields (it holds {str(saved)[:40]!r}): {remedy}")
    new = flattened(plain(config))
    old = {name: default_of(config, name) for name in new} | flattened(saved)
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys(), key=str)
        if old.get(key) != new.get(key)
    }


def default_of(config: Any, name: str) -> Any:
    """The default of a dotted field, as plain data; None where it has none."""
    *parents, last = name.split(".")
    for parent in parents:
        config = getattr(config, parent, None)
    entry = next((each for each in fields(config) if each.name == last), None) if is_dataclass(config) else None
    if entry is None or entry.default is entry.default_factory is MISSING:
        return None
    return _listed(entry.default if entry.default_factory is MISSING else entry.default_factory())


def field_types(config_class: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name -> type, in words, of all fields, those of nested configs included."""
    types: dict[str, str] = {}
    hints = get_type_hints(config_class)
    for name, hint in ((f.name, hints[f.name]) for f in fields(config_class)):
        if is_dataclass(hint):
            types |= field_types(hint, f"{prefix}{name}.")
        else:
            types[prefix + name] = _in_words(hint)
    return types


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_in_words(part) for part in get_args(hint))
    if get_origin(hint) in (list, tuple):
        return "[" + ", ".join(_in_words(part) for part in get_args(hint)) + "]"
    if hint is NoneType:
        return "null"
    if is_dataclass(hint):
        return "{" + ", ".join(f"{name}: {words}" for name, words in field_types(hint).items()) + "}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted field -> value of a config as plain data."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
