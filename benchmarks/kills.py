"""`kill -9` or a full disk at each file operation of a small run, and kills at random moments; then `--resume auto`.

`python -m benchmarks.kills` counts an operation for each file or folder below the run's that Python opens for writing,
renames, makes, deletes, changes the rights of or flushes, and two for each safetensors file. Each kill is a run of its
own, resumed once; its losses, gradient norms and published weights must equal those of a run that was left alone, bit
for bit, and nothing of a half-written or half-deleted file may be left. With `--what full` the disk is full from that
operation on instead: whatever would write fails, pictures and the published backbone included. Such a run must say so
in a line, and must be the same after it is resumed on a disk with room.
"""

import argparse
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import vim_backbone.files
from benchmarks.machine import versions
from launch.run.cli import leave, run
from pretrain import main
from vim_backbone.files import remove

ARGUMENTS = [
    "--model.img_size=32", "--model.depth=2", "--decoder.width=32", "--decoder.depth=1", "--batch_size=8", "--steps=6",
    "--checkpoint_every=2", "--keep_checkpoints=1", "--picture_every=3", "--optim.warmup_steps=1", "--log_every=1",
    "--data.workers=0", "--trackers=[]", "--name=run", "--resume=auto",
]  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
TAKING_ROOM = ("open", "os.rename", "os.mkdir")
ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}  # fmt: skip
"""What `accelerate launch` sets for launch/accelerate/zero2.yaml."""
PROCESSES = {"one": 1, "ddp": 2, "zero2": 2}
"""Strategy -> processes of a run."""
context = multiprocessing.get_context("fork")
# in the children nothing of this is imported again, and no kernel was called before the fork


class Operations:
    """Counts the operations on files below a folder; at one of them the process is killed, or the disk becomes full."""

    def __init__(self, folder: Path, at: int | None, what: str) -> None:
        self.folder = str(folder)
        self.at = at
        self.what = what
        self.count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook of Python, which is called before the operation."""
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & WRITING and self._is_below(arguments[0]):
                self.one(event)
        elif event in EVENTS and (self._is_below(arguments[0]) or arguments[-1] not in (-1, None)):
            self.one(event)

    def one(self, event: str) -> None:
        """Count an operation. Raises OSError for one that needs room on a full disk."""
        self.count += 1
        if self.at is None or self.count < self.at:
            return
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif event in TAKING_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, (str, Path)) and f"{path}/".startswith(f"{self.folder}/")


def child(out: Path, rank: int, strategy: str, port: int, at: int | None, what: str) -> None:
    """One process of a run, with its file operations counted where it is the main one."""
    sink = os.open(out.parent / f"{out.name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if strategy != "one":
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port),
        }  # fmt: skip
        os.environ |= ZERO2 if strategy == "zero2" else {"ACCELERATE_USE_CPU": "true"}
    operations = Operations(out, at, what)
    if rank == 0:
        count_rust_and_fsync(operations)
        sys.addaudithook(operations)
    code = run(main.main, [*ARGUMENTS, f"--out={out}"])
    if rank == 0:
        (out.parent / f"{out.name}.count").write_text(str(operations.count))
    sys.stdout.flush()
    leave(code)


def count_rust_and_fsync(operations: Operations) -> None:
    """What Python's audit hooks do not show: flushing, and safetensors' writing, which may end halfway."""
    save, fsync = vim_backbone.files.save_file, os.fsync

    def counted_save(tensors: Any, path: Path, metadata: Any) -> None:
        if operations.count + 1 == operations.at:
            path.with_name(".tmpAbCdEf").write_bytes(b"half of it")
        try:
            operations.one("open")
        except OSError as error:
            raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error 28)") from None
        save(tensors, path, metadata)
        operations.one("written")

    def counted_fsync(handle: int) -> None:
        operations.one("fsync")
        fsync(handle)

    vim_backbone.files.save_file = counted_save
    os.fsync = counted_fsync


def start(out: Path, strategy: str, at: int | None = None, what: str = "kill") -> list[Any]:
    """Start a run, which fares ill at an operation of its main process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        context.Process(target=child, args=(out, rank, strategy, port, None if rank else at, what))
        for rank in range(PROCESSES[strategy])
    ]
    for process in started:
        process.start()
    return started


def finish(started: list[Any], seconds: float | None = None) -> int:
    """Exit code of the main process, which is killed after so many seconds; the others are killed after it."""
    main_process, *others = started
    main_process.join(seconds)
    if main_process.is_alive():
        main_process.kill()
        main_process.join()
    for process in others:
        if main_process.exitcode:
            process.kill()
        process.join()
    return main_process.exitcode


def outcome(folder: Path) -> tuple[Any, ...]:
    """What must be the same: rows without times, published weights, names of all that is in the folder."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows]
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return steps, (folder / "backbone/model.safetensors").read_bytes(), names


def resumed(out: Path, strategy: str, wanted: tuple[Any, ...]) -> str | None:
    """What is wrong with an ended run after it was resumed; None for nothing."""
    if (code := finish(start(out, strategy))) != 0:
        return f"the resumed run ended with {code}"
    got = outcome(out / "run")
    for name, a, b in zip(("losses", "weights", "files"), wanted, got, strict=True):
        if a != b:
            return f"other {name}" + (f": {a} and {b}" if name != "weights" else "")
    return None


def fault_of_words(log: str) -> str | None:
    """What is wrong with the words of a run whose disk became full; None for nothing."""
    if "Traceback" in log:
        return "a traceback"
    words = ("the disk is full", os.strerror(errno.ENOSPC))
    return None if any(word in log for word in words) else "it does not say that the disk is full"


def measure(strategy: str, what: str, every: int, first: int, moments: int, place: Path) -> int:
    """Print a row for a strategy; returns how many kills were not survived."""
    whole = place / f"whole-{strategy}"
    seconds = 0.0
    for _ in range(2):  # the first one makes caches, and says nothing of how long the others take
        for path in place.glob(f"{whole.name}*"):
            remove(path)
        began = time.perf_counter()
        if (code := finish(start(whole, strategy))) != 0:
            raise SystemExit(f"the run ended with {code}: " + (place / f"{whole.name}-0.txt").read_text())
        seconds = time.perf_counter() - began
    count = int((place / f"{whole.name}.count").read_text())
    wanted = outcome(whole / "run")
    numbers = range(first, count + 1, every) if every else range(0)
    draw = random.Random(0)
    cases: list[tuple[str, int | None, float | None]] = [(f"operation {n}", n, None) for n in numbers]
    cases += [(f"{s:.2f} s", None, s) for s in (draw.uniform(0, seconds) for _ in range(moments))]
    failed = ended = 0
    for name, operation, moment in cases:
        out = place / f"ended-{strategy}"
        code = finish(start(out, strategy, operation, what), moment)
        ended += code != 0
        printed = place / f"{out.name}-0.txt"  # a run that was killed at once has none
        unharmed = code == 0 and outcome(out / "run") == wanted  # what was left to do needed no room
        wrong = fault_of_words(printed.read_text()) if what == "full" and not unharmed else None
        wrong = wrong or resumed(out, strategy, wanted)
        if wrong is not None:
            failed += 1
            print(f"{strategy}, {what} at {name}: {wrong}", printed.read_text()[-2000:])
        for path in place.glob(f"{out.name}*"):
            remove(path)
    print(
        f"| {strategy} | {what} | {count} | {len(numbers)} | {moments} | {ended} | {len(cases) - failed} |", flush=True
    )
    return failed


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.kills", description=__doc__)
    parser.add_argument("--strategies", nargs="+", choices=PROCESSES, default=list(PROCESSES))
    parser.add_argument("--what", choices=["kill", "full"], default="kill", help="kill -9, or a full disk")
    parser.add_argument("--every", type=int, default=1, help="at every so many-th operation; 0 for none")
    parser.add_argument("--first", type=int, default=1, help="the first of these operations")
    parser.add_argument("--moments", type=int, default=50, help="kills at random moments")
    options = parser.parse_args(argv)
    if options.what == "full" and options.moments:
        parser.error("--what full needs --moments 0: a disk becomes full at an operation")
    return options


def table(argv: list[str]) -> int:
    """Print the table; returns 1 where a run was not the same afterwards."""
    options = parse(argv)
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {versions()}\n")
    print(
        "| strategy | what | file operations | of them met | random moments | ended by it | the same after --resume |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    how = (options.what, options.every, options.first, options.moments, place)
    try:
        return min(1, sum(measure(strategy, *how) for strategy in options.strategies))
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(table(sys.argv[1:]))
