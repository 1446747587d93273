"""Starts a run on several hosts of a Ray cluster: on each `python -m launch`, as launch/slurm/pretrain.sbatch does.

    python launch/ray/on_hosts.py --hosts 4 --gpus 8 launch/accelerate/ddp.yaml pretrain/main.py --data.source PICTURES

Checkout, `.venv`, pictures and runs lie at the same paths on a disk that all hosts share. `--resume auto` is added.
Where a host is lost or the run fails, all is started again, on the hosts that there are then. Ctrl-C and SIGTERM save
and end.
"""

import argparse
import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

ROOT = Path(__file__).resolve().parents[2]
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE = 300
"""Seconds that processes have to save and end, once they were told to."""
LOST = 1
"""Exit code that stands for a host that is gone."""
USER_ERROR = 2
"""Exit code of a run that has printed an error: it would end so again."""


class Host:
    """One host of the run, as an actor: it runs the launcher."""

    def __init__(self, run: str) -> None:
        """`run`: a name that all attempts at it share."""
        self._run = run
        self._launcher: subprocess.Popen[bytes] | None = None
        self._stopped: int | None = None
        self._changing = threading.Lock()

    def address(self) -> tuple[str, int]:
        """Of this host, for the others, with a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return get_node_ip_address(), probe.getsockname()[1]

    def lock(self) -> Path:
        """What the run's launcher holds on this host."""
        return Path(tempfile.gettempdir()) / f"on_hosts-{self._run}-{ray.get_runtime_context().get_node_id()}.lock"

    def run(self, command: list[str]) -> int:
        """The launcher's exit code, or what stands for the signal that came before there was one.

        An earlier attempt's launcher on this host is waited for: it may be saving, its actor lost.
        """
        libc = ctypes.CDLL(None)
        env = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE)}
        set_parent_death_signal = 1  # nothing goes on where Ray ends this actor

        def die_with_actor() -> None:
            libc.prctl(set_parent_death_signal, signal.SIGTERM)

        with self.lock().open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self._changing:
                if self._stopped is not None:
                    return 128 + self._stopped
                self._launcher = subprocess.Popen(
                    command, cwd=ROOT, env=env, preexec_fn=die_with_actor, pass_fds=(lock.fileno(),)
                )
        return self._launcher.wait()

    def stop(self, number: int) -> None:
        """Send the launcher a signal, now or instead of its start; SIGKILL is for all that it has started."""
        with self._changing:
            self._stopped = number
        if self._launcher is None or self._launcher.poll() is not None:
            return
        started: list[psutil.Process] = []
        if number == signal.SIGKILL:
            with suppress(psutil.NoSuchProcess):
                started = psutil.Process(self._launcher.pid).children(recursive=True)
        self._launcher.send_signal(number)  # before them, or it could end for their loss with a code of its own
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=8, help="of a host, a process each; 0: one process on its CPU")
    parser.add_argument("--cpus", type=float, default=1, help="of a host that Ray is to keep free for the run")
    parser.add_argument("--restarts", type=int, default=3, help="how often a run that failed is started again")
    parser.add_argument("--address", default="auto", help="of the cluster")
    parser.add_argument("strategy", help="a file of launch/accelerate")
    parser.add_argument("program", help="pretrain/main.py")
    parser.add_argument("fields", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    for path in (options.strategy, options.program):
        if not (ROOT / path).is_file():
            parser.error(f"there is no file {path} in {ROOT}")
    return options


def command(options: argparse.Namespace, rank: int, ip: str, port: int) -> list[str]:
    """What the host of this rank runs."""
    return [
        sys.executable, "-m", "launch", "--config_file", options.strategy, "--num_machines", str(options.hosts),
        "--machine_rank", str(rank), "--num_processes", str(options.hosts * max(1, options.gpus)),
        "--main_process_ip", ip, "--main_process_port", str(port), options.program, *options.fields,
        "--resume", "auto",
    ]  # fmt: skip


def say(line: str) -> None:
    """Print a line for the user."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def attempt(options: argparse.Namespace, run: str, received: list[int]) -> int:
    """Run once, on hosts that are waited for; the first exit code that is not 0, else 0. `run` as `Host` takes it."""
    group = placement_group([{"CPU": options.cpus, "GPU": options.gpus}] * options.hosts, strategy="STRICT_SPREAD")
    try:
        if not group.wait(1):
            say(f"waiting for {options.hosts} hosts, each with {options.gpus} GPUs and {options.cpus:g} cores free")
        while not group.wait(1):
            if received:
                return 128 + received[0]
        kind: Any = ray.remote(Host)
        sizes = {"num_cpus": options.cpus, "num_gpus": options.gpus, "max_concurrency": 2}
        places = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(options.hosts)]
        hosts = [kind.options(**sizes, scheduling_strategy=place).remote(run) for place in places]
        ip, port = ray.get(hosts[0].address.remote())
        running = {each.run.remote(command(options, rank, ip, port)): rank for rank, each in enumerate(hosts)}
        return wait_for(running, hosts, received)
    except RayError as error:
        say(f"a host was lost before all had begun: {str(error).strip().splitlines()[-1]}")
        return LOST
    finally:
        remove_placement_group(group)


def wait_for(running: dict[Any, int], hosts: list[Any], received: list[int]) -> int:
    """The first exit code that is not 0, when all hosts have ended, or are ended because one has failed."""
    code, told, killed = 0, None, False
    while running:
        for done in ray.wait(list(running), timeout=1)[0]:
            rank = running.pop(done)
            try:
                ended = ray.get(done)
            except RayError:
                ended = LOST
                say(f"host {rank} of the run was lost")
            code = code or ended
        if told is None and (received or code):
            told = time.monotonic()
            tell(running, hosts, signal.SIGTERM)
        waited = 0.0 if told is None else time.monotonic() - told
        if waited > GRACE + 60 and not killed:
            killed = True
            tell(running, hosts, signal.SIGKILL)
        if waited > GRACE + 120:
            return code or LOST  # what is left is out of reach
    return code


def tell(running: dict[Any, int], hosts: list[Any], number: int) -> None:
    """Send the launchers that are left a signal."""
    for rank in running.values():
        hosts[rank].stop.remote(number)


def main() -> int:
    """Start, and start again; the exit code."""
    options = parse_options()
    received: list[int] = []
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    try:
        ray.init(options.address, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    except ConnectionError as error:
        say(f"error: no Ray cluster at {options.address}: {str(error).splitlines()[0]}")
        return USER_ERROR
    for number in STOPPING:  # after Ray, which sets its own
        signal.signal(number, lambda got, _: received.append(got))
    code, run = 0, uuid.uuid4().hex
    for left in range(options.restarts, -1, -1):
        code = attempt(options, run, received)
        if code == 0 or received:
            break
        again = left > 0 and code != USER_ERROR
        say(f"the run ended with {code}; {f'starting again, {left} more times' if again else 'giving up'}")
        if not again:
            break
    return 128 + received[0] if received and code else code


if __name__ == "__main__":
    sys.exit(main())
