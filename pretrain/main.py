"""Entry of pretraining: `python -m launch pretrain/main.py [--config FILE.yaml] [--field VALUE ...]`."""

if not __package__:  # started as a file: import from this checkout, never from the folder of this file
    import sys
    from pathlib import Path

    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(_ROOT), str(_ROOT / "kernels")]

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all is imported ends this without a traceback

import os

from launch.run.cli import leave, run
from pretrain.config import PretrainConfig
from pretrain.initial import parse_run
from pretrain.train import pretrain

DESCRIPTION = "Pretrain a Vision Mamba backbone on pictures, and publish it."


def main(argv: list[str]) -> None:
    """Parse, train, and print the run's folder last."""
    config = parse_run(PretrainConfig, argv, "pretrain/main.py", DESCRIPTION)
    folder = pretrain(config)
    if os.environ.get("RANK", "0") == "0":
        print(folder)  # noqa: T201 - the command's result


if __name__ == "__main__":
    leave(run(main))
