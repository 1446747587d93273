"""Starts the planner, pretrain/plan.py: what fits, how fast it runs, and the command to copy.

`python launch/plan.py --model vim_large --image-size 1024 --gpus 8 --gpu-memory 80`
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "pretrain/plan.py"), run_name="__main__")
