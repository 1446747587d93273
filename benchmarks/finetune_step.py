"""A step of each task of fine-tuning, training and inference, on large pictures: Vim beside a ViT in the same heads.

`python -m benchmarks.finetune_step` prints one table: pictures a second and peak memory above the idle model. All nets
have the same width, patches and heads; the ViT has half of Vim's blocks (timm's, with SDPA), as DeiT has of Vim. Each
case has a process of its own. On CPU it has one thread, and time is CPU time of that process, so that a busy machine
matters less. On a GPU (`--device cuda`) a step runs under bf16 autocast and its time is the wall's, `--compile` has
`torch.compile` as a launch with `--dynamo_backend inductor` has. `--processes` of them are prepared and compiled at a
time, and measured one after the other. `--out DIR` adds finetune_step.csv.
"""

import argparse
import itertools
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
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
NETS = ("vim", "pooled", "vit")
KINDS = ("training", "inference")
READY = "ready"
OBJECTS = 10
"""In a training picture of detection; in inference, 100 are found, whatever their scores."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["vim", "vit"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="picture sides in pixels")
    parser.add_argument("--model", default="vim_tiny")
    parser.add_argument("--depth", type=int, help="Vim's blocks; the model's own when not given")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="the model, as a launch with --dynamo_backend inductor")
    parser.add_argument("--processes", type=int, default=1, help="that are prepared at the same time")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each case, of which the median counts")
    parser.add_argument("--out", type=Path, help="folder for finetune_step.csv")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile and options.device == "cpu":
        parser.error("--compile needs --device cuda")
    return options


def config_of(net: str, size: int, options: argparse.Namespace, classes: int) -> VimConfig:
    """Vim of the size asked for, by either scan, or a ViT of its width and half its depth."""
    depth = options.depth or named_config(options.model).depth
    pooled = (
        {"scan": "pooled", "class_token": "none", "global_pool": "avg", "mixer_norm": True} if net == "pooled" else {}
    )
    blocks = depth // 2 if net == "vit" else depth
    return named_config(options.model, img_size=(size, size), depth=blocks, num_classes=classes, **pooled)


def build(task: str, net: str, size: int, options: argparse.Namespace) -> nn.Module:
    """The whole model of a task."""
    torch.manual_seed(0)
    with blocks_of("vit" if net == "vit" else "vim"):
        if task == "classification":
            return Classifier(config_of(net, size, options, CLASSES[task]))
        config = config_of(net, size, options, 0)
        if task == "segmentation":
            return Segmenter(config, SegmentationHead(), CLASSES[task])
        return Detector(config, DetectionHead(min_score=0.0), CLASSES[task])


def targets_of(task: str, size: int, batch: int, device: str) -> Any:
    """What a training step of so many pictures is given beside them."""
    draw = torch.Generator().manual_seed(0)
    if task == "classification":
        return torch.full((batch,), 3, device=device)
    if task == "segmentation":
        return torch.randint(CLASSES[task], (batch, size, size), generator=draw).to(device)
    corner = torch.rand(OBJECTS, 2, generator=draw) * 0.6 * size
    boxes = torch.cat([corner, corner + (0.05 + 0.3 * torch.rand(OBJECTS, 2, generator=draw)) * size], dim=1)
    masks = torch.zeros(OBJECTS, size, size, dtype=torch.uint8)
    for mask, (left, top, right, below) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:below, left:right] = 1
    labels = torch.randint(1, CLASSES[task] + 1, (OBJECTS,), generator=draw)
    target = {"boxes": boxes.to(device), "labels": labels.to(device), "masks": masks.to(device)}
    return [target] * batch


def now(device: str) -> float:
    """Seconds: of the CPU spent by this process, or the wall's once the GPU is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def step(model: nn.Module, images: Tensor, targets: Any) -> float:
    """Seconds of a forward pass, with targets of a forward and a backward one."""
    device = images.device.type
    start = now(device)
    with torch.set_grad_enabled(targets is not None):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = model(images) if targets is None else model(images, targets)
        if targets is not None:
            if isinstance(outputs, dict):
                outputs = torch.stack(list(outputs.values())).sum()
            outputs.backward()
            model.zero_grad(set_to_none=True)
    return now(device) - start


def print_case(task: str, net: str, size: int, train: bool, options: argparse.Namespace) -> None:
    """What the process of a case does: for all that is compiled and loaded once, a small step first.

    It says that it is ready, and measures when it is told to.
    """
    device, batch = options.device, options.batch
    torch.set_num_threads(1)

    def case(size: int) -> tuple[nn.Module, Tensor, Any]:
        model = build(task, net, size, options).train(train).to(device)
        images = torch.randn(batch, 3, size, size, device=device)
        return model, images, targets_of(task, size, batch, device) if train else None

    step(*case(64))
    model, images, targets = case(size)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    if device == "cuda":
        if options.compile:
            model.compile()
        for _ in range(3):
            step(model, images, targets)
        torch.cuda.empty_cache()
    print(READY, flush=True)
    sys.stdin.readline()
    if device == "cpu":
        idle = psutil.Process().memory_info().rss
        seconds = median(step(model, images, targets) for _ in range(options.rounds))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - idle
    else:
        step(model, images, targets)
        idle = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds = median(step(model, images, targets) for _ in range(options.rounds))
        peak = torch.cuda.max_memory_allocated() - idle
    print(seconds, peak / 1e6, parameters)


Case = tuple[str, int, str, str]
"""Task, pixels, kind of step, net."""


def measured(cases: list[Case]) -> Iterator[tuple[Case, list[float] | None]]:
    """Seconds, megabytes and million parameters of each case; None of one whose process failed."""
    processes = []
    for task, size, kind, net in cases:
        words = [sys.executable, "-m", "benchmarks.finetune_step", *sys.argv[1:], "--case", task, net, str(size), kind]
        processes.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert process.stdout
        while (line := process.stdout.readline()) and line.strip() != READY:
            pass
    for case, process in zip(cases, processes, strict=True):
        said = process.communicate("go\n" if process.poll() is None else None)[0].split()
        yield case, [float(word) for word in said[-3:]] if process.returncode == 0 else None


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
        "run": f"{options.model}, {depth} blocks, a ViT of {depth // 2}; batch {options.batch}, "
        f"{'float32' if options.device == 'cpu' else 'bf16, compiled' if options.compile else 'bf16'}; "
        f"{options.rounds} steps",
        "device": clock(options.device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print("\n".join(about.values()) + "\n")
    columns = ("task", "pixels", "step", "net", "M parameters", "pictures / s", "time / vim", "peak MB", "memory / vim")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    rows: list[dict[str, Any]] = []
    nets = [net for net in NETS if net in options.nets]
    cases: list[Case] = list(itertools.product(options.tasks, options.sizes, options.kinds, nets))
    base: dict[tuple[str, int, str], list[float]] = {}
    for start in range(0, len(cases), options.processes):
        for (task, size, kind, net), found in measured(cases[start : start + options.processes]):
            values: list[Any] = [task, size, kind, net]
            if found:
                seconds, megabytes, millions = found
                if net == "vim":
                    base[task, size, kind] = found
                vim = base.get((task, size, kind), [math.nan, math.nan])
                values += [round(millions, 1), float(f"{options.batch / seconds:.3g}"), round(seconds / vim[0], 2),
                           round(megabytes), round(megabytes / vim[1], 2)]  # fmt: skip
            values += ["failed"] * (len(columns) - len(values))
            rows.append(dict(zip(columns, values, strict=True)))
            print("| " + " | ".join(map(str, values)) + " |", flush=True)
    if options.out:
        write_csv(options.out / "finetune_step.csv", rows, about)


if __name__ == "__main__":
    main()
