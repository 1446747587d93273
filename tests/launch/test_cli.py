"""The command line: overrides, files, and one line for everything a user gets wrong."""

import errno
import os
import subprocess
import sys

import pytest
import yaml

from finetune.registry import TASKS
from finetune.sweeping.config import SweepConfig
from launch.run.cli import parse, run
from launch.run.config import differences, field_types, write_config
from launch.run.hints import SYNONYMS, suggestion
from launch.run.signals import Stopped
from pretrain.config import PretrainConfig
from tests.launch.real import ROOT, environment
from vim_backbone import UserError

PATH = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"


def parsed(*argv):
    return parse(PretrainConfig, list(argv), "pretrain/main.py", "")


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: 7\nmodel: {name: vim_small, img_size: [64, 96]}\noptim: {base_lr: 2e-4}\n")
    config = parsed("--config", str(file), "--steps", "9", "--resume", "--data.flip=false")
    assert (config.steps, config.resume, config.data.flip) == (9, True, False)
    assert (config.model.name, config.model.img_size, config.optim.base_lr) == ("vim_small", (64, 96), 2e-4)
    assert config.mask.ratio == 0.75


def test_the_resolved_config_reads_back(tmp_path):
    config = parsed("--model.name=vim_small", "--optim.betas", "[0.8, 0.99]")
    write_config(config, tmp_path / "config.yaml")
    assert parsed("--config", str(tmp_path / "config.yaml")) == config
    assert differences(config, tmp_path / "config.yaml") == {}
    changed = parsed("--model.name=vim_base", "--optim.betas", "[0.8, 0.99]")
    assert differences(changed, tmp_path / "config.yaml") == {"model.name": ("vim_small", "vim_base")}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["optim"]["betas"] == [0.8, 0.99]


def test_a_field_that_an_older_version_did_not_write_has_its_default(tmp_path):
    config, path = parsed(), tmp_path / "config.yaml"
    write_config(config, path)
    saved = yaml.safe_load(path.read_text())
    del saved["model"]["channels"], saved["optim"]["betas"], saved["steps"]
    path.write_text(yaml.safe_dump(saved))
    assert differences(config, path) == {}
    changed = parsed("--model.channels=tokens", "--optim.betas", "[0.8, 0.99]")
    assert differences(changed, path) == {
        "model.channels": ("mixed", "tokens"),
        "optim.betas": ([0.9, 0.95], [0.8, 0.99]),
    }


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--modle.depth", "3"], "no such field: modle.depth; did you mean 'model.depth'"),
        (["--optim.base_lr", "high"], "optim.base_lr is high: it must be a number"),
        (["--steps", "5.5"], "steps is 5.5: it must be a whole number or null"),
        (["--mask.kind", "blok"], "mask.kind is blok: it must be one of random, block"),
        (["--mask.ratio", "1.0"], "mask.ratio is 1.0: it must lie between 0 and 1"),
        (["--model.img_size", "97"], "image height is 97 pixels: it must be a multiple of the stride 8"),
        (["--model.name", "vim_tny"], "unknown model 'vim_tny': did you mean 'vim_tiny'"),
        (["--steps", "3", "--epochs", "2"], "give steps or epochs, not both"),
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml: No such file"),
        (["--name", "a/b"], "name is 'a/b': it must be a plain folder name"),
        (["--batch_size", "0"], "batch_size is 0: it must be at least 1"),
        (["--ema_decay", "1"], "ema_decay is 1.0"),
        (["--seed", "-1"], "seed is -1: it cannot be negative"),
        (["--lr", "1e-3"], "no such field: lr; did you mean 'optim.base_lr'"),
        (["--learning_rate=1e-3"], "no such field: learning_rate; did you mean 'optim.base_lr'"),
        (["--learning-rate=1e-3"], "no such field: learning-rate; did you mean 'optim.base_lr'"),
        (["--output_dir", "x"], "no such field: output_dir; did you mean 'out'"),
        (["--gpus", "2"], "no such field: gpus; it is the launcher's: python -m launch --num_processes 2"),
        (["--num_workers", "2"], "did you mean 'data.workers'"),
        (["--img_size", "64"], "did you mean 'model.img_size'"),
        (["--mask_ratio", "0.5"], "did you mean 'mask.ratio'"),
        (["--model.lr", "0.5"], "no such field: model.lr"),
        (["--data.size", "native"], "no such field: data.size; did you mean 'data.sizes'"),
        (["--batch=8"], "no such field: batch; did you mean 'batch_size'"),
        (["--over"], "no such field: over; did you mean 'overwrite'"),
        (["--data", "photos"], "data is 'photos': it is a group of fields; did you mean 'data.source'"),
        (["--model", "vim_base"], "model is 'vim_base': it is a group of fields; did you mean 'model.name'"),
        (["photos"], "'photos' belongs to no field: fields are given as --field VALUE, pictures as --data.source"),
        (["--trackers", "tensorboard"], r"trackers is tensorboard: it must be \[text\], such as \[tensorboard\]"),
        (["--trackers", "[tensorbord]"], "trackers is 'tensorbord': there is no such tracker, did you mean 'tensorb"),
        (["--trackers", "[tensorboard,'']"], "trackers is '': there is no such tracker"),
        (["--trackers", "[all,x]"], "trackers is 'x': there is no such tracker"),
        (["--trackers", "[dvclive]"], "trackers is 'dvclive': it is not installed: pip install dvclive"),
    ],
)
def test_mistakes_get_one_line(argv, words):
    with pytest.raises(UserError, match=words) as caught:
        parsed(*argv)
    assert "\n" not in str(caught.value)


def test_a_misspelt_field_in_a_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {sauce: photos}\n")
    with pytest.raises(UserError, match="sauce"):
        parsed("--config", str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ("asha", "scheduler is 'asha': it is a group of fields; did you mean 'scheduler.kind'"),
        ("{name: none}", "no such field: scheduler.name; choose from scheduler.grace, scheduler.kind, scheduler.reduc"),
        ("{kind: ash}", "scheduler.kind is ash: it must be one of none, asha, median, pbt"),
    ],
)
def test_schedulers_of_a_sweep_file(scheduler, words, tmp_path):
    text = "task: classification\nmetric: top1\nspace: {batch_size: {grid: [2]}}\nscheduler: "
    (tmp_path / "sweep.yaml").write_text(f"{text}{scheduler}\n")
    with pytest.raises(UserError, match=words):
        parse(SweepConfig, [f"--config={tmp_path}/sweep.yaml"], "sweep", "")


def test_every_synonym_leads_to_its_field():
    types = [field_types(c) for c in (PretrainConfig, SweepConfig, *(t.config_class for t in TASKS.values()))]
    for name, others in SYNONYMS.items():
        having = [fields for fields in types if name in fields or any(field.startswith(f"{name}.") for field in fields)]
        assert having, name
        for fields in having:
            if name in fields:
                assert all(f"'{name}'" in suggestion(other, fields) for other in others if other not in fields), name


@pytest.mark.parametrize(("in_file", "given"), [("steps", "epochs"), ("epochs", "steps")])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_a_length_given_replaces_that_of_the_file(in_file, given, first, joined, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{in_file}: 7\n")
    file = [f"--config={tmp_path}/recipe.yaml"] if joined else ["--config", f"{tmp_path}/recipe.yaml"]
    length = [f"--{given}=3"] if joined else [f"--{given}", "3"]
    config = parsed(*(file + length if first else length + file))
    assert (getattr(config, given), getattr(config, in_file)) == (3, None)
    (tmp_path / "recipe.yaml").write_text("steps: 7\nepochs: 7\n")
    with pytest.raises(UserError, match="give steps or epochs, not both"):
        parsed(*file)
    assert getattr(parsed(*file, *length), given) == 3


def test_the_line_of_an_error_is_one_line_that_a_terminal_can_show(capsys):
    def fail(argv):
        raise UserError("a\nb\x1b[2Jc\udce9d cannot be read: é 画")

    assert run(fail, []) == 2
    assert capsys.readouterr().err == "error: a\\nb\\x1b[2Jc\\xe9d cannot be read: é 画\n"


def test_every_field_is_explained(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    printed = capsys.readouterr().out
    for name in field_types(PretrainConfig):
        assert f"--{name}" in printed
    assert "in pixels" in printed
    assert printed.count("(type:") == len(field_types(PretrainConfig))


def test_exit_codes(capsys):
    def fail(argv):
        raise UserError("what: value, remedy")

    def stop(argv):
        raise Stopped(15, "stopped by SIGTERM")

    assert run(lambda argv: None, []) == 0
    assert run(fail, []) == 2
    assert capsys.readouterr().err == "error: what: value, remedy\n"
    assert run(stop, []) == 143
    with pytest.raises(UserError):
        run(fail, ["--debug"])


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR])
def test_a_file_that_was_taken_away_is_named(number, tmp_path):
    """In a process of its own, because the process is ended."""
    code = (
        "import os; from launch.run.cli import run\n"
        f"def main(argv): raise OSError({number}, os.strerror({number}), 'x/y')"
        "\n"
        "raise SystemExit(run(main, []))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(PYTHONPATH=PATH)
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        f"error: cannot use x/y: {os.strerror(number)}; --resume goes on from what is left of the run\n"
    )


def test_sources_on_the_command_line_replace_those_of_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {sources: [{source: a, weight: 3, split: test}]}\n")
    (only,) = parsed(f"--config={tmp_path}/run.yaml", "--data.sources=[{source: b}]").data.sources
    assert (only.source, only.weight, only.split) == ("b", 1.0, None)
