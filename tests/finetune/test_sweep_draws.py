"""What a sweep draws from its space: spread as it says, by seed and number alone, and learned from by the searcher."""

import math

import numpy as np
import pytest

from finetune.sweeping.ledger import Ledger, TrialEvaluation
from finetune.sweeping.space import combinations, read_space
from tests.finetune.test_sweeping import TYPES
from vim_backbone.errors import UserError


def draws(tmp_path, spec, count, searcher="random", seed=0):
    tmp_path.mkdir(exist_ok=True)
    ledger = Ledger(tmp_path, "max", "top1", read_space(spec, TYPES))
    for _ in range(count):
        ledger.draw(searcher, seed)
    fields = [entry.fields for entry in ledger.entries()]
    ledger.close()
    return fields


def test_draws_are_spread_as_the_space_says(tmp_path):
    spec = {"lr": {"loguniform": ["1e-4", 1e-2]}, "size": {"uniform": [1, 4]}, "mode": {"choice": ["a", "b"]}}
    fields = draws(tmp_path, spec, 300)
    logs = np.log10([f["lr"] for f in fields])
    assert logs.min() >= -4
    assert logs.max() <= -2
    assert abs(np.median(logs) - -3) < 0.2, "half of a log-uniform draw lies below the geometric mean"
    sizes = np.bincount([f["size"] for f in fields], minlength=5)
    assert sizes[0] == 0
    assert (abs(sizes[1:] - 75) < 4 * math.sqrt(300 * 0.25 * 0.75)).all()
    share = np.mean([f["mode"] == "a" for f in fields])
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 300)


def test_draws_depend_on_seed_and_number_alone(tmp_path):
    spec = {"lr": {"uniform": [0, 1]}, "betas": {"choice": [[0.9, 0.99], [0.9, 0.95]]}}
    whole = draws(tmp_path / "whole", spec, 6)
    draws(tmp_path / "parts", spec, 2)
    assert draws(tmp_path / "parts", spec, 4) == whole, "as after a resume"
    assert draws(tmp_path / "other", spec, 6, seed=1) != whole
    assert all(f["betas"] in ([0.9, 0.99], [0.9, 0.95]) for f in whole)


def test_a_grid_is_gone_through_once(tmp_path):
    spec = {"mode": {"grid": ["a", "b"]}, "size": {"grid": [1, 2, None]}}
    fields = draws(tmp_path, spec, 6)
    assert sorted(map(str, fields)) == sorted(str({"mode": m, "size": s}) for m in "ab" for s in (1, 2, None))


def test_the_searcher_learns(tmp_path):
    """TPE draws near the good ones, more than chance would."""
    space = read_space({"lr": {"uniform": [0, 1]}}, TYPES)
    ledger = Ledger(tmp_path, "min", "loss", space)
    for _ in range(40):
        number = ledger.draw("tpe", 0)
        value = (ledger.entry(number).fields["lr"] - 0.3) ** 2
        ledger.note(number, TrialEvaluation(1, 100, {"loss": value}, 1), ledger.entry(number).fields, stopped=False)
        ledger.finish(number)
    last = [entry.fields["lr"] for entry in ledger.entries()[-20:]]
    assert np.median(np.abs(np.array(last) - 0.3)) < 0.12, "by chance it is about 0.2 to 0.25"
    assert ledger.best(1)[0].fields["lr"] == min((e.fields["lr"] for e in ledger.entries()), key=lambda x: abs(x - 0.3))
    ledger.close()


def test_grids_and_choices_of_millions_are_refused():
    types = dict.fromkeys(("a", "b", "c"), "a whole number")
    grid = {"grid": list(range(100))}
    with pytest.raises(UserError, match="space is 1000000: combinations of a grid, 100000 at most"):
        combinations(read_space({"a": grid, "b": grid, "c": grid}, types))
    assert len(combinations(read_space({"a": grid, "b": grid}, types))) == 10_000
    with pytest.raises(UserError, match=r"space.a is 1000000: values, 1000 at most: give a range"):
        read_space({"a": {"choice": list(range(10**6))}}, types)
