"""Runs that are killed at a few file operations and at a random moment; all operations are benchmarks.kills' matter."""

import subprocess
import sys

import pytest

from tests.launch.real import ROOT, environment
from tests.waiting import LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "what", "every", "moments"),
    [("one", "kill", "41", "1"), ("ddp", "kill", "97", "1"), ("one", "full", "61", "0")],
)
def test_a_run_that_fares_ill_is_the_same_after_it_is_resumed(strategy, what, every, moments, tmp_path):
    """Starting at the third operation, before the config is in place."""
    options = ["--strategies", strategy, "--what", what, "--first", "3", "--every", every, "--moments", moments]
    python = [sys.executable, "-m", "benchmarks.kills", *options]
    env = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}", TMPDIR=str(tmp_path))
    ended = subprocess.run(python, capture_output=True, text=True, cwd=ROOT, env=env, timeout=LIMIT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    count, met, random, over, same = [int(cell) for cell in ended.stdout.splitlines()[-1].strip("| ").split("|")[2:]]
    assert count > 100
    assert met >= 3
    assert same == met + random == met + int(moments)
    assert over >= met if what == "kill" else over >= 1  # a run goes on without pictures where the disk is full
