"""One trial, in a worker of Ray: the run of finetune/main.py, which reports each evaluation to Ray Tune."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import ray.train
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from filelock import FileLock
from ray import tune
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from finetune.registry import TASKS
from finetune.sweeping.places import places
from finetune.train import Evaluation, finetune
from launch.data.loading import workers_for
from launch.run.cli import parse
from vim_backbone.errors import UserError

Reporter = Callable[[dict[str, Any], Path | None], None]
"""Called with metrics and the folder to keep."""
SET_BY_SWEEP = ["--name=run", "--resume=auto", "--checkpoint_every=1000000000", "--keep_checkpoints=1"]
"""Fields of a trial that are the sweep's matter; the run's folder lies in a scratch folder of the node."""


def arguments(fields: dict[str, Any]) -> list[str]:
    """Dotted field -> value, as arguments of finetune/main.py."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in fields.items()]


class SweepSpec(TypedDict):
    """What is the same for all trials of a sweep, as plain data that Ray sends to a worker."""

    task: str
    base: str
    """Text of the YAML file that each trial starts from."""
    common: dict[str, Any]
    """Dotted field -> value."""
    paths: dict[str, str]
    """Folder as the sweep names it -> absolute."""
    resources: dict[str, Any]
    """Of one trial: cpus, gpus, workers."""
    storage: str
    """Path or URL of the checkpoints."""


class TrialSpec(SweepSpec):
    """What a worker needs to know of one trial."""

    fields: dict[str, Any]
    """Dotted field -> value, of this trial alone."""
    start: str | None
    """Path or URL of the checkpoint to go on from."""


def run_trial(spec: TrialSpec) -> None:
    """A trial of one process, to be called by Ray Tune in the trial's folder."""

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(str(folder)) if folder else None)

    _run(spec, tune.get_checkpoint(), Path.cwd(), report)


def run_trial_on_workers(spec: TrialSpec) -> None:
    """A trial of several processes: Ray Train starts them, and passes their reports to Ray Tune."""
    context = tune.get_context()
    resources = spec["resources"]
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={**spec, "scratch": f"vim-sweep-{context.get_trial_id()}"},
        torch_config=TorchConfig(backend="nccl" if resources["gpus"] else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources["workers"],
            use_gpu=resources["gpus"] > 0,
            resources_per_worker={"CPU": resources["cpus"]} | ({"GPU": resources["gpus"]} if resources["gpus"] else {}),
        ),
        run_config=ray.train.RunConfig(
            name=f"{context.get_trial_id()}-workers",
            storage_path=spec["storage"],
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()


def _run_worker(spec: Any) -> None:
    os.environ.setdefault("ACCELERATE_USE_CPU", "false" if spec["resources"]["gpus"] else "true")
    rank = ray.train.get_context().get_world_rank()

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        checkpoint = ray.train.Checkpoint.from_directory(str(folder)) if folder and rank == 0 else None
        ray.train.report(metrics, checkpoint=checkpoint)

    # the same path for all processes of a node, because each reads the checkpoint
    work = Path(tempfile.gettempdir()) / spec["scratch"]
    _run(spec, ray.train.get_checkpoint(), work, report)


def _run(spec: TrialSpec, checkpoint: Any, work: Path, report: Reporter) -> None:
    """Build the config as finetune/main.py does, and run it."""
    task = TASKS[spec["task"]]
    if checkpoint is None and spec["start"]:
        checkpoint = tune.Checkpoint(spec["start"])
    if os.environ.get("LOCAL_RANK", "0") == "0":
        shutil.rmtree(work / "run", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        (work / "base.yaml").write_text(spec["base"], encoding="utf-8")
        if checkpoint is not None:
            checkpoint.to_directory(str(work / "run"))
    if dist.is_initialized():
        dist.barrier()
    # a worker that is used again has the last trial's
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    began, started, waited = time.time(), time.monotonic(), 0.0

    def observe(evaluation: Evaluation) -> None:
        nonlocal waited
        percent = 100 * evaluation.step / evaluation.total_steps if evaluation.total_steps else 100.0
        seconds = time.monotonic() - started - waited
        progress = {
            "step": evaluation.step, "percent": percent, "seconds": seconds, "metrics": evaluation.metrics,
            "began": began, "ended": time.time(), "places": places(),
        }  # fmt: skip
        before = time.monotonic()
        report(evaluation.metrics | progress, work / "run")
        waited += time.monotonic() - before

    try:
        paths, settings = spec["paths"], spec["common"] | spec["fields"]
        fields = {name: fetch(paths.get(v, v) if isinstance(v, str) else v) for name, v in settings.items()}
        base = [f"--config={work / 'base.yaml'}"] if spec["base"] else []
        argv = [*base, "--trackers=[]", *arguments(fields), *SET_BY_SWEEP, f"--out={work}"]
        config = parse(task.config_class, argv, "trial", "")
        if config.data.workers is None:  # Ray limits nobody to the CPUs that it counts
            config = replace(config, data=replace(config.data, workers=workers_for(spec["resources"]["cpus"])))
        finetune(task(config), observe)
    except UserError as error:  # would fail again: reported, and not tried again
        report({"failed": str(error), "metrics": {}}, None)


def fetch(value: Any) -> Any:
    """A value of a config; a URL of data or of a backbone is copied to this node first, once, and gives the copy."""
    if not isinstance(value, str) or "://" not in value:
        return value
    folder = Path(tempfile.gettempdir()) / "vim-sweep-data" / hashlib.sha256(value.encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            aside = folder.with_suffix(".partial")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                tune.Checkpoint(value).to_directory(str(aside))
            except Exception as error:  # each file system raises its own classes
                raise UserError(f"{value} cannot be read: {' '.join(str(error).split())[:200]}") from error
            aside.rename(folder)
    return str(folder)
