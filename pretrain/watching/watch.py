"""The one thing that the training loop knows of watching: what to evaluate when, and what to say about it."""

import math
import time
from collections.abc import Mapping
from typing import Any

from launch.run.metrics import METRICS, RunLog, read_rows
from launch.run.training import Training
from pretrain.config import PretrainConfig
from pretrain.data import View
from pretrain.objective import Objective
from pretrain.stages import Stage
from pretrain.watching.evaluate import Evaluator
from pretrain.watching.sets import EvalSets
from pretrain.watching.trouble import EVALUATION, Troubles

PICTURES_FOR_ONE = 100
"""Pictures that are trained on for each one that an evaluation reads, where nothing says how often there is one."""


class Watch:
    """Evaluates a run at its intervals, and names its troubles."""

    def __init__(
        self,
        config: PretrainConfig,
        objective: Objective,
        sets: EvalSets,
        view: View,
        training: Training,
        log: RunLog,
    ) -> None:
        self.config = config
        self.sets = sets
        self.view = view
        self.training = training
        self.log = log
        self.every = interval(config, sets.pictures)
        """Steps between evaluations; 0 for none."""
        self.evaluator = Evaluator(config, objective, sets, training.accelerator, training.beat_of_evaluation)
        self.troubles = Troubles(config, training.total_steps)
        self._evaluated = time.perf_counter()
        self._long = False
        """Whether it was said that evaluations take long."""
        if training.state.step and log.active:
            for row in read_rows(config.folder / METRICS):  # what has been said is not said again
                self.troubles.after(row)

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        """A row of metrics was written."""
        bad = self.training.state.extra.get("guard", {}).get("bad", [])
        for line in self.troubles.after({"step": step, **row}, sum(step - each <= 100 for each in bad)):
            self.log.say(line)

    def due(self, step: int) -> bool:
        """Whether to evaluate after so many steps."""
        return bool(self.every) and (step % self.every == 0 or step == self.training.total_steps)

    def evaluate(self, stage: Stage) -> None:
        """Evaluate at the size of a stage; write a row, and say it. For all processes."""
        start, step, before = time.perf_counter(), self.training.state.step, self.evaluator.bad
        with self.training.evaluating() as model:
            measured = self.evaluator.measure(model, self.view.sized(stage.img_size), stage.plan.micro_batch)
        end = time.perf_counter()
        seconds, share = end - start, (end - start) / (end - self._evaluated)
        self._evaluated = end
        row = measured | {"eval_seconds": seconds} | (stage.metrics() if len(self.config.stages or ()) > 1 else {})
        self.log.metrics(step, row)
        values = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
        self.log.say(f"step {step}: {values}  (evaluated in {seconds:.1f} s)")
        if (bad := self.evaluator.bad) and bad.keys() != before.keys():
            name, why = next(iter(sorted(bad.items())))
            self.log.say(f"{len(bad)} pictures cannot be evaluated and are not counted, such as {name}: {why}")
        if share > EVALUATION and 0 < step < self.training.total_steps and not self._long:
            self._long = True
            help_ = f"raise eval.every (now {self.every}), or lower eval.pictures ({self.config.eval.pictures})"
            self.log.say(f"the evaluation took {share:.1%} of the time since the one before: {help_}")
        self.row(step, row)


def interval(config: PretrainConfig, pictures: int) -> int:
    """Steps between evaluations that read so many pictures; 0 for none."""
    if not pictures:
        return 0
    return config.eval.every or math.ceil(PICTURES_FOR_ONE * pictures / config.mean_batch_size)
