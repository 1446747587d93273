"""What a sweep knows without Ray running: its record, its pages and commands, and what folders it takes."""

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
from matplotlib.figure import Figure
from optuna.trial import TrialState
from rich.console import Console

from finetune.classification.config import ClassificationConfig
from finetune.sweep import main
from finetune.sweeping import trial, tuning
from finetune.sweeping.config import RayConfig, ResourceConfig, SchedulerConfig, SweepConfig
from finetune.sweeping.driver import absolute_paths, check_storage, open_folder, resolve
from finetune.sweeping.ledger import Ledger, TrialEvaluation
from finetune.sweeping.progress import table
from finetune.sweeping.report import command, draw_best_so_far, draw_curves, importances, write_results
from finetune.sweeping.space import combinations, read_space
from finetune.sweeping.tuning import build_scheduler, replay
from tests.launch.real import ROOT
from vim_backbone.errors import UserError

TYPES = {"lr": "a number", "size": "a whole number or null", "mode": "text", "betas": "[a number, a number]"}


@pytest.fixture
def ledger(tmp_path):
    record = Ledger(tmp_path, "max", "top1", read_space({"lr": {"uniform": [0, 1]}}, TYPES))
    yield record
    record.close()


def evaluated(ledger, number, step, score, stopped=False, total=4):
    evaluation = TrialEvaluation(step, 100 * step / total, {"top1": score}, 1.0)
    ledger.note(number, evaluation, ledger.entry(number).fields, stopped)
    ledger.keep(number, f"checkpoint-{step}")


def again(ledger):
    """The ledger as another process finds it."""
    ledger.close()
    ledger.close = lambda: None
    return Ledger(ledger.path.parent, "max", "top1", ledger.space)


def test_the_record_outlives_the_process(ledger):
    for number in range(4):
        ledger.draw("random", 0)
        evaluated(ledger, number, 1, 0.1 * number)
    evaluated(ledger, 0, 4, 0.7)  # killed before it was called finished
    evaluated(ledger, 1, 2, 0.2, stopped=True)  # and before it was called stopped
    ledger.fail(2, "no memory")
    with open(ledger.path, "a") as file:
        file.write('{"op_code": 5, "work')  # half a line
    reopened = again(ledger)
    states = [entry.state for entry in reopened.entries()]
    assert states == ["finished", "stopped early", "failed", "running"]
    numbers = [e.checkpoint for e in reopened.entries()]
    assert numbers == ["checkpoint-4", "checkpoint-2", "checkpoint-1", "checkpoint-1"]
    assert reopened.entry(2).error == "no memory"
    assert [(e.step, e.metrics) for e in reopened.entry(0).evaluations] == [(1, {"top1": 0.0}), (4, {"top1": 0.7})]
    assert reopened.study.get_trials()[1].state == TrialState.PRUNED
    evaluated(reopened, 3, 4, 0.9)
    reopened.finish(3)
    assert [e.number for e in reopened.best(5)] == [3, 0]
    reopened.close()


@pytest.mark.parametrize("trials", [1, 3])
def test_trials_and_percents_are_whole_numbers(ledger, trials):
    for number in range(trials):
        evaluated(ledger, ledger.draw("random", 0), 3, 0.1 * number)
        evaluated(ledger, number, 4, 0.2 * number)
        ledger.finish(number)
    space = {"optim.base_lr": {"uniform": [0, 1]}}
    config = SweepConfig(task="classification", metric="top1", mode="max", space=space)
    best, curves = Figure().subplots(1, 2)
    draw_best_so_far(best, config, ledger)
    draw_curves(curves, config, ledger, ledger.entries())
    for axes in (best, curves):
        ticks = axes.get_xticks()
        assert len(ticks)
        assert (ticks % 1 == 0).all(), ticks


def test_nothing_in_the_record_is_a_pickle(ledger):
    evaluated(ledger, ledger.draw("tpe", 0), 4, 0.5)
    for line in ledger.path.read_bytes().splitlines():
        json.loads(line)


def test_one_process_at_a_time(ledger):
    with pytest.raises(UserError, match="is in use by process"):
        Ledger(ledger.path.parent, "max", "top1", ledger.space)


def test_a_score_that_is_no_number_is_a_failure(ledger):
    for score in (math.nan, math.inf):
        number = ledger.draw("random", 0)
        evaluated(ledger, number, 4, score)
        ledger.finish(number)
        assert ledger.entry(number).state == "failed"
        assert str(score) in (ledger.entry(number).error or "")
    assert ledger.best(1) == []


def test_a_resumed_scheduler_decides_as_before(ledger):
    """ASHA at rung 50: after 0.9 and 0.8 are over, 0.1 stops; without the memory of them it would go on."""
    config = sweep_config(scheduler=SchedulerConfig(kind="asha", grace=50, reduction=2))
    for number, score in enumerate((0.9, 0.8)):
        ledger.draw("random", 0)
        evaluated(ledger, number, 2, score)
        evaluated(ledger, number, 4, score)
        ledger.finish(number)
    new = type("Trial", (), {"trial_id": "new"})()
    for replayed, decision in ((True, "STOP"), (False, "CONTINUE")):
        scheduler = build_scheduler(config, ledger.space)
        if replayed:
            replay(scheduler, ledger)
        scheduler.on_trial_add(None, new)
        assert scheduler.on_trial_result(None, new, {"percent": 50, "top1": 0.1}) == decision


def test_the_table_shows_what_runs_and_the_best(ledger):
    for score in (0.25, 0.75):
        number = ledger.draw("random", 0)
        evaluated(ledger, number, 4, score)
        ledger.finish(number)
    evaluated(ledger, ledger.draw("random", 0), 1, 0.5)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(ledger, "top1", 5))
    title, *rest = [line for line in console.export_text().splitlines() if "trial" in line or "│" in line]
    assert "2 of 5 trials are over; best top1 0.7500" in title
    cells = [[cell.strip() for cell in line.split("│")[1:5]] for line in rest if "│" in line]
    assert cells == [["2", "running", "25 %", "0.5000"], ["1", "finished", "100 %", "0.7500"],
                     ["0", "finished", "100 %", "0.2500"]]  # fmt: skip


def test_importance_finds_the_field_that_matters(tmp_path):
    spec = {"lr": {"uniform": [0, 1]}, "size": {"uniform": [1, 100]}}
    ledger = Ledger(tmp_path, "max", "top1", read_space(spec, TYPES))
    assert importances(ledger) is None
    for number in range(40):
        ledger.draw("random", 0)
        evaluated(ledger, number, 4, ledger.entry(number).fields["lr"] ** 2)
        ledger.finish(number)
    shares = importances(ledger)
    assert shares["lr"] > 3 * shares["size"]
    ledger.close()


def test_results_csv(ledger, tmp_path):
    evaluated(ledger, ledger.draw("random", 0), 4, 0.5)
    ledger.finish(0)
    ledger.draw("random", 0)
    ledger.fail(1, "no, memory")
    write_results(tmp_path / "results.csv", ledger.entries(), ledger)
    import csv

    first, second = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert (first["state"], float(first["top1"]), first["percent"]) == ("finished", 0.5, "100.0")
    assert float(first["lr"]) == ledger.entry(0).fields["lr"]
    assert (second["state"], second["top1"], second["error"]) == ("failed", "", "no, memory")


def test_the_command_of_a_trial_is_read_back_exactly(ledger):
    import shlex

    from finetune.classification.config import ClassificationConfig
    from launch.run.cli import parse

    entry = replace(
        ledger.entry(ledger.draw("random", 0)), fields={"optim.base_lr": 1e-5 / 3, "model.img_size": [32, 48]}
    )
    spec = {"backbone": "a folder/b", "data.source": "c", "augment.auto_augment": None}
    words = shlex.split(command(sweep_config(fields=spec), entry))
    assert words[:5] == ["OMP_NUM_THREADS=1", "python", "-m", "launch", "finetune/main.py"]
    config = parse(ClassificationConfig, words[6:], "", "")
    assert (config.optim.base_lr, tuple(config.model.img_size)) == (1e-5 / 3, (32, 48))
    assert (config.backbone, config.augment.auto_augment) == ("a folder/b", None)


SPACE = {"optim.base_lr": {"loguniform": [1e-4, 1e-2]}}


def sweep_config(**spec):
    return SweepConfig(**{"task": "classification", "metric": "top1", "space": SPACE, "trials": 2} | spec)


def both(**spec):
    """What a sweep's config refuses, and what is refused when it is looked into."""
    return resolve(sweep_config(**spec))


FIELDS = {"backbone": "OWNER/NAME", "data.source": "hf:NAME"}


class NoTuner:
    """In the place of Ray's: keeps what it is asked for."""

    asked: ClassVar[list] = []

    def __init__(self, trainable, tune_config, run_config):
        self.asked.append(tune_config.max_concurrent_trials)

    def fit(self):
        pass


@pytest.mark.parametrize(
    ("spec", "at_a_time"), [({}, 3), ({"concurrent": 2}, 2), ({"ray": RayConfig(autoscaling=True)}, None)]
)
def test_ray_is_told_how_many_trials_run_at_a_time(spec, at_a_time, ledger, monkeypatch):
    """Else it starts one worker after the other."""
    monkeypatch.setattr(tuning, "slots", lambda resources: 3)
    monkeypatch.setattr(tuning.tune, "Tuner", NoTuner)
    tuning.tune_trials(sweep_config(**spec), ledger, "", {}, str(ledger.path.parent), None)
    assert NoTuner.asked[-1] == at_a_time


def test_what_can_work_is_not_refused():
    config, space, base = both(fields=FIELDS)
    assert [d.field for d in space] == ["optim.base_lr"]
    config, space, _ = both(fields=FIELDS, searcher="grid", trials=None, space={"batch_size": {"choice": [2, 4, 8]}})
    assert config.trials == len(combinations(space)) == 3
    assert base == ""


def test_paths_of_trials_are_absolute_patterns_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    here = ["data", "hf:data", "data/{split}*.parquet", "data/x[12].parquet"]
    config = sweep_config(space={"data.source": {"choice": [*here, "hf:nowhere", "gone/*.parquet", "s3://data"]}})
    space = read_space(config.space, {"data.source": "text"})
    assert absolute_paths(config, space) == {
        "data": f"{tmp_path}/data", "hf:data": f"hf:{tmp_path}/data",
        "data/{split}*.parquet": f"{tmp_path}/data/{{split}}*.parquet",
        "data/x[12].parquet": f"{tmp_path}/data/x[12].parquet",
    }  # fmt: skip


def test_resources_that_no_trial_can_have():
    for spec, line in (
        ({"cpus": 0}, "must take a CPU or a GPU"),
        ({"gpus": 2}, "a process uses one GPU: raise resources.workers"),
        ({"gpus": 0.5, "workers": 2}, "processes of one trial cannot share a GPU"),
    ):
        with pytest.raises(UserError, match=line):
            ResourceConfig(**spec)
    ResourceConfig(gpus=0.5)
    ResourceConfig(gpus=1, workers=2)


def test_a_folder_is_not_overwritten_or_mixed_up(tmp_path):
    config = sweep_config(out=str(tmp_path), fields=FIELDS)
    with pytest.raises(UserError, match="nothing to resume"):
        open_folder(replace(config, resume=True))
    open_folder(config)
    (config.folder / "study.jsonl").touch()
    with pytest.raises(UserError, match="holds a sweep already"):
        open_folder(config)
    with pytest.raises(UserError, match="was begun with seed = 0, not 1"):
        open_folder(replace(config, resume=True, seed=1))
    open_folder(replace(config, resume=True, trials=5))
    (config.folder / "study.jsonl").unlink()
    with pytest.raises(UserError, match="it is not deleted"):
        open_folder(replace(config, overwrite=True))


def test_storage_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"storage .*file/x cannot be written"):
        check_storage(str(tmp_path / "file/x"))
    with pytest.raises(UserError, match="storage nosuch://bucket cannot be written"):
        check_storage("nosuch://bucket")
    assert check_storage(f"file://{tmp_path}/there") == f"file://{tmp_path}/there"


def test_help_teaches_and_the_command_refuses_in_one_line(capsys):
    main(["--help"])
    assert "SWEEP.yaml" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, str(ROOT / "finetune/sweep.py"), "no.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no.yaml" in done.stderr


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_the_shipped_sweeps_read(task, monkeypatch, tmp_path, backbone):
    """Every field of their spaces exists and every value is one that the task takes."""
    from launch.run.cli import parse

    monkeypatch.chdir(tmp_path)
    (tmp_path / "finetune").symlink_to(ROOT / "finetune")
    for folder in ("runs/pretrain", "runs/short", "sample"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sample" / task).mkdir()
    for run in ("pretrain", "short"):
        (tmp_path / f"runs/{run}/backbone").symlink_to(backbone)
    config = parse(SweepConfig, [f"--config=finetune/sweeps/{task}.yaml"], "", "")
    _, space, _ = resolve(config)
    names = {d.field for d in space}
    assert {"optim.base_lr", "optim.layer_decay", "model.drop_path_rate", "optim.weight_decay"} <= names
    assert {"model.img_size", "backbone"} <= names


class AnyTask:
    config_class = ClassificationConfig

    def __init__(self, config):
        self.config = config


@pytest.mark.parametrize(
    ("cpus", "asked", "workers"), [(1, {}, 1), (0.5, {}, 1), (2, {}, 2), (14, {}, 13), (2, {"data.workers": 9}, 9)]
)
def test_a_trial_reads_with_the_cpus_that_ray_gives_it(tmp_path, monkeypatch, cpus, asked, workers):
    started = []
    monkeypatch.setattr(trial, "TASKS", {"any": AnyTask})
    monkeypatch.setattr(trial, "finetune", lambda task, observe: started.append(task.config))
    spec = {
        "task": "any", "base": "", "common": {"backbone": "b", "data.source": "d"}, "paths": {}, "storage": "",
        "start": None, "resources": {"cpus": cpus, "gpus": 0, "workers": 1}, "fields": asked,
    }  # fmt: skip
    trial._run(spec, None, tmp_path, lambda metrics, folder: pytest.fail(str(metrics)))
    assert started[0].data.workers == workers
