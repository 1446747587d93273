"""The files that start Ray elsewhere: cluster file and RayJob by their schema, the SLURM script under stand-ins."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.launch.real import ROOT, environment, free_port
from tests.waiting import LIMIT

FILES = ROOT / "launch/ray"
HAS_RAY = shutil.which("ray", path=Path(sys.executable).parent)


def sweep_commands(text: str) -> list[str]:
    return re.findall(r"finetune/sweep\.py\s+(\S+)", text)


def test_the_cluster_file_is_what_ray_up_takes():
    jsonschema = pytest.importorskip("jsonschema")
    ray = importlib.util.find_spec("ray")  # not imported: the first import fixes Ray's settings for the process
    if ray is None:
        pytest.skip("Ray is not installed")
    cluster = yaml.safe_load((FILES / "cluster.yaml").read_text())
    jsonschema.validate(cluster, json.loads((Path(ray.origin).parent / "autoscaler/ray-schema.json").read_text()))
    assert cluster["head_node_type"] in cluster["available_node_types"]
    workers = [kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers), "it grows, and shrinks to nothing"
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command
            assert "--disable-usage-stats" in command


def test_the_ray_job_has_the_shape_of_one():
    job = yaml.safe_load((FILES / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in pod["volumes"]}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes text alone"
    assert spec["enableInTreeAutoscaling"] is True
    assert "--resume auto" in job["spec"]["entrypoint"]


@pytest.mark.parametrize("name", ["cluster.yaml", "rayjob.yaml", "sweep.sbatch"])
def test_the_sweeps_that_they_name_are_shipped(name):
    named = sweep_commands((FILES / name).read_text())
    assert named
    assert all((ROOT / path.removeprefix("/vim/")).exists() for path in named if "$" not in path)


TOOLS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" > requeued; fi',
    "hostname": "echo 127.0.0.1",
}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed")
def test_the_slurm_job_starts_ray_stops_requeues_and_goes_on(tmp_path):
    """The sweep itself is a stand-in: it joins Ray, waits until it is told to stop, and is done the second time."""
    (tmp_path / "tools").mkdir()
    for name, body in TOOLS.items():
        (tmp_path / "tools" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "tools" / name).chmod(stat.S_IRWXU)
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune/sweep.py").write_text(
        "import os, sys, signal, time, pathlib, ray\n"
        "stopped = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))\n"
        "ray.init(address=os.environ['RAY_ADDRESS'], log_to_driver=False)\n"
        "pathlib.Path('joined').write_text(f\"{ray.cluster_resources()['CPU']:g} {' '.join(sys.argv[1:])}\")\n"
        "if pathlib.Path('again').exists(): sys.exit(0)\n"
        "pathlib.Path('again').touch()\n"
        "while not stopped: time.sleep(0.1)\n"
        "sys.exit(130)\n"
    )
    path = f"{tmp_path / 'tools'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(
        PATH=path, SLURM_JOB_ID="42", SLURM_JOB_NODELIST="here", SLURM_NNODES="1", CPUS="1", GPUS="0",
        SLURM_CPUS_PER_TASK="1",
    )  # fmt: skip
    for turn in range(2):
        script = ["bash", str(FILES / "sweep.sbatch"), "some.yaml", "--trials", "3"]
        job = subprocess.Popen(
            script, cwd=tmp_path, env=env | {"PORT": str(free_port())}, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        children = []
        try:
            for _ in range(int(LIMIT / 0.1)):
                with contextlib.suppress(psutil.Error):
                    children = psutil.Process(job.pid).children(recursive=True) or children
                if (tmp_path / "joined").exists() or job.poll() is not None:
                    break
                time.sleep(0.1)
            if turn == 0:
                job.send_signal(signal.SIGUSR1)
            job.wait(timeout=LIMIT)
        finally:
            for process in children:  # SLURM ends what a job leaves behind: Ray's head
                with contextlib.suppress(psutil.Error):
                    process.kill()
        assert job.returncode == 0, job.stderr.read()[-3000:]
        assert (tmp_path / "joined").read_text() == "1 some.yaml --trials 3 --resume auto"
        assert (tmp_path / "requeued").exists() == (turn == 0)
        (tmp_path / "requeued").unlink(missing_ok=True)
        (tmp_path / "joined").unlink()
