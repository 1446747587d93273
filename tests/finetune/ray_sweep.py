"""Starts real sweeps for the tests: a cluster of several raylets on this machine, and drivers that are killed."""

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from accelerate.state import AcceleratorState

from finetune.classification.config import ClassificationConfig
from finetune.classification.task import ClassificationTask
from finetune.sweeping.config import SweepConfig
from finetune.sweeping.driver import resolve
from finetune.sweeping.ledger import Entry, Ledger
from finetune.sweeping.trial import arguments
from finetune.train import finetune
from launch.run.cli import parse
from tests.launch.preloaded import Popen
from tests.launch.real import ROOT, finish

SMALL = {"batch_size": 4, "data.workers": 0, "pictures": 1, "log_every": 1}
TASK_FIELDS = {
    "classification": {"augment.auto_augment": None, "augment.mixup": 0, "augment.cutmix": 0},
    "detection": {"head.channels": 16, "head.box_width": 16, "head.proposals": 10, "head.samples": 8,
                  "model.img_size": 32},
    "segmentation": {"head.channels": 8, "head.auxiliary_channels": 8},
}  # fmt: skip


@contextmanager
def cluster(nodes: int = 2):
    """Raylets of one CPU each; gives the cluster and its address."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    instance = Cluster(initialize_head=True, head_node_args=options)
    try:
        for _ in range(nodes - 1):
            instance.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        instance.wait_for_nodes()
        yield instance
    finally:
        instance.shutdown()


def config_of(where: Path, task: str, backbone: Path, source: Path, **more) -> SweepConfig:
    """A small sweep in the folder `where`."""
    fields = SMALL | TASK_FIELDS[task] | {"backbone": str(backbone), "data.source": str(source)}
    fields = {name: value for name, value in (fields | more.pop("fields", {})).items() if name not in more["space"]}
    base = {"task": task, "out": str(where / "runs"), "fields": fields, "retries": 2}
    path = where / "sweep.yaml"
    where.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(base | more))
    return parse(SweepConfig, [f"--config={path}"], "", "")


def driver(config: SweepConfig, *argv: str) -> Popen:
    """`finetune/sweep.py` as a user starts it, with a Ray of its own."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")} | {"OMP_NUM_THREADS": "1"}
    file = Path(config.out).parent / "sweep.yaml"
    return Popen([sys.executable, str(ROOT / "finetune/sweep.py"), str(file), *argv], file.parent, env)


def finished(process: Popen) -> str:
    code, printed = finish(process)
    assert code == 0, printed[-4000:]
    return printed


def outside(config: SweepConfig, fields: dict[str, Any], where: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and metrics of each evaluation of the same run without Ray, in this process."""
    scores = []
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = arguments(config.fields | fields | {"out": str(where), "name": "alone", "trackers": []})
    finetune(
        ClassificationTask(parse(ClassificationConfig, argv, "", "")), lambda e: scores.append((e.step, e.metrics))
    )
    return scores


def entries(config: SweepConfig) -> list[Entry]:
    """What the record says, read as another process would."""
    ledger = Ledger(config.folder, config.mode, config.metric, resolve(config)[1])
    try:
        return ledger.entries()
    finally:
        ledger.close()


def rows(config: SweepConfig) -> list[dict]:
    """Lines of the record, while the driver may be writing it."""
    path = config.folder / "study.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def checkpoints(config: SweepConfig) -> list[tuple[int, str]]:
    """(trial's id, checkpoint) of each checkpoint in the record."""
    pairs = [(row["trial_id"], row["user_attr"]) for row in rows(config) if "trial_id" in row and "user_attr" in row]
    return [(trial, attr["checkpoint"]) for trial, attr in pairs if "checkpoint" in attr]


def repeated(config: SweepConfig) -> int:
    """Evaluations that the record has had more than once: what was lost between them and their checkpoint."""
    pairs = [(row["trial_id"], name) for row in rows(config) if "trial_id" in row for name in row.get("user_attr", ())]
    evaluations = [pair for pair in pairs if pair[1].startswith("evaluation-")]
    return len(evaluations) - len(set(evaluations))


@contextmanager
def meanwhile(work: Callable[[], None]):
    """Does `work` in another thread, and passes on what it raises."""
    wrong = []

    def run():
        try:
            work()
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join()
    if wrong:
        raise wrong[0]


def trial_workers(root: int | None = None) -> list[psutil.Process]:
    """Processes in which trials run, below process `root`."""
    below = psutil.Process(root or os.getpid()).children(recursive=True)
    return [p for p in below if p.is_running() and "ImplicitFunc" in " ".join(cmdline(p))]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def steps_of(entry: Entry) -> list[int]:
    return [e.step for e in entry.evaluations]
