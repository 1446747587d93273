"""Programs in processes that were forked from one which has imported everything: each saves seconds of imports.

`Popen` starts `python SCRIPT ...` or `python -m MODULE ...` so. What `accelerate launch` starts in its turn, through
torchrun's agent, is forked in the same way; all else of the launcher, its signals and its restarts, is the real one.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

LAUNCHERS = (
    "accelerate.commands.launch",
    "launch.run.launcher",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler",
)
MODULES = [
    *LAUNCHERS, "accelerate.commands.config", "accelerate.commands.estimate", "datasets", "deepspeed",
    "finetune.main", "pretrain.main", "pretrain.plan", "torch.distributed.run", "torch.utils.tensorboard",
    "tests.launch.warm",
]  # fmt: skip
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(MODULES)
ROOT = Path(__file__).parents[2]


class Popen:
    """As `subprocess.Popen` with text=True and start_new_session=True, for Python programs alone."""

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str], output: tuple[str, str] | None = None) -> None:
        self.args = argv
        self.returncode: int | None = None
        self._output = output or tuple(tempfile.mkstemp(prefix="printed-")[1] for _ in range(2))
        self._process = context.Process(target=_become, args=(argv, str(cwd), env, self._output))
        # what the first one leaves to all that come after it: threads and paths are settled when Python starts
        paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
        with mock.patch.dict(os.environ, env | {"PYTHONPATH": paths}, clear=True):
            self._process.start()
        self.pid: int = self._process.pid or 0

    def poll(self) -> int | None:
        """The exit code, minus the signal's number for a process that died of one; None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code, or raise subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed: output and errors."""
        self.wait(timeout)
        out, err = (Path(path).read_text() for path in self._output)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _fork_from_the_same() -> None:
    """Have this process's own processes forked from where it was itself, and not from a new server."""
    server = multiprocessing.forkserver._forkserver  # pyright: ignore[reportAttributeAccessIssue]
    if server._forkserver_address and getattr(server, "_forkserver_authkey", True):
        server.ensure_running = lambda: None


def _become(argv: list[str], cwd: str, env: dict[str, str], output: tuple[str, str]) -> None:
    """What the forked process does: be the program."""
    os.setsid()
    os.chdir(cwd)
    for path, descriptor in zip(output, (1, 2), strict=True):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # as the environment says
    _fork_from_the_same()
    words = [word for word in argv[1:] if word != "-u"]

    def fork(argv: Iterable[str], env: dict[str, str]) -> Popen:
        return Popen(list(argv), Path.cwd(), env, output)

    *launchers, agent = (sys.modules[name] for name in LAUNCHERS)
    for launcher in launchers:
        launcher.__dict__["subprocess"] = SimpleNamespace(**vars(subprocess) | {"Popen": fork})  # of one process
    agent.__dict__["SubprocessHandler"]._popen = lambda _, argv, env: fork(argv, env)  # of several
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, cwd)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
