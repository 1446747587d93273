"""Entry of fine-tuning: `python -m launch finetune/main.py TASK --backbone FOLDER --data.source FOLDER [...]`."""

if not __package__:  # started as a file: import from this checkout, never from the folder of this file
    import sys
    from pathlib import Path

    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(_ROOT), str(_ROOT / "kernels")]

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all is imported ends this without a traceback

import os

from finetune.registry import TASKS
from finetune.train import finetune
from launch.run.cli import leave, parse, run
from vim_backbone.errors import UserError, nearest

HELP = """usage: finetune/main.py TASK --backbone FOLDER --data.source FOLDER [--config FILE.yaml] [--field VALUE ...]

Fine-tune a published Vision Mamba backbone, evaluate it, and publish the whole model.

tasks:
"""


def main(argv: list[str]) -> None:
    """Parse, train, and print the run's folder last."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {task.name:16}{task.summary}" for task in TASKS.values()]
        print(HELP + "\n".join(lines) + "\n\nfinetune/main.py TASK --help explains every field.")  # noqa: T201
        return
    if name not in TASKS:
        raise UserError(f"the first argument is {name!r}, it must be the task: {nearest(name, TASKS)}")
    task = TASKS[name]
    folder = finetune(task(parse(task.config_class, argv[1:], f"finetune/main.py {name}", task.summary)))
    if os.environ.get("RANK", "0") == "0":
        print(folder)  # noqa: T201 - the command's result


if __name__ == "__main__":
    leave(run(main))
