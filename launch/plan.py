"""What fits: memory of each strategy for a backbone, counted on the meta device, and the command to copy.

`python launch/plan.py --model vim_large --image-size 1024 --gpus 8 --gpu-memory 80`
"""

if not __package__:  # started as a file: import from this checkout, never from the folder of this file
    import sys
    from pathlib import Path

    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(_ROOT), str(_ROOT / "kernels")]

import argparse
import sys
from dataclasses import dataclass

import torch

from launch.cli import run
from vim_backbone import VisionMamba, named_config
from vim_backbone.block import Block
from vim_backbone.errors import UserError

FLOAT = 4
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Plan:
    """Bytes on one process, without activations, and what each optimiser step sends."""

    strategy: str
    parameters: float
    gradients: float
    optimizer: float
    sent: float

    @property
    def held(self) -> float:
        """All that stays between the passes."""
        return self.parameters + self.gradients + self.optimizer


def plan(model: torch.nn.Module, processes: int) -> list[Plan]:
    """The strategies, in the order of what they hold, for float32 parameters and AdamW.

    DeepSpeed keeps its own copy of the share of the parameters that it updates, counted with the optimizer. ZeRO-3
    holds one block whole beside its shards. Sent is what one process sends in ring collectives: gradients are
    reduced and parameters or gradients gathered, (n - 1) / n of the model each; ZeRO-3 gathers the parameters twice.
    """
    total = float(sum(p.numel() for p in model.parameters()) * FLOAT)
    trained = float(sum(p.numel() for p in model.parameters() if p.requires_grad) * FLOAT)
    block = max((sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Block)), default=0)
    n, hop = processes, (processes - 1) / processes * trained
    return [
        Plan("ddp", total, trained, 2 * trained, 2 * hop),
        Plan("zero1", total, trained, 3 * trained / n, 2 * hop),
        Plan("zero2", total, trained / n, 3 * trained / n, 2 * hop),
        Plan("zero3", total / n + block * FLOAT, trained / n, 3 * trained / n, 3 * hop),
    ]


def main(argv: list[str]) -> None:
    """Print the table and the first strategy that leaves `--activations` of the memory free."""
    parser = argparse.ArgumentParser(prog="launch/plan.py", description=__doc__)
    parser.add_argument("--model", default="vim_large", help="vim_tiny, vim_small, vim_base, vim_large or vim_huge")
    parser.add_argument("--image-size", type=int, default=224, help="side of the pictures, in pixels")
    parser.add_argument("--gpus", type=int, default=8, help="processes in all")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB (1e9 bytes) of each")
    parser.add_argument("--activations", type=float, default=0.6, help="share of the memory to leave for activations")
    options = parser.parse_args(argv)
    if options.gpus < 1 or options.gpu_memory <= 0 or not 0 <= options.activations < 1:
        raise UserError("gpus must be at least 1, gpu-memory positive, and activations in [0, 1)")
    config = named_config(options.model, img_size=options.image_size, num_classes=0, position="sincos")
    with torch.device("meta"):
        model = VisionMamba(config)
    plans = plan(model, options.gpus)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    rows, columns = config.grid(*config.img_size)
    say(f"{options.model}: {count:.1f} M parameters, {rows * columns} patches; GB of each of {options.gpus} processes")
    say(
        f"{'strategy':9}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'in all':>9}{'left':>9}{'sent a step':>13}"
    )
    for p in plans:
        sizes = (p.parameters, p.gradients, p.optimizer)
        cells = "".join(f"{size / 1e9:12.2f}" for size in sizes)
        left = options.gpu_memory - p.held / 1e9
        say(f"{p.strategy:9}{cells}{p.held / 1e9:9.2f}{left:9.2f}{p.sent / 1e9:13.2f}")
    limit = options.gpu_memory * (1 - options.activations) * 1e9
    fitting = next((p for p in plans if p.held <= limit), None)
    file = f"{fitting.strategy}.yaml" if fitting else "zero3_offload.yaml"
    if options.gpus == 1 and fitting:
        file = "gpu.yaml"
    size = f"--model.name {options.model} --model.depth null --model.patch_size null"
    say(
        f"\naccelerate launch --config_file launch/accelerate/{file} --num_processes {options.gpus} pretrain/main.py "
        f"{size} --model.img_size {options.image_size} --precision bf16"
    )


def say(line: str) -> None:
    """One line of the answer."""
    print(line)  # noqa: T201 - the command's result


if __name__ == "__main__":
    sys.exit(run(main))
