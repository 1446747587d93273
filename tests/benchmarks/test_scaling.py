"""benchmarks.scaling at the size of a toy: a row for each strategy, its arithmetic and its files."""

import csv
import json
import sys

import pytest
import torch
import yaml

from benchmarks import scaling
from launch.planning.memory import shares
from launch.run.cli import parse
from pretrain.config import PretrainConfig
from pretrain.plan import planned_footprints
from tests.launch.real import CONFIGS, ROOT

pytestmark = pytest.mark.slow
SMALL = ["--model.name=vim_tiny", "--model.depth=2", "--model.img_size=32", "--decoder.width=32", "--decoder.depth=1",
         "--data.workers=0", "--optim.warmup_steps=1"]  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the benchmark with these options; what it printed, and the rows of its CSV."""
    for name in ("ACCELERATE_USE_CPU", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def main(*argv, settings=SMALL):
        monkeypatch.setattr(sys, "argv", ["scaling", "--batch-size=4", "--out", str(tmp_path), *argv, "--", *settings])
        scaling.main()
        table = tmp_path / "scaling.csv"
        return capsys.readouterr().out, list(csv.DictReader(table.open())) if table.exists() else []

    return main


def test_rows_for_one_and_two_processes(run, tmp_path):
    """DDP alone has a row of one process; efficiency is that of doing twice the work in the same time."""
    argv = ["--processes", "1", "2", "--strategies", "ddp", "zero2", "--steps=9", "--checkpoints", "2", "--profile"]
    printed, rows = run(*argv, settings=[*SMALL, "--checkpoint_every=4", "--async_checkpoints=false"])
    assert [(row["strategy"], row["processes"]) for row in rows] == [("ddp", "1"), ("ddp", "2"), ("zero2", "2")]
    settings = parse(PretrainConfig, SMALL, "", "")
    config = settings.architecture()
    objective = settings.method
    work = objective.work(config, 4, settings.model.level)
    model = planned_footprints(config, objective, [work], torch.float32, "cpu")[0]
    for row in rows:
        seconds, count = float(row["seconds"]), int(row["processes"])
        assert float(row["pictures"]) == pytest.approx(4 * count / seconds)
        assert float(row["efficiency"]) == pytest.approx(float(rows[0]["seconds"]) / seconds)
        assert float(row["relative"]) == pytest.approx(seconds / float(rows[0]["seconds"]))
        assert float(row["longest"]) >= seconds
        assert float(row["held"]) == pytest.approx(float(row["theory"]), rel=0.1)
        assert float(row["peak"]) >= float(row["held"])
        assert 0 <= float(row["waiting"]) <= 1
        share = next(each for each in shares(model, count) if each.strategy == row["strategy"])
        assert float(row["sent"]) == pytest.approx(share.sent / 1e6)
    assert float(rows[0]["sent"]) == 0
    assert "checkpoint: " in printed.splitlines()[-1]
    assert (tmp_path / "profile-zero2-2.txt").read_text().startswith("3 steps\n")


def test_a_strategy_that_fails_is_said_and_passed_over(run):
    printed, rows = run("--processes", "1", "--steps=9", settings=[*SMALL, "--accumulation=3"])
    assert "ddp on 1 failed: " in printed
    assert rows == []


def test_more_settings_of_deepspeed_stand_in_a_file_beside(tmp_path):
    changed = scaling.with_settings(CONFIGS / "zero2.yaml", {"overlap_comm": True}, tmp_path)
    content = yaml.safe_load(changed.read_text())
    more = json.loads((tmp_path / "zero2.json").read_text())
    assert more["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert content["deepspeed_config"]["deepspeed_config_file"] == str(tmp_path / "zero2.json")
    assert content["distributed_type"] == "DEEPSPEED"


def test_profiles_need_a_folder(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", "--profile"])
    with pytest.raises(SystemExit):
        scaling.parse_options()
    assert "--profile writes into --out" in capsys.readouterr().err
