"""The sweep itself: Ray Tune runs the trials that the ledger draws, and the ledger notes what comes of them."""

# ruff: noqa: ARG002 - Ray's signatures

import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from finetune.sweeping.cluster import slots
from finetune.sweeping.config import SweepConfig
from finetune.sweeping.ledger import Ledger, TrialEvaluation
from finetune.sweeping.progress import Progress
from finetune.sweeping.space import Dimension
from finetune.sweeping.trial import SweepSpec, run_trial, run_trial_on_workers
from finetune.train import FIXED_ON_RESUME
from vim_backbone.errors import UserError
from vim_backbone.files import write_text

TIME = "percent"


@dataclass(eq=False)
class PastTrial:
    """What the schedulers look at in a trial that is over."""

    trial_id: str
    status: str = "TERMINATED"


class Population(PopulationBasedTraining):
    """Population-based training of the ledger's trials."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Ray refuses searchers here, because they learn nothing of fields that change; the ledger does."""
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)  # pyright: ignore[reportArgumentType]


class LedgerSearcher(Searcher):
    """Hands out the trials that are to go on, then new ones, until there are enough."""

    def __init__(self, ledger: Ledger, config: SweepConfig, trials: int, spec: SweepSpec) -> None:
        super().__init__(metric=config.metric, mode=config.mode)
        self.ledger = ledger
        self.config = config
        self.trials = trials
        self.spec = spec
        self.numbers: dict[str, int] = {}
        """Ray's id of a trial -> its number in the ledger."""
        self.unfinished = [e.number for e in ledger.entries() if e.state in ("waiting", "running")]

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Nothing: the ledger has them."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The trial's `TrialSpec`."""
        if self.unfinished:
            number = self.unfinished.pop(0)
        elif len(self.ledger.entries()) < self.trials:
            number = self.ledger.draw(self.config.searcher, self.config.seed)
        else:
            return Searcher.FINISHED
        self.numbers[trial_id] = number
        entry = self.ledger.entry(number)
        return {**self.spec, "fields": entry.fields, "start": entry.checkpoint}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the recorder notes it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is what a resumed sweep goes by."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Never called."""
        raise NotImplementedError


class Recorder(tune.Callback):
    """Writes down what Ray Tune reports, at once, and shows it."""

    def __init__(self, ledger: Ledger, numbers: dict[str, int], progress: Progress) -> None:
        self.ledger = ledger
        self.numbers = numbers
        self.progress = progress
        self.checkpoints: dict[int, Any] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluation, or why the trial cannot run."""
        number = self.numbers[trial.trial_id]
        if result.get("failed"):
            return
        evaluation = TrialEvaluation(**{f.name: result[f.name] for f in fields(TrialEvaluation)})
        self.ledger.note(number, evaluation, trial.config["fields"], stopped=bool(result.get("done")))
        if "checkpoint_path" in result:  # Ray Train has stored it
            self.ledger.keep(number, result["checkpoint_path"])
        self.progress.show(self.ledger)

    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any) -> None:
        """The trial's state up to its last evaluation is in the storage."""
        number = self.numbers[trial.trial_id]
        before = self.ledger.entry(number).checkpoint
        self.ledger.keep(number, location(checkpoint))
        if before and number not in self.checkpoints:  # of a process before this one; Ray does not know of it
            discard(before)
        self.checkpoints[number] = checkpoint

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial came to its end, was stopped by the scheduler, or cannot run; at a time limit nothing of these."""
        number, last = self.numbers[trial.trial_id], trial.last_result or {}
        if last.get("failed"):
            self.ledger.fail(number, last["failed"])
        elif last.get(TIME, 0) >= 100:
            self.ledger.finish(number)
        elif last.get("done"):
            self.ledger.finish(number, early=True)
        self.progress.show(self.ledger)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial died once too often."""
        number = self.numbers[trial.trial_id]
        self.ledger.fail(number, why_it_died(trial, self.ledger.path.parent / f"error-{number:05d}.txt"))
        self.progress.show(self.ledger)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Move the clock of the table."""
        self.progress.tick()


def tune_trials(
    config: SweepConfig, ledger: Ledger, base: str, paths: dict[str, str], storage: str, progress: Progress
) -> None:
    """Run trials until there are as many as asked for, or the time is up.

    Args:
        config: the sweep.
        ledger: where they come from and what becomes of them.
        base: text of the YAML file that each starts from.
        paths: folder as the sweep names it -> absolute.
        storage: path or URL of the checkpoints.
        progress: the table.
    """
    resources = config.resources
    spec = SweepSpec(
        task=config.task, base=base, common=config.fields, paths=paths, resources=asdict(resources), storage=storage
    )
    session = f"session-{len(ledger.study.user_attrs.get('sessions', []))}"
    ledger.study.set_user_attr("sessions", [*ledger.study.user_attrs.get("sessions", []), session])
    trials = config.trials or 0
    searcher = LedgerSearcher(ledger, config, trials, spec)
    remaining = trials - sum(e.state not in ("waiting", "running") for e in ledger.entries())
    scheduler = build_scheduler(config, ledger.space)
    replay(scheduler, ledger)
    several = resources.workers > 1
    # a trial of several processes only waits for them, which takes no core, but Ray wants something to be taken
    alone: dict[str, float] = {"cpu": resources.cpus, "gpu": resources.gpus}
    bundle: dict[str, float] = {"memory": 2**20} if several else alone
    # not told how many, Ray (2.60) starts one worker after the other, and drops one that starts for one that is free
    at_a_time = config.concurrent or (None if config.ray.autoscaling and not several else slots(resources))
    tuner = tune.Tuner(
        tune.with_resources(run_trial_on_workers if several else run_trial, bundle),
        tune_config=tune.TuneConfig(
            search_alg=searcher, scheduler=scheduler, num_samples=remaining,
            max_concurrent_trials=at_a_time, reuse_actors=not several,
            time_budget_s=config.hours * 3600 if config.hours else None,
            trial_dirname_creator=lambda trial: f"{searcher.numbers[trial.trial_id]:05d}",
        ),
        run_config=tune.RunConfig(
            name=session, storage_path=storage, verbose=0,
            failure_config=tune.FailureConfig(max_failures=config.retries),
            # donors of population-based training may be asked for a checkpoint that a later one has replaced
            checkpoint_config=tune.CheckpointConfig(num_to_keep=None if config.scheduler.kind == "pbt" else 1),
            callbacks=[Recorder(ledger, searcher.numbers, progress)],
        ),
    )  # fmt: skip
    tuner.fit()


def build_scheduler(config: SweepConfig, space: list[Dimension]) -> TrialScheduler:
    """The scheduler of Ray Tune. Raises UserError where population-based training has nothing to change."""
    rule = config.scheduler
    common: dict[str, Any] = {"time_attr": TIME, "metric": config.metric, "mode": config.mode}
    if rule.kind == "asha":
        rungs: dict[str, Any] = {"grace_period": rule.grace, "reduction_factor": rule.reduction}
        return ASHAScheduler(**common, max_t=100, **rungs)
    if rule.kind == "median":
        return MedianStoppingRule(**common, grace_period=rule.grace, min_samples_required=2)
    if rule.kind == "pbt":
        mutable = {d.field: d.mutations for d in space if not d.field.startswith(FIXED_ON_RESUME)}
        if not mutable:
            fixed = ", ".join(FIXED_ON_RESUME)
            raise UserError(f"scheduler.kind is 'pbt': no field of the space can change in a running trial ({fixed}*)")
        return Population(
            **common, perturbation_interval=rule.grace, hyperparam_mutations={"fields": mutable}, require_attrs=False
        )
    return FIFOScheduler()


def replay(scheduler: TrialScheduler, ledger: Ledger) -> None:
    """Report again to a scheduler what trials that are over had reached, so that it decides after a resume as before.

    Those that go on are left out, because they come back under another id: they take their place at the next rung.
    """
    if not isinstance(scheduler, (ASHAScheduler, MedianStoppingRule)):
        return
    # the two read nothing of it but the trials that run
    controller: Any = SimpleNamespace(get_trials=list, get_live_trials=set, trial_executor=None)
    over = [e for e in ledger.entries() if e.state in ("finished", "stopped early")]
    for entry in over:
        trial: Any = PastTrial(f"ledger-{entry.number}")
        scheduler.on_trial_add(controller, trial)
        for evaluation in entry.evaluations:
            scheduler.on_trial_result(controller, trial, evaluation.metrics | {TIME: evaluation.percent})


def location(checkpoint: Any) -> str:
    """A checkpoint of Ray as a path, or a URL where it is not in this machine's file system."""
    kind = checkpoint.filesystem.type_name
    return checkpoint.path if kind == "local" else f"{kind.removesuffix('fs')}://{checkpoint.path}"


def discard(where: str) -> None:
    """Delete a checkpoint that another has replaced."""
    old: Any = tune.Checkpoint(where)
    if old.filesystem.type_name == "local":
        shutil.rmtree(old.path, ignore_errors=True)
    else:
        old.filesystem.delete_dir(old.path)


def why_it_died(trial: Any, whole: Path) -> str:
    """A trial's error in one line; all of it goes into the file `whole`."""
    try:
        error = trial.get_error()
    except Exception:  # the file with it may be on a node that is gone
        error = None
    if error is None or isinstance(error, RayActorError):
        return "its process died: killed, out of memory, or its node was lost"
    write_text(whole, str(error))
    errors = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*", str(error), re.MULTILINE)
    return f"{(errors or str(error).strip().splitlines())[-1][:300]}; the whole error is in {whole}"
