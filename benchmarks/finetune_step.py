"""A step of each task of fine-tuning, training and inference, on large pictures: Vim beside a ViT in the same heads.

`python -m benchmarks.finetune_step` prints one table: pictures a second and peak memory above the idle model. Both nets
have the same width, patches and heads; the ViT has half of Vim's blocks (timm's, with SDPA), as DeiT has of Vim. Each
case has a process of its own with one thread, and time is CPU time of that process, so that a busy machine matters
less. `--out DIR` adds finetune_step.csv.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from benchmarks.machine import clock, versions, write_csv
from benchmarks.vit import blocks_of
from finetune.classification.model import Classifier
from finetune.detection.config import DetectionHead
from finetune.detection.model import Detector
from finetune.segmentation.config import SegmentationHead
from finetune.segmentation.model import Segmenter
from vim_backbone import VimConfig, named_config

CLASSES = {"classification": 1000, "segmentation": 150, "detection": 80}
OBJECTS = 10
"""In a training picture of detection; in inference, 100 are found, whatever their scores."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="picture sides in pixels")
    parser.add_argument("--model", default="vim_tiny")
    parser.add_argument("--depth", type=int, help="Vim's blocks; the model's own when not given")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each case, of which the median counts")
    parser.add_argument("--out", type=Path, help="folder for finetune_step.csv")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def config_of(net: str, size: int, options: argparse.Namespace, classes: int) -> VimConfig:
    """Vim of the size asked for, or a ViT of its width and half its depth."""
    depth = options.depth or named_config(options.model).depth
    return named_config(
        options.model, img_size=(size, size), depth=depth if net == "vim" else depth // 2, num_classes=classes
    )


def build(task: str, net: str, size: int, options: argparse.Namespace) -> nn.Module:
    """The whole model of a task."""
    torch.manual_seed(0)
    with blocks_of(net):
        if task == "classification":
            return Classifier(config_of(net, size, options, CLASSES[task]))
        config = config_of(net, size, options, 0)
        if task == "segmentation":
            return Segmenter(config, SegmentationHead(), CLASSES[task])
        return Detector(config, DetectionHead(min_score=0.0), CLASSES[task])


def targets_of(task: str, size: int) -> Any:
    """What a training step of one picture is given beside it."""
    draw = torch.Generator().manual_seed(0)
    if task == "classification":
        return torch.tensor([3])
    if task == "segmentation":
        return torch.randint(CLASSES[task], (1, size, size), generator=draw)
    corner = torch.rand(OBJECTS, 2, generator=draw) * 0.6 * size
    boxes = torch.cat([corner, corner + (0.05 + 0.3 * torch.rand(OBJECTS, 2, generator=draw)) * size], dim=1)
    masks = torch.zeros(OBJECTS, size, size, dtype=torch.uint8)
    for mask, (left, top, right, below) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:below, left:right] = 1
    labels = torch.randint(1, CLASSES[task] + 1, (OBJECTS,), generator=draw)
    return [{"boxes": boxes, "labels": labels, "masks": masks}]


def step(model: nn.Module, images: Tensor, targets: Any) -> float:
    """CPU seconds of a forward pass, with targets of a forward and a backward one."""
    start = time.process_time()
    with torch.set_grad_enabled(targets is not None):
        outputs = model(images) if targets is None else model(images, targets)
        if targets is not None:
            loss = torch.stack(list(outputs.values())).sum() if isinstance(outputs, dict) else outputs
            loss.backward()
            model.zero_grad(set_to_none=True)
    return time.process_time() - start


def print_case(task: str, net: str, size: int, train: bool, options: argparse.Namespace) -> None:
    """What the process of a case does: a small step first, for all that is compiled and loaded once."""
    torch.set_num_threads(1)
    step(build(task, net, 64, options).train(train), torch.randn(1, 3, 64, 64), targets_of(task, 64) if train else None)
    model = build(task, net, size, options).train(train)
    images, targets = torch.randn(1, 3, size, size), targets_of(task, size) if train else None
    idle = psutil.Process().memory_info().rss
    seconds = median(step(model, images, targets) for _ in range(options.rounds))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - idle
    print(seconds, peak / 1e6, sum(p.numel() for p in model.parameters()) / 1e6)


def measured(task: str, net: str, size: int, kind: str) -> tuple[float, float, float]:
    """Seconds, megabytes and million parameters of a case."""
    command = [sys.executable, "-m", "benchmarks.finetune_step", *sys.argv[1:], "--case", task, net, str(size), kind]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes, millions = map(float, process.stdout.split()[-3:])
    return seconds, megabytes, millions


def main() -> None:
    """Measure all cases, and print."""
    options = parse_options()
    if options.case:
        task, net, size, kind = options.case
        print_case(task, net, int(size), kind == "training", options)
        return
    torch.set_num_threads(1)
    depth = config_of("vim", 512, options, 0).depth
    about = {
        "run": f"{options.model}, {depth} blocks, a ViT of {depth // 2}; batch 1, float32; {options.rounds} steps",
        "device": clock("cpu"),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print("\n".join(about.values()) + "\n")
    columns = ("task", "pixels", "step", "net", "M parameters", "pictures / s", "time / vim", "peak MB", "memory / vim")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    rows: list[dict[str, Any]] = []
    for task, size, kind in [
        (t, s, k) for t in options.tasks for s in options.sizes for k in ("training", "inference")
    ]:
        base: tuple[float, float] | None = None
        for net in ("vim", "vit"):
            seconds, megabytes, millions = measured(task, net, size, kind)
            base = base or (seconds, megabytes)
            values = (task, size, kind, net, round(millions, 1), float(f"{1 / seconds:.3g}"),
                      round(seconds / base[0], 2), round(megabytes), round(megabytes / base[1], 2))  # fmt: skip
            rows.append(dict(zip(columns, values, strict=True)))
            print("| " + " | ".join(map(str, values)) + " |", flush=True)
    if options.out:
        write_csv(options.out / "finetune_step.csv", rows, about)


if __name__ == "__main__":
    main()
