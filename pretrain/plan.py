"""What fits and how fast it runs: memory of each strategy for a backbone, batch, speed, and the command to copy.

`python launch/plan.py --model vim_large --image-size 1024 --gpus 8 --gpu-memory 80`
"""

if not __package__:  # started as a file: import from this checkout, never from the folder of this file
    import sys
    from pathlib import Path

    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(_ROOT), str(_ROOT / "kernels")]

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all is imported ends this without a traceback

import argparse
import math
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter
from typing import get_args

import torch

from launch.planning.memory import Footprint, Share, Work, fitting, footprint, peak, shares
from launch.planning.speed import measured, seconds_a_picture
from launch.run.cli import parse, run
from pretrain.config import OBJECTIVES, PretrainConfig
from pretrain.objective import Objective
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.channels import Channels
from vim_backbone.errors import UserError, require
from vim_backbone.memory import LEVELS, Recompute

FULL_TOKENS = 2**14
"""Tokens that the encoder scans in a forward pass of the measured steps: with as many a GPU is busy."""

ANY_STEPS = 10**6
"""Steps of a run that is planned: as many as give every stage one."""


def options_of(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="launch/plan.py", description=__doc__)
    parser.add_argument("--model", default="vim_large", help="vim_tiny, vim_small, vim_base, vim_large or vim_huge")
    parser.add_argument("--image-size", type=int, default=224, help="side of the pictures, in pixels")
    parser.add_argument("--patch-size", type=int, default=None, help="side of a patch; the size's own if not given")
    parser.add_argument("--in-chans", type=int, default=3, help="bands of the pictures")
    text = "mixed: a patch of all bands is one token; tokens: of each band one"
    parser.add_argument("--channels", choices=get_args(Channels), default="mixed", help=text)
    parser.add_argument("--objective", choices=OBJECTIVES, default="mae", help="what is learned")
    for name, objectives in objectives_by_cost().items():
        kind = OBJECTIVES[objectives[0]]
        default = attrgetter(name)(kind())
        text = f"{kind.cost_fields[name]}; of objective {' and '.join(objectives)}, {default} if not given"
        kind_of = truth if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name.replace('.', '-')}", dest=name, type=kind_of, default=None, help=text)
    parser.add_argument("--batch-size", type=int, default=4096, help="pictures of a step on all GPUs together")
    text = "of the run, as its config has them, such as '[{until: 0.7, img_size: 224}, {}]'; the largest is planned"
    parser.add_argument("--stages", default=None, help=text)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the products")
    levels = (*LEVELS, "auto")
    text = "what the backward pass makes again, from fast to small; auto: the first with which the batch fits"
    parser.add_argument("--recompute", choices=levels, default="auto", help=text)
    text = "forward passes of a step; more are planned where memory asks for them"
    parser.add_argument("--accumulation", type=int, default=1, help=text)
    parser.add_argument("--gpus", type=int, default=8, help="processes in all")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB (1e9 bytes) of each")
    parser.add_argument("--reserve", type=float, default=0.1, help="share of it for CUDA, NCCL and fragmentation")
    parser.add_argument("--device", default="NVIDIA H200", help="whose rows of launch/planning/speeds.csv to use")
    options = parser.parse_args(argv)
    require(options.gpus >= 1, "gpus", options.gpus, "it must be at least 1")
    require(options.in_chans >= 1, "in-chans", options.in_chans, "it must be at least 1")
    require(options.gpu_memory > 0, "gpu-memory", options.gpu_memory, "it must be positive")
    require(0 <= options.reserve < 1, "reserve", options.reserve, "it must lie in [0, 1)")
    for name, objectives in objectives_by_cost().items():
        given = getattr(options, name)
        remedy = f"it is of objective {' and '.join(objectives)}, not of {options.objective}"
        require(given is None or options.objective in objectives, name.replace(".", "-"), given, remedy)
    require(options.accumulation >= 1, "accumulation", options.accumulation, "it must be at least 1")
    parts = options.gpus * options.accumulation
    passes = f" x {options.accumulation} forward passes" if options.accumulation > 1 else ""
    remedy = f"it must be a multiple of {options.gpus} GPUs{passes}"
    share = options.batch_size // parts
    require(share >= 1 and share * parts == options.batch_size, "batch-size", options.batch_size, remedy)
    return options


def objectives_by_cost() -> dict[str, list[str]]:
    """Fields that change what a step costs, with the objectives that have them."""
    objectives: dict[str, list[str]] = {}
    for objective, kind in OBJECTIVES.items():
        for name in kind.cost_fields:
            objectives.setdefault(name, []).append(objective)
    return objectives


def truth(text: str) -> bool:
    """The value of a yes-or-no option. Raises ValueError for anything but true and false."""
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def planned_footprints(
    config: VimConfig, objective: Objective, works: Iterable[Work], dtype: torch.dtype, backend: str = "triton"
) -> list[Footprint]:
    """Of the model that the objective builds, without its weights. Raises UserError where the backend is missing."""
    with torch.device("meta"):
        model = objective.build(VisionMamba(config))
    try:
        return [footprint(model, work, dtype, backend) for work in works]
    except RuntimeError as error:
        raise UserError(f"the kernels cannot say what they save: {error}") from error


def main(argv: list[str]) -> None:
    """Print the table, and the command of the first strategy that works on at least one picture at a time."""
    options = options_of(argv)
    levels: tuple[Recompute, ...] = LEVELS if options.recompute == "auto" else (options.recompute,)
    words = settings(options)
    config = parse(PretrainConfig, words, "launch/plan.py", "")
    objective, stages = config.method, config.by_stage()
    schedule = replace(config, accumulation=options.accumulation).schedule(ANY_STEPS, options.gpus, rank=0)
    largest = max(stages, key=lambda stage: stage.batch_size * math.prod(stage.architecture().img_size))
    architecture, pictures = largest.architecture(), schedule[stages.index(largest)].plan.micro_batch
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    works: dict[Recompute, Work] = {level: objective.work(architecture, dtype.itemsize, level) for level in levels}
    models = dict(zip(works, planned_footprints(config.architecture(), objective, works.values(), dtype), strict=True))
    model, work = models[levels[0]], works[levels[0]]
    rows, columns = architecture.grid(*architecture.img_size)
    patches = rows * columns * architecture.tokens_a_patch(architecture.in_chans)
    scanned = work.stacks[0].tokens - architecture.num_special
    print_line(
        f"{objective.title} of {options.model}: {model.parameters / 1e6:.1f} M parameters; of {patches} patches a "
        f"picture the encoder sees {scanned}"
    )
    if len(stages) > 1:
        size = " x ".join(map(str, architecture.img_size))
        print_line(f"planned is stage {stages.index(largest) + 1}, the largest: {largest.batch_size} pictures, {size}")
    saved = ", ".join(f"{level} {each.saved / 1e6:.1f}" for level, each in models.items())
    print_line(f"MB of activations a picture, by what the backward pass makes again: {saved}")
    print_line(f"GB of each of {options.gpus} processes; a batch is the pictures of one forward pass of one process:\n")
    header = ("strategy", "parameters", "gradients", "optimizer", "recompute", "batch", "activations", "peak", "sent")
    print_line("".join(f"{column:>13}" for column in header))
    memory = options.gpu_memory * 1e9 * (1 - options.reserve)
    common = math.gcd(*(stage.plan.micro_batch for stage in schedule))
    chosen = None
    for share in shares(model, options.gpus):
        level, batch = fastest(models, share, memory, pictures, work.stacks[0].tokens, common)
        most = peak(models[level], share, batch)
        sizes = (share.parameters, share.gradients, share.optimizer)
        cells = "".join(f"{size / 1e9:13.2f}" for size in sizes)
        tail = f"{batch * models[level].saved / 1e9:13.2f}{most / 1e9:13.2f}{share.sent / 1e9:13.2f}"
        print_line(f"{share.strategy:>13}{cells}{level:>13}{batch or 'none fits':>13}{tail}")
        if batch and chosen is None:
            chosen = share.strategy, level, batch
    strategy, level, batch = chosen or ("zero3_offload", levels[-1], 1)  # the one that holds the least on the GPU
    print_line("")
    for number, stage in enumerate(stages):
        of_stage = f"stage {number + 1}: " if len(stages) > 1 else ""
        print_line(of_stage + expected(stage, level, options))
    file = "gpu" if options.gpus == 1 and strategy == "ddp" else strategy
    print_line(
        f"\npython -m launch --config_file launch/accelerate/{file}.yaml --num_processes {options.gpus} "
        f"pretrain/main.py {shlex.join(words)} --model.recompute {level} "
        f"--accumulation {largest.batch_size // options.gpus // batch}"
    )


def expected(config: PretrainConfig, level: Recompute, options: argparse.Namespace) -> str:
    """A line on the speed of a run, or of one of its stages."""
    architecture = config.architecture()
    work = config.method.work(architecture, 2 if config.precision == "bf16" else 4, level)
    patches = math.prod(architecture.grid(*architecture.img_size)) * architecture.tokens_a_patch(architecture.in_chans)
    scanned = work.stacks[0].tokens
    beside = ", and without the teacher" if work.frozen else ""
    a_second = options.gpus / seconds_a_picture(work.stacks, measured(options.device))
    return (
        f"expected on {options.gpus} x {options.device}: {a_second:,.0f} pictures/s, {a_second * patches:,.0f} "
        f"patches/s, of which the encoder scans {a_second * (scanned - architecture.num_special):,.0f}; from what was "
        f"measured (launch/planning/speeds.csv), before communication and waiting for data{beside}"
    )


def fastest(
    models: dict[Recompute, Footprint],
    share: Share,
    memory: float,
    pictures: int,
    tokens: int,
    common: int | None = None,
) -> tuple[Recompute, int]:
    """What is made again, and the pictures of a forward pass; `models` by level, the fastest first.

    The first level with which all `pictures`, of so many `tokens`, fit. Where none does, passes are gathered in any
    case: the first level with which one of them fills a GPU, else the last. `common`: as of `micro_batch`.
    """
    batches: dict[Recompute, int] = {
        level: micro_batch(model, share, memory, pictures, common) for level, model in models.items()
    }
    for enough in (pictures, -(-FULL_TOKENS // tokens)):
        for level, batch in batches.items():
            if batch >= enough:
                return level, batch
    return batches.popitem()


def fitting_level(
    config: PretrainConfig, *, memory: float, processes: int, stage: int, pictures: int, reserve: float = 0.1
) -> Recompute:
    """The fastest level with which so many pictures of a forward pass fit, the last where none does.

    Args:
        memory: bytes of each device, of which the share `reserve` is left free.
        stage: of ZeRO; 0 for none.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    architecture, objective = config.architecture(), config.method
    works = [objective.work(architecture, dtype.itemsize, level) for level in LEVELS]
    models = planned_footprints(architecture, objective, works, dtype)
    share = shares(models[0], processes)[stage]
    for level, model in zip(LEVELS, models, strict=True):
        if peak(model, share, pictures) <= memory * (1 - reserve):
            return level
    return LEVELS[-1]


def remedy(config: PretrainConfig, *, memory: float, processes: int, stage: int, level: Recompute) -> str:
    """What to change where a process of this run was out of memory, in words that name the fields.

    Args:
        memory: bytes of each device, of which a tenth is left free.
        stage: of ZeRO; 0 for none.
        level: what of a block is made again in the run.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    objective = config.method
    stages = config.by_stage()
    largest = max(stages, key=lambda each: each.batch_size * math.prod(each.architecture().img_size))
    common = math.gcd(*(each.batch_size // processes for each in stages))
    architecture = largest.architecture()
    works: dict[Recompute, Work] = {each: objective.work(architecture, dtype.itemsize, each) for each in LEVELS}
    models = dict(zip(works, planned_footprints(architecture, objective, works.values(), dtype), strict=True))
    share = shares(models[level], processes)[stage]
    pictures = max(1, largest.batch_size // processes)
    now = max(1, pictures // config.accumulation)
    needed = peak(models[level], share, now)
    text = f"a forward pass of {now} pictures with model.recompute {level} is planned to take {needed / 1e9:.3g} GB"
    found, batch = fastest(models, share, 0.9 * memory, pictures, works[level].stacks[0].tokens, common)
    if needed <= 0.9 * memory:
        return f"{text}, which should fit into {memory / 1e9:.3g} GB: see what else is on the GPU, or lower batch_size"
    text += f" of {memory / 1e9:.3g} GB"
    if batch == 0 and fitting(models[found], share, 0.9 * memory):
        return f"{text}, and no accumulation that divides the batches of all stages fits: lower their batch_size"
    if batch == 0:
        return f"{text}, and no batch fits: launch with launch/accelerate/zero3.yaml, or lower model.img_size"
    return (
        f"{text}; what fits is --model.recompute {found} --accumulation {pictures // batch} ({batch} pictures), "
        "or a lower batch_size"
    )


def micro_batch(model: Footprint, share: Share, memory: float, pictures: int, common: int | None = None) -> int:
    """The largest divisor of the pictures of a process and step that fits into memory; 0 for none.

    The number of passes divides `common` too: what the pictures of all stages have in common.
    """
    most = min(pictures, fitting(model, share, memory))
    sizes = (size for size in range(most, 0, -1) if pictures % size == 0)
    return next((size for size in sizes if (common or pictures) % (pictures // size) == 0), 0)


def settings(options: argparse.Namespace) -> list[str]:
    """The command line of pretrain/main.py for what is planned."""
    fields = {
        "model.name": options.model,
        "model.depth": "null",
        "model.patch_size": options.patch_size or "null",
        "model.img_size": options.image_size,
        "batch_size": options.batch_size,
        "precision": options.precision,
    }
    if options.stages is not None:
        fields["stages"] = options.stages
    chosen = OBJECTIVES[options.objective]
    for name in chosen.cost_fields:
        given = getattr(options, name)
        fields[name] = attrgetter(name)(chosen()) if given is None else given
    if options.objective != "mae":
        fields["objective"] = options.objective
    if options.channels != "mixed":
        fields["model.channels"] = options.channels
    if options.in_chans != 3:
        fields["data.bands"] = f"[{','.join(map(str, range(options.in_chans)))}]"
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def print_line(line: str) -> None:
    """One line of the answer."""
    print(line)  # noqa: T201 - the command's result


if __name__ == "__main__":
    sys.exit(run(main))
