"""Runs that are killed at a few file operations and at a random moment; all operations are benchmarks.kills' matter."""

import subprocess
import sys

import pytest

from tests.launch.real import ROOT, environment
from tests.waiting import LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "every", "moments"), [("1", "41", "1"), ("2", "97", "1")])
def test_a_killed_run_is_the_same_after_it_is_resumed(processes, every, moments, tmp_path):
    """Starting at the third operation, before the config is in place."""
    options = ["--processes", processes, "--first", "3", "--every", every, "--moments", moments]
    python = [sys.executable, "-m", "benchmarks.kills", *options]
    env = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}", TMPDIR=str(tmp_path))
    ended = subprocess.run(python, capture_output=True, text=True, cwd=ROOT, env=env, timeout=LIMIT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    count, killed, random, died, same = [int(cell) for cell in ended.stdout.splitlines()[-1].strip("| ").split("|")[1:]]
    assert count > 100
    assert killed >= 3
    assert same == killed + random == killed + int(moments)
    assert died >= killed  # the random moment may come when all is done
