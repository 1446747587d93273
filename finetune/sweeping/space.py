"""The space of a sweep: fields of a fine-tuning run and what each may be."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray import tune

from vim_backbone.errors import UserError, nearest, require

MOST_COMBINATIONS = 100_000
MOST_VALUES = 1000
KINDS = ("choice", "grid", "uniform", "loguniform")


@dataclass(frozen=True)
class Dimension:
    """One field of the space."""

    field: str
    kind: str
    values: list[Any]
    """The choices, or [low, high]."""
    whole: bool
    """Whether only whole numbers are drawn."""

    @property
    def listed(self) -> bool:
        """Whether the values are all there are."""
        return self.kind in ("choice", "grid")

    @property
    def distribution(self) -> BaseDistribution:
        """As Optuna has it; choices by their JSON text, because Optuna's are plain scalars."""
        if self.listed:
            return CategoricalDistribution([json.dumps(value) for value in self.values])
        low, high = self.values
        log = self.kind == "loguniform"
        return IntDistribution(low, high, log=log) if self.whole else FloatDistribution(low, high, log=log)

    @property
    def mutations(self) -> Any:
        """As Ray's population-based training has it."""
        if self.listed:
            return list(self.values)
        low, high = self.values
        if self.whole:
            return (tune.lograndint if self.kind == "loguniform" else tune.randint)(low, high + 1)
        return (tune.loguniform if self.kind == "loguniform" else tune.uniform)(low, high)


def read_space(space: dict[str, Any], types: dict[str, str]) -> list[Dimension]:
    """The dimensions of a sweep file's `space`; `types` are the task's fields, dotted, with their types in words.

    Raises UserError naming the field that does not exist, or whose space is empty or malformed.
    """
    return [_dimension(field, spec, types) for field, spec in space.items()]


def combinations(dimensions: Iterable[Dimension]) -> list[dict[str, Any]]:
    """Every combination of the values of the dimensions of kind `grid`: field -> value; without such, one empty one."""
    grids = [d for d in dimensions if d.kind == "grid"]
    count = math.prod(len(d.values) for d in grids)
    require(count <= MOST_COMBINATIONS, "space", count, f"combinations of a grid, {MOST_COMBINATIONS} at most")
    return [dict(zip((d.field for d in grids), c, strict=True)) for c in itertools.product(*(d.values for d in grids))]


def decode(dimensions: Iterable[Dimension], params: dict[str, Any]) -> dict[str, Any]:
    """What Optuna drew, as field -> value."""
    listed = {d.field for d in dimensions if d.listed}
    return {field: json.loads(value) if field in listed else value for field, value in params.items()}


def _dimension(field: str, spec: Any, types: dict[str, str]) -> Dimension:
    if field not in types:
        raise UserError(f"space.{field}: no such field; {nearest(field, types)}")
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in KINDS:
        raise UserError(f"space.{field} is {spec!r}: it must be one of " + ", ".join(f"{{{k}: [...]}}" for k in KINDS))
    kind, values = next(iter(spec.items()))
    if not isinstance(values, list) or not values:
        raise UserError(f"space.{field}: {kind} is {values!r}, an empty space: give a list of values")
    if kind in ("choice", "grid"):
        texts = [json.dumps(value) for value in values]
        require(len(texts) <= MOST_VALUES, f"space.{field}", len(texts), f"values, {MOST_VALUES} at most: give a range")
        if twice := [text for text, count in Counter(texts).items() if count > 1]:
            raise UserError(f"space.{field}: {kind} has {twice[0]} twice")
        return Dimension(field, kind, values, whole=False)
    whole = types[field].startswith("a whole number")
    bounds = [_number(field, kind, value, whole) for value in values]
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise UserError(f"space.{field}: {kind} is {values!r}, an empty space: give [low, high] with low < high")
    if kind == "loguniform" and bounds[0] <= 0:
        raise UserError(f"space.{field}: loguniform is {values!r}: low must be above 0")
    return Dimension(field, kind, bounds, whole)


def _number(field: str, kind: str, value: Any, whole: bool) -> float | int:
    try:  # YAML 1.1 reads 1e-4 as text
        number = int(value) if whole else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (whole and number != float(value)) or isinstance(value, bool):
        raise UserError(f"space.{field}: {kind} has {value!r}: it must be a{' whole' if whole else ''} number")
    return number
