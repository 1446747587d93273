"""Two hosts made of network namespaces: ZeRO-2 over a link that is cut in the middle, and the run that goes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.real import CONFIGS, SMALL, environment, finish, free_port, losses, run
from tests.waiting import patience, wait_for

pytestmark = pytest.mark.slow
OPTIONS = ("--steps=4", "--checkpoint_every=2")
FAULTY = Path(__file__).parent / "faulty.py"
HOSTS = ("10.213.77.1", "10.213.77.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two namespaces with a cable between them, which is called `cable` in both."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces are made with ip, of iproute2, which is not installed")
    names = [f"vim{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ends = ("add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        ip("link", *ends)
        for name, address in zip(names, HOSTS, strict=True):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove(names)
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
    yield names
    remove(names)


def remove(names):
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def launch(hosts, where, *argv):
    """The command of docs/scaling.md on each host."""
    port, env = free_port(), environment(GLOO_SOCKET_IFNAME="cable")
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, "-m", "accelerate.commands.launch", "--quiet",
             f"--config_file={CONFIGS / 'zero2.yaml'}", "--num_machines=2", "--num_processes=2",
             f"--machine_rank={rank}", f"--main_process_ip={HOSTS[0]}", f"--main_process_port={port}",
             str(FAULTY), *SMALL, *OPTIONS, f"--hang_seconds={patience(8)}", *argv],
            cwd=where, env=env | {"FAULTS": "wait@3:-1"}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip


def test_a_cut_link_ends_the_run_which_goes_on_later(hosts, tmp_path):
    processes = launch(hosts, tmp_path)
    folder = tmp_path / "runs/run"
    wait_for((folder / "checkpoints/step-00000002").exists, "a checkpoint", *processes)
    ip("-n", hosts[0], "link", "set", "cable", "down")
    (folder / "go").touch()
    ended = [finish(process) for process in processes]
    assert all(code != 0 for code, _ in ended)
    lines = [[line for line in printed.splitlines() if line.startswith("error:")] for _, printed in ended]
    assert "process 1 has not been heard of" in lines[0][0], lines
    assert "the main process's host has not been reached" in lines[1][0], lines
    ip("-n", hosts[0], "link", "set", "cable", "up")
    for code, printed in [finish(process) for process in launch(hosts, tmp_path, "--resume=auto")]:
        assert code == 0, printed[-3000:]
    assert losses(folder) == pytest.approx(losses(run(tmp_path / "one", "one", *OPTIONS)), rel=2e-6)
