"""The record of a sweep: an Optuna study in a journal of JSON lines, which is all that `--resume` goes by.

Ray Tune keeps its own state too, as pickles; nothing reads those.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from finetune.sweeping.places import Place
from finetune.sweeping.space import Dimension, combinations, decode
from launch.run.lock import FolderLock
from launch.run.randomness import seed_of
from vim_backbone.errors import UserError

JOURNAL = "study.jsonl"
STATES = {
    TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed",
}  # fmt: skip
EVALUATION = "evaluation-"

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class TrialEvaluation:
    """One evaluation of one trial."""

    step: int
    percent: float
    """Share of the trial's training that was done, in percent."""
    metrics: dict[str, float]
    seconds: float
    """Time the trial had trained and evaluated for, since it was last started."""
    began: float = 0.0
    """Unix time at which it was last started; not in the records of earlier versions."""
    ended: float = 0.0
    """Unix time of this evaluation."""
    places: tuple[Place, ...] = ()
    """Of all of its processes."""


@dataclass(frozen=True)
class Entry:
    """One trial as the ledger has it."""

    number: int
    state: str
    """waiting, running, finished, stopped early or failed."""
    fields: dict[str, Any]
    """Values of the space's fields; under population-based training the latest."""
    evaluations: list[TrialEvaluation]
    checkpoint: str | None
    """Newest checkpoint that is whole: a path or URL."""
    stopped: bool
    """Whether the scheduler has decided that it must not go on."""
    error: str | None
    changed: bool
    """Whether population-based training has changed its fields on the way."""

    def score(self, metric: str) -> float | None:
        """The metric at the last evaluation: that of the weights that are kept."""
        return self.evaluations[-1].metrics.get(metric) if self.evaluations else None


class Ledger:
    """The study of one sweep. One process writes it."""

    def __init__(self, folder: Path, mode: Literal["max", "min"], metric: str, space: list[Dimension]) -> None:
        """Open or begin the study in the sweep's folder.

        Raises UserError where another process works on the sweep.
        """
        self.path = folder / JOURNAL
        self.metric = metric
        self.space = space
        self._lock = FolderLock(folder, "sweep")
        self._lock.acquire()
        _drop_half_line(self.path)
        # the lock above is what keeps others out; Optuna's own is of use to many writers alone
        storage = JournalStorage(JournalFileBackend(str(self.path)))
        direction = "maximize" if mode == "max" else "minimize"
        self.study = optuna.create_study(
            storage=storage, study_name="sweep", direction=direction, load_if_exists=True, sampler=RandomSampler(0)
        )
        if self.study.direction.name.lower() != direction:
            raise UserError(f"mode is {mode!r}: the sweep in {folder} was begun with the other one")
        self.settle()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray pickles all that it is given, and the journal is the state."""
        return {}

    def close(self) -> None:
        """Let another process have the sweep."""
        self._lock.release()

    def settle(self) -> None:
        """End trials whose last evaluation was already written when the process died."""
        for entry in self.entries():
            if entry.state == "running" and entry.evaluations and entry.checkpoint:
                if entry.evaluations[-1].percent >= 100:
                    self.finish(entry.number)
                elif entry.stopped:
                    self.finish(entry.number, early=True)

    def entries(self) -> list[Entry]:
        """All trials, by number."""
        return [_entry(trial, self.space) for trial in self.study.get_trials(deepcopy=False)]

    def entry(self, number: int) -> Entry:
        """One trial."""
        return _entry(self.study.get_trials(deepcopy=False)[number], self.space)

    def draw(self, searcher: str, seed: int) -> int:
        """Draw the next trial from the space and return its number; keyed by (seed, number), as after a resume too."""
        number = len(self.study.get_trials(deepcopy=False))
        key = seed_of(seed, number) % 2**32
        sampler: BaseSampler = RandomSampler(key)
        if searcher == "tpe":
            sampler = TPESampler(seed=key, constant_liar=True)
        fixed = combinations(self.space)
        if combination := fixed[number % len(fixed)]:
            places = {d.field: d.values for d in self.space}
            labels = {d.field: d.distribution for d in self.space}
            choices = {f: getattr(labels[f], "choices")[places[f].index(v)] for f, v in combination.items()}  # noqa: B009
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                sampler = PartialFixedSampler(choices, sampler)
        self.study.sampler = sampler
        return self.study.ask({d.field: d.distribution for d in self.space}).number

    def note(self, number: int, evaluation: TrialEvaluation, fields: dict[str, Any], stopped: bool) -> None:
        """Write down an evaluation, and the fields that population-based training has given the trial since."""
        trial = self._trial(number)
        if fields != self.entry(number).fields:
            trial.set_user_attr("fields", fields)
        if stopped:
            trial.set_user_attr("stopped", True)
        score = evaluation.metrics.get(self.metric, math.nan)
        if math.isfinite(score) and evaluation.step not in self._frozen(number).intermediate_values:
            trial.report(score, evaluation.step)
        row = {key: value for key, value in vars(evaluation).items() if key != "step"}
        trial.set_user_attr(f"{EVALUATION}{evaluation.step:08d}", row)

    def keep(self, number: int, checkpoint: str) -> None:
        """Write down where the trial's newest checkpoint is."""
        self._trial(number).set_user_attr("checkpoint", checkpoint)

    def finish(self, number: int, early: bool = False) -> None:
        """The trial has come to its end, or was stopped early; without a finite score it has failed."""
        score = self.entry(number).score(self.metric)
        if score is None or not math.isfinite(score):
            self.fail(number, f"{self.metric} is {score} at the last evaluation")
        elif early:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, score)

    def fail(self, number: int, why: str) -> None:
        """The trial has failed for good."""
        self._trial(number).set_user_attr("error", why)
        self.study.tell(number, state=TrialState.FAIL)

    def best(self, count: int) -> list[Entry]:
        """The best finished trials, the best first; of equal ones the earlier first."""
        finished = [entry for entry in self.entries() if entry.state == "finished"]
        sign = -1 if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        return sorted(finished, key=lambda entry: sign * (entry.score(self.metric) or 0.0))[:count]

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _trial(self, number: int) -> Trial:
        return Trial(self.study, self._frozen(number)._trial_id)


def _entry(trial: FrozenTrial, space: list[Dimension]) -> Entry:
    attributes = trial.user_attrs
    evaluations = [
        _evaluation(int(key.removeprefix(EVALUATION)), **row)
        for key, row in sorted(attributes.items())
        if key.startswith(EVALUATION)
    ]
    fields = attributes.get("fields", decode(space, trial.params))
    return Entry(
        trial.number, STATES[trial.state], fields, evaluations, attributes.get("checkpoint"),
        bool(attributes.get("stopped")), attributes.get("error"), "fields" in attributes,
    )  # fmt: skip


def _evaluation(step: int, places: Iterable[Iterable[str]] = (), **row: Any) -> TrialEvaluation:
    return TrialEvaluation(step, places=tuple(Place(*place) for place in places), **row)


def _drop_half_line(path: Path) -> None:
    """What a killed process had begun to write is cut off, so that the next line does not join it."""
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])
