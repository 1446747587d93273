"""A run on two hosts of a Ray cluster: two raylets of this host, one process each, by gloo."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.real import ROOT, SMALL, environment
from tests.rows import read_metrics
from tests.waiting import LIMIT

HAS_RAY = shutil.which("ray", path=Path(sys.executable).parent)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed")]
CLUSTER = """
import os, subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
try:
    code = subprocess.run([sys.executable, *sys.argv[1:]], env=os.environ | {"RAY_ADDRESS": cluster.address}).returncode
finally:
    cluster.shutdown()
sys.exit(code)
"""


def on_cluster(where, *argv, **env):
    """Exit code and output of the program on a cluster of two hosts."""
    program = [str(ROOT / "launch/ray/on_hosts.py"), "--hosts=2", "--gpus=0"]
    environ = environment(ACCELERATE_USE_CPU="true", RAY_USAGE_STATS_ENABLED="0", **env)
    words = [sys.executable, "-c", CLUSTER, *program, *argv]
    done = subprocess.run(words, cwd=where, env=environ, capture_output=True, text=True, timeout=LIMIT, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_host_starts_a_process_each_and_a_failed_run_starts_again(tmp_path):
    """The second process is killed once, at its third step; the run goes on from the second."""
    strategy, program = ROOT / "launch/accelerate/ddp.yaml", ROOT / "tests/launch/faulty.py"
    fields = [*SMALL, f"--out={tmp_path / 'runs'}", "--steps=4", "--checkpoint_every=2"]
    code, printed = on_cluster(tmp_path, str(strategy), str(program), *fields, FAULTS="kill@3:1")
    assert code == 0, printed[-6000:]
    assert "2 x cpu DDP" in printed
    assert re.search(r"the run ended with \d+; starting again, 3 more times", printed), printed[-3000:]
    assert "from step 2" in printed
    assert [row["step"] for row in read_metrics(tmp_path / "runs/run/metrics.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "runs/run/backbone").is_dir()


def test_a_file_that_is_not_there_is_named_before_anything_starts(tmp_path):
    argv = [str(ROOT / "launch/ray/on_hosts.py"), "--hosts=2", "launch/accelerate/dpp.yaml", "pretrain/main.py"]
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no file launch/accelerate/dpp.yaml in" in done.stderr
