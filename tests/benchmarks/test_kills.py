"""Runs that are killed at a few file operations and at a random moment; all operations are benchmarks.kills' matter."""

import sys

import pytest

from tests.launch.preloaded import Popen
from tests.launch.real import ROOT, environment, finish


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "what", "every", "moments"),
    [("one", "kill", "41", "1"), ("ddp", "kill", "97", "1"), ("one", "full", "61", "0")],
)
def test_a_run_that_fares_ill_is_the_same_after_it_is_resumed(strategy, what, every, moments, tmp_path):
    """Starting at the third operation, before the config is in place."""
    options = ["--strategies", strategy, "--what", what, "--first", "3", "--every", every, "--moments", moments]
    python = [sys.executable, "-m", "benchmarks.kills", *options]
    process = Popen(python, ROOT, environment(TMPDIR=str(tmp_path)))
    code, printed = finish(process)
    assert code == 0, printed
    row = next(line for line in printed.splitlines() if line.startswith(f"| {strategy} | {what} |"))
    count, met, random, over, same = [int(cell) for cell in row.strip("| ").split("|")[2:]]
    assert count > 100
    assert met >= 3
    assert same == met + random == met + int(moments)
    assert over >= met if what == "kill" else over >= 1  # a run goes on without pictures where the disk is full
