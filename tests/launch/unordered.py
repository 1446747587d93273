"""pretrain/main.py on processes that each order their sets another way, as Python does by chance in real runs."""

import os
import sys
from pathlib import Path

SEEDS = "01"
"""PYTHONHASHSEED under which {"exp_avg", "exp_avg_sq"} comes in one order and in the other (CPython 3.11)."""

seed = SEEDS[int(os.environ.get("RANK", "0")) % 2]
if os.environ.get("PYTHONHASHSEED") != seed:
    os.environ["PYTHONHASHSEED"] = seed  # is read once, when Python starts
    os.execv(sys.executable, [sys.executable, *sys.argv])

sys.path[:1] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]

from launch.run.cli import leave, run
from pretrain import main

if __name__ == "__main__":
    leave(run(main.main))
