"""`python -m launch`: the run's line is the last on the screen, and its exit code the launcher's."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.run.launcher import ended
from tests.launch.preloaded import Popen
from tests.launch.real import CONFIGS, ROOT, SMALL, environment, finish, free_port, rows_written
from tests.waiting import LIMIT, wait_for

START = (sys.executable, "-m", "launch")
WRONG = "error: data.source /nowhere does not exist"
ONE = {"plain": [], "configured": [f"--config_file={CONFIGS}/cpu.yaml"]}
TWO = {name: ["--num_processes=2", f"--config_file={CONFIGS}/{name}.yaml"] for name in ("ddp", "zero2")}


def started(where: Path, options: list[str], *fields: str) -> Any:
    for name in ("launch", "vim_backbone", "kernels", "pretrain"):
        (where / name).symlink_to(ROOT / name)
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if "--num_processes=2" in options and "ddp" in options[-1] else {}
    port = f"--main_process_port={free_port()}"
    return Popen([*START, port, *options, "pretrain/main.py", *fields], where, environment(**on_cpu))


@pytest.mark.parametrize("options", [*ONE.values(), *TWO.values()], ids=[*ONE, *TWO])
def test_the_line_of_a_mistake_is_the_last(options, tmp_path):
    process = started(tmp_path, options, "--data.source=/nowhere")
    out, err = process.communicate(LIMIT)
    assert process.returncode == 2
    assert out == ""
    lines = err.splitlines()
    assert lines[-1].startswith(WRONG)
    assert sum(WRONG in line for line in lines) == 1
    for noise in ("Traceback", "CalledProcessError", "ChildFailedError", "had defaults used", "exitcode"):
        assert noise not in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config_file=nowhere.yaml"], "nowhere.yaml` does not exist"),
        (["--multi_gpu", "--num_processes=1"], "at least 2 processes"),
    ],
)
def test_options_that_cannot_be_get_one_line(options, words, tmp_path):
    process = started(tmp_path, options, "--data.source=/nowhere")
    _, err = process.communicate(LIMIT)
    assert process.returncode == 2
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [ONE["configured"], TWO["ddp"]], ids=["one", "two"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_the_run(number, options, tmp_path):
    process = started(tmp_path, options, *SMALL, "--steps=4000")
    wait_for(lambda: rows_written(tmp_path / "runs/run") > 1, "two steps", process)
    process.send_signal(number)
    code, printed = finish(process)
    assert code == 128 + number, printed[-3000:]
    assert f"stopped by {number.name} at step" in printed.splitlines()[-1]


@pytest.mark.parametrize(("code", "shell"), [(0, 0), (1, 1), (2, 2), (75, 75), (143, 143), (-9, 137), (-11, 139)])
def test_only_what_could_print_nothing_is_named(code, shell, capsys):
    assert ended(code, 3) == shell
    printed = capsys.readouterr().err
    assert printed == "" if code >= 0 else printed.startswith("error: process 3 was ended by SIG")
    assert ("out of memory" in printed) == (code == -9)
