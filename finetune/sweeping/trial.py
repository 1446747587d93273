"""One trial, in a worker of Ray: the run of finetune/main.py, which tells Ray Tune of each evaluation."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from filelock import FileLock
from ray import tune
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from finetune.main import TASKS
from finetune.train import Evaluation
from launch.run.cli import parse
from vim_backbone.errors import UserError

Report = Callable[[dict[str, Any], Path | None], None]
"""Called with metrics and the folder to keep."""
CONTROLLED = ["--name=run", "--resume=auto", "--checkpoint_every=1000000000", "--keep_checkpoints=1"]
"""Fields of a trial that are the sweep's matter; the run's folder lies in a scratch folder of the node."""


def arguments(fields: dict[str, Any]) -> list[str]:
    """Dotted field -> value, as arguments of finetune/main.py."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in fields.items()]


def run_trial(told: dict[str, Any]) -> None:
    """A trial of one process, to be called by Ray Tune in the trial's folder.

    `told` has task, base (the text of the YAML file), common and fields (dotted field -> value, the same in all trials
    and this one's), paths (folder as the sweep names it -> absolute), and start (path or URL of the checkpoint to go on
    from, or None).
    """

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(str(folder)) if folder else None)

    _run(told, tune.get_checkpoint(), Path.cwd(), report)


def run_trial_on_workers(told: dict[str, Any]) -> None:
    """A trial of several processes: Ray Train starts them, and passes their reports to Ray Tune."""
    context = tune.get_context()
    each = told["resources"]
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config=told | {"scratch": f"vim-sweep-{context.get_trial_id()}"},
        torch_config=TorchConfig(backend="nccl" if each["gpus"] else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=each["workers"],
            use_gpu=each["gpus"] > 0,
            resources_per_worker={"CPU": each["cpus"]} | ({"GPU": each["gpus"]} if each["gpus"] else {}),
        ),
        run_config=ray.train.RunConfig(
            name=f"{context.get_trial_id()}-workers",
            storage_path=told["storage"],
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()


def _run_worker(told: dict[str, Any]) -> None:
    os.environ.setdefault("ACCELERATE_USE_CPU", "false" if told["resources"]["gpus"] else "true")
    rank = ray.train.get_context().get_world_rank()

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        kept = ray.train.Checkpoint.from_directory(str(folder)) if folder and rank == 0 else None
        ray.train.report(metrics, checkpoint=kept)

    # the same path for all processes of a node, because each reads the checkpoint
    work = Path(tempfile.gettempdir()) / told["scratch"]
    _run(told, ray.train.get_checkpoint(), work, report)


def _run(told: dict[str, Any], checkpoint: Any, work: Path, report: Report) -> None:
    """Build the config as finetune/main.py does, and run it."""
    config_class, start, _ = TASKS[told["task"]]
    if checkpoint is None and told["start"]:
        checkpoint = tune.Checkpoint(told["start"])
    if os.environ.get("LOCAL_RANK", "0") == "0":
        shutil.rmtree(work / "run", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        (work / "base.yaml").write_text(told["base"], encoding="utf-8")
        if checkpoint is not None:
            checkpoint.to_directory(str(work / "run"))
    if dist.is_initialized():
        dist.barrier()
    # a worker that is used again has the last trial's
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    began, waited = time.monotonic(), 0.0

    def observe(evaluation: Evaluation) -> None:
        nonlocal waited
        percent = 100 * evaluation.step / evaluation.total_steps if evaluation.total_steps else 100.0
        seconds = time.monotonic() - began - waited
        told_now = {"step": evaluation.step, "percent": percent, "seconds": seconds, "metrics": evaluation.metrics}
        before = time.monotonic()
        report(evaluation.metrics | told_now, work / "run")
        waited += time.monotonic() - before

    try:
        paths, named = told["paths"], told["common"] | told["fields"]
        fields = {name: fetched(paths.get(v, v) if isinstance(v, str) else v) for name, v in named.items()}
        base = [f"--config={work / 'base.yaml'}"] if told["base"] else []
        argv = [*base, "--trackers=[]", *arguments(fields), *CONTROLLED, f"--out={work}"]
        start(parse(config_class, argv, "trial", ""), observe)
    except UserError as error:  # would fail again: told, and not tried again
        report({"failed": str(error), "metrics": {}}, None)


def fetched(value: Any) -> Any:
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
