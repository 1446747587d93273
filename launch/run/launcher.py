"""What `python -m launch` does: `accelerate launch`, with the run's exit code, and the run's last line as the last."""

import logging
import signal
import subprocess
import sys
from argparse import Namespace
from typing import Any

from accelerate.commands import launch as accelerate_launch
from accelerate.utils import prepare_simple_launcher_cmd_env
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from vim_backbone.errors import first_line

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REPEATS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")
"""Loggers that repeat at length how a process ended."""


def start(argv: list[str]) -> int:
    """Start a program on one or several processes, with the options of `accelerate launch` before it.

    Returns its exit code, 128 + signal for one that was killed, 2 where the options cannot be.
    """
    parser = accelerate_launch.launch_command_parser()
    parser.prog, parser.usage = "python -m launch", "python -m launch [OPTIONS] PROGRAM.py [FIELDS]"
    options = parser.parse_args(argv)
    codes: list[int] = []
    setattr(accelerate_launch, "simple_launcher", lambda options: codes.append(start_one(options)))  # noqa: B010
    if not options.debug:
        accelerate_launch.logger.addFilter(lambda record: "had defaults used instead" not in record.getMessage())
        for name in REPEATS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        accelerate_launch.launch_command(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return ended(failure.exitcode, rank)
    except SignalException as error:
        return 128 + error.sigval
    except (ValueError, OSError, ImportError) as error:
        if options.debug:
            raise
        print(f"error: {first_line(error)}", file=sys.stderr)  # noqa: T201 - command line
        return 2
    return codes[0] if codes else 0


def start_one(options: Namespace) -> int:
    """Start one process, hand signals on to it, and return its exit code."""
    command, environment = prepare_simple_launcher_cmd_env(options)
    process = subprocess.Popen(command, env=environment)

    def hand_on(number: int, frame: Any) -> None:
        del frame
        process.send_signal(number)

    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, hand_on)
    return ended(process.wait(), 0)


def ended(code: int, rank: int) -> int:
    """The exit code for the shell; a process that was killed could print nothing, which is done here."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    line = f"error: process {rank} was ended by {name}{hint}; --resume goes on from the newest checkpoint"
    print(line, file=sys.stderr)  # noqa: T201 - command line
    return 128 - code
