"""A run on two hosts of a Ray cluster: two raylets of this host, one process each, by gloo."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.real import ROOT, SMALL, begin, environment, finish, rows_written
from tests.rows import read_metrics
from tests.waiting import LIMIT, wait_for

HAS_RAY = shutil.which("ray", path=Path(sys.executable).parent)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed")]
CLUSTER = """
import os, subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
try:
    process = subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | {"RAY_ADDRESS": cluster.address})
    open("pid", "w").write(str(process.pid))
    code = process.wait()
finally:
    cluster.shutdown()
sys.exit(code)
"""


def on_cluster(where, *argv, **env):
    """The program on a cluster of two hosts; a file `pid` names its process."""
    program = [str(ROOT / "launch/ray/on_hosts.py"), "--hosts=2", "--gpus=0"]
    environ = environment(ACCELERATE_USE_CPU="true", RAY_USAGE_STATS_ENABLED="0", **env)
    return begin([sys.executable, "-c", CLUSTER, *program, *argv], where, environ, device="cuda")


def test_a_host_starts_a_process_each_and_a_failed_run_starts_again(tmp_path):
    """The second process is killed once, at its third step; the run goes on from the second."""
    strategy, program = ROOT / "launch/accelerate/ddp.yaml", ROOT / "tests/launch/faulty.py"
    fields = [*SMALL, f"--out={tmp_path / 'runs'}", "--steps=4", "--checkpoint_every=2"]
    code, printed = finish(on_cluster(tmp_path, str(strategy), str(program), *fields, FAULTS="kill@3:1"))
    assert code == 0, printed[-6000:]
    assert "2 x cpu DDP" in printed
    assert re.search(r"the run ended with \d+; starting again, 3 more times", printed), printed[-3000:]
    assert "from step 2" in printed
    assert [row["step"] for row in read_metrics(tmp_path / "runs/run/metrics.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "runs/run/backbone").is_dir()


def test_sigterm_saves_and_ends(tmp_path):
    fields = [*SMALL, f"--out={tmp_path / 'runs'}", "--steps=4000"]
    process = on_cluster(tmp_path, str(ROOT / "launch/accelerate/ddp.yaml"), str(ROOT / "pretrain/main.py"), *fields)
    wait_for(lambda: rows_written(tmp_path / "runs/run") >= 2, "two steps", process)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    code, printed = finish(process)
    assert code == 128 + signal.SIGTERM, printed[-6000:]
    assert "stopped by SIGTERM at step" in printed
    assert "starting again" not in printed
    done = rows_written(tmp_path / "runs/run")
    assert [path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()] == [f"step-{done:08d}"]


HOST = """
import signal, sys, threading, time
from pathlib import Path
import on_hosts

class Host(on_hosts.Host):
    def lock(self):
        return Path("lock")

def words(number):
    return [sys.executable, "-uc", f"import time; print('begin {number}'); time.sleep(2); print('end {number}')"]

early, first, second = (Host("run") for _ in range(3))
early.stop(signal.SIGTERM)
print("early", early.run(words(0)), flush=True)
old = threading.Thread(target=first.run, args=(words(1),))
old.start()
while first._launcher is None:
    time.sleep(0.01)
print("second", second.run(words(2)), flush=True)
third = Host("run")
argv = [sys.executable, "-c", "import os; os.system('sleep 1000')"]
new = threading.Thread(target=lambda: print("third", third.run(argv)))
new.start()
while third._launcher is None:
    time.sleep(0.01)
time.sleep(1)
third.stop(signal.SIGKILL)
new.join()
"""


def test_a_host_waits_for_the_attempt_before_and_hears_an_early_stop(tmp_path):
    """Without Ray's actors, in a process of its own: importing Ray settles much."""
    path = f"{ROOT / 'launch/ray'}{os.pathsep}{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    process = begin([sys.executable, "-c", HOST], tmp_path, environment(PYTHONPATH=path), device="cuda")
    code, printed = finish(process)
    assert code == 0, printed
    on_this_host = ["early 143", "begin 1", "end 1", "begin 2", "end 2", "second 0", "third -9"]
    assert [
        line for line in printed.splitlines() if line.split()[0] in {"early", "begin", "end", "second", "third"}
    ] == (on_this_host)


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
