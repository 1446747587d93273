"""Entry of sweeps: `python finetune/sweep.py SWEEP.yaml [--resume] [--top 3] [--field VALUE ...]`."""

if not __package__:  # started as a file: import from this checkout, never from the folder of this file
    import sys
    from pathlib import Path

    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(_ROOT), str(_ROOT / "kernels")]

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all is imported ends this without a traceback

import os
import sys

from finetune.sweeping import PRIVATE_TOKEN, TOKEN
from finetune.sweeping.config import SweepConfig
from finetune.sweeping.driver import sweep, top_commands
from launch.run.cli import leave, parse, run
from vim_backbone.errors import UserError

HELP = """usage: finetune/sweep.py SWEEP.yaml [--resume] [--top N] [--field VALUE ...]

Fine-tune many times over a space of fields, on this machine or on a Ray cluster, and publish the best model.
Files to start from are in finetune/sweeps/; docs/sweeps.md explains them.

finetune/sweep.py SWEEP.yaml --help explains every field.
"""


def main(argv: list[str]) -> None:
    """Parse, sweep, and print the sweep's folder last; with --top, print commands and run nothing."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")  # noqa: T201
        return
    if argv[0].startswith("-"):
        raise UserError(f"the first argument is {argv[0]!r}, it must be the sweep's YAML file")
    config = parse(SweepConfig, [f"--config={argv[0]}", *argv[1:]], "finetune/sweep.py SWEEP.yaml", "Sweep.")
    if config.ray.address is not None and PRIVATE_TOKEN:
        start_again_to_join(config.ray.address)
    print("\n".join(top_commands(config)) if config.top else sweep(config))  # noqa: T201 - the command's result


def start_again_to_join(address: str) -> None:
    """Replace this process by one without a token of its own, because Ray fixes that when it is imported."""
    for name in TOKEN:
        os.environ.pop(name, None)
    os.environ["RAY_ADDRESS"] = address
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    leave(run(main))
