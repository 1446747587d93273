"""A masked-pretraining step of Vim beside one of a ViT: same width, patches, masks, decoder width and loss.

`python -m benchmarks.pretrain_step --cases vim_base:1024:16 vim_small:224:512` prints a row for Vim, for a ViT of half
the depth, which has about as many parameters, and for one of the same depth: median time of a step (forward, backward,
AdamW), pictures a second, peak memory with weights and optimizer, each beside Vim's (above 1: Vim is better).
`--out DIR` adds a CSV and a plot, `--kernels` where the time of a step goes. `--plot` draws a table measured before.

The floor of a Vim step, at the rates that this machine reaches: "products", the matrix products; "exp", an exponential
a token, channel, direction and state forward and one more backward; "bytes", what the ops of the blocks and AdamW read
and write where each reads its inputs and writes its outputs once. On a CPU the models take their steps in turn, so that
a busy machine slows all of them; on a GPU one after the other, each alone in its memory.
"""

import argparse
import gc
import re
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import (
    clock,
    copy_rate,
    exp_rate,
    peak_allocated,
    product_rate,
    read_csv,
    versions,
    write_csv,
)
from benchmarks.vit import blocks_of
from launch.run.optim import OptimConfig, build_optimizer
from launch.run.randomness import generator
from pretrain.mae.model import MaskedAutoencoder
from pretrain.masked import DecoderConfig, split_patches
from pretrain.masking import MaskConfig, draw_mask
from vim_backbone import VimConfig, VisionMamba, named_config
from vim_backbone.block import set_recompute
from vim_backbone.memory import LEVELS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NETS = ("vim", "vit, half depth", "vit, same depth")
GPU_CASES = ("vim_base:224:256", "vim_small:224:512", "vim_small:1024:32", "vim_base:1024:16", "vim_base:2048:4",
             "vim_small:2048:8")  # fmt: skip
CPU_CASES = ("vim_tiny:96:32:8:8",)
GROUPS = {
    "compiled elementwise": r"^triton_",
    "scan backward": r"tiled_backward|scan_backward",
    "scan": r"tiled_forward|scan_forward|chunk_state|carry_kernel|bidirectional_scan|selective_scan",
    "projections backward": r"projections_backward",
    "sums of the projections": r"projection_sums",
    "projections": r"projections_forward",
    "pooled scan, token by token": r"pooled_",
    "convolution backward": r"conv_backward",
    "convolution": r"conv_forward",
    "gate backward": r"gate_backward",
    "norm backward": r"add_rms_norm_backward",
    "norm": r"add_rms_norm",
    "sums of gradients": r"mixer_gradients",
    "weights laid out": r"weight_layout",
    "attention": r"flash|fmha|scaled_dot|attention",
    "optimizer": r"multi_tensor|[Aa]dam",
    "products": r"gemm|nvjet|cutlass|cublas|xmma|splitK|aten::(mm|addmm|bmm|linear)|mkldnn",
    "copies, elementwise": r"elementwise|Memcpy|Memset|copy_|reduce_kernel|CatArray|aten::",
}
"""Names of groups of kernels, on a CPU of operations, and what their members are called; the first that fits."""


class Case(NamedTuple):
    """What is trained on what."""

    model: str
    pixels: int
    batch: int
    patch: int | None = None
    depth: int | None = None
    scan: str = "full"

    @classmethod
    def read(cls, text: str) -> "Case":
        """From MODEL:PIXELS:BATCH[:PATCH[:DEPTH]]."""
        model, *numbers = text.split(":")
        return cls(model, *map(int, numbers))  # pyright: ignore[reportArgumentType] - scan is no number

    def config(self) -> VimConfig:
        """The encoder's."""
        own = {"patch_size": self.patch, "depth": self.depth}
        own = {name: value for name, value in own.items() if value is not None}
        if self.scan == "pooled":
            own |= {"scan": "pooled", "class_token": "none", "global_pool": "avg"}
        return named_config(self.model, img_size=(self.pixels, self.pixels), num_classes=0, position="sincos", **own)

    def __str__(self) -> str:
        scan = "" if self.scan == "full" else f", {self.scan} scan"
        return f"{self.model} {self.pixels} px, batch {self.batch}{scan}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Case.read, nargs="+", metavar="MODEL:PIXELS:BATCH[:PATCH[:DEPTH]]")
    parser.add_argument("--scan", choices=("full", "pooled"), default="full", help="Vim's, no norm before the gate")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--modes", nargs="+", choices=("plain", "compiled"), default=["plain"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the autocast; on a GPU bf16, else fp32 (none)")
    parser.add_argument("--decoder-width", type=int, help="512; 192, the default job's, where a CPU is given no cases")
    parser.add_argument("--mask", type=float, default=0.75, help="share of the patches that is hidden")
    parser.add_argument("--recompute", choices=LEVELS, default="inputs", help="what Vim's backward pass makes again")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each model")
    parser.add_argument("--kernels", action="store_true", help="print where the time of a step goes, by groups")
    parser.add_argument("--seconds", type=float, help="start no case after so many")
    parser.add_argument("--out", type=Path, help="folder for pretrain_step.csv, .png and, with --kernels, kernels.csv")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("CSV", "PNG"), help="only draw a table measured before")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.decoder_width = options.decoder_width or (512 if on_gpu or options.cases else 192)
    options.cases = options.cases or [Case.read(text) for text in (GPU_CASES if on_gpu else CPU_CASES)]
    options.cases = [case._replace(scan=options.scan) for case in options.cases]
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    return options


class Trainer:
    """A model with its optimizer and one fixed batch: `step()` is what is timed."""

    def __init__(self, net: str, case: Case, mode: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.options = options
        self.model = build(net, case, options.decoder_width).to(options.device)
        set_recompute(self.model, options.recompute)
        self.optimizer = build_optimizer(self.model, OptimConfig(), case.batch)
        self.images = torch.randn(case.batch, 3, case.pixels, case.pixels, generator=generator(0)).to(options.device)
        config = case.config()
        grid, mask = config.grid(*config.img_size), MaskConfig(ratio=options.mask)
        masks = torch.stack([draw_mask(grid, mask, generator(i)) for i in range(case.batch)])
        visible, hidden, _ = split_patches(masks)
        self.patches = (visible.to(options.device), hidden.to(options.device))
        self.loss: Callable[..., Any] = self.model
        if mode == "compiled":
            kind = "reduce-overhead" if options.device == "cuda" else "default"
            self.loss = torch.compile(self.model, mode=kind)

    def step(self) -> None:
        """Forward, backward, AdamW."""
        low = self.options.dtype == "bf16"
        with torch.autocast(self.options.device, torch.bfloat16) if low else nullcontext():
            loss = self.loss(self.images, *self.patches)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def milliseconds(self) -> float:
        """Of one step; on a GPU by its own clock."""
        if self.options.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()  # pyright: ignore[reportCallIssue] - its stub wants a stream
            self.step()
            end.record()  # pyright: ignore[reportCallIssue]
            end.synchronize()
            return start.elapsed_time(end)
        begun = time.perf_counter()
        self.step()
        return 1e3 * (time.perf_counter() - begun)


def build(net: str, case: Case, decoder_width: int) -> nn.Module:
    """The autoencoder of a row: a ViT has timm's blocks in the place of Vim's."""
    config = case.config()
    if net == "vit, half depth":
        config = VimConfig.from_dict(config.to_dict() | {"depth": config.depth // 2})
    with blocks_of(net.split(",")[0]):
        return MaskedAutoencoder(VisionMamba(config), DecoderConfig(width=decoder_width))


def warm_up(trainer: Trainer) -> float:
    """Take the first steps, which compile, and return the most GB that are held at a time."""
    on_gpu = trainer.options.device == "cuda"
    for _ in range(4 if on_gpu else 1):
        trainer.step()
    if on_gpu:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9
    states = [t for state in trainer.optimizer.state.values() for t in state.values()]
    held = sum(t.nbytes for t in (*trainer.model.parameters(), *states, trainer.images))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.step()
    return (held + peak_allocated(profiled)) / 1e9


def measure(case: Case, mode: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one case in one mode, without ratios, and Vim's kernels if they are asked for."""
    found: dict[str, dict[str, Any]] = {}
    kernels: list[dict[str, Any]] = []
    turns = [[net] for net in options.nets] if options.device == "cuda" else [list(options.nets)]
    for nets in turns:
        clear(options.device)
        trainers = {net: Trainer(net, case, mode, options) for net in nets}
        memory = {net: warm_up(trainer) for net, trainer in trainers.items()}
        times: dict[str, list[float]] = {net: [] for net in nets}
        for _ in range(options.steps):
            for net, trainer in trainers.items():
                times[net].append(trainer.milliseconds())
        for net in nets:
            trainer = trainers.pop(net)
            millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
            ms = median(times[net])
            found[net] = {
                "M parameters": round(millions, 1), "ms": ms, "fastest ms": min(times[net]),
                "pictures/s": case.batch / ms * 1e3, "GB": memory[net],
            }  # fmt: skip
            if options.kernels:
                kernels += [{"case": str(case), "mode": mode, "model": net, **row} for row in profiled_step(trainer)]
            del trainer
    return [{"case": str(case), "mode": mode, "model": net, **row} for net, row in found.items()], kernels


def clear(device: str) -> None:
    """Give back what the last model took."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profiled_step(trainer: Trainer) -> list[dict[str, Any]]:
    """Kernels of a step by group, on a CPU PyTorch's operations without what they call: ms, how many, most ms first."""
    on_gpu = trainer.options.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        trainer.step()
        if on_gpu:
            torch.cuda.synchronize()
    spent = [
        (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3, event.count)
        for event in profiled.key_averages()
    ]
    return grouped(spent)


def grouped(spent: list[tuple[str, float, int]]) -> list[dict[str, Any]]:
    """(name, ms, launches) of kernels -> rows of groups, most ms first, the sum of all last.

    A kernel of no group has a row of its own where it takes a hundredth of the time.
    """
    whole = sum(ms for _, ms, _ in spent)
    groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for name, ms, launches in spent:
        own = name[:60] if ms > whole / 100 else "other"
        group = next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), own)
        for key in (group, "all"):
            groups[key][0] += ms
            groups[key][1] += launches
    rows = sorted(groups.items(), key=lambda item: (item[0] == "all", -item[1][0]))
    return [{"kernels": group, "ms": round(ms, 3), "launches": int(launches)} for group, (ms, launches) in rows]


FLOOR, UNITS = ("products", "exp", "bytes"), ("FLOP", "", "B")


class Work(NamedTuple):
    """What a Vim step has to do at least."""

    flop: float
    exponentials: float
    bytes: float


def work_of(case: Case, options: argparse.Namespace) -> Work:
    """Of the blocks of encoder and decoder, and of AdamW; see the top of the file."""
    config, item = case.config(), DTYPES[options.dtype].itemsize
    rows, columns = config.grid(*config.img_size)
    patches, special = rows * columns, config.num_registers + (config.class_token != "none")
    seen = patches - MaskConfig(ratio=options.mask).num_masked(patches)
    decoder = VimConfig(d_model=options.decoder_width, depth=2)
    lines = (rows + columns) / 2
    total = Work(0.0, 0.0, 28.0 * sum(p.numel() for p in build("vim", case, options.decoder_width).parameters()))
    for size, length, depth in ((config, seen, config.depth), (decoder, patches, DecoderConfig().depth)):
        d, e, n, r = size.d_model, size.d_inner, size.d_state, size.dt_rank or 0
        pooled = config.scan == "pooled"
        scanned = min(1.0, lines / length) if pooled else 1.0  # share of the tokens
        products = 2 * d * 2 * e + scanned * 2 * 2 * e * (2 * r + 2 * n) + 2 * e * d
        saved = 2 * 4 * n * e / 32 + item * e  # states every 32 tokens, the sum before the gate
        moved = {
            "norm": 2 * (item + 4) * d + (item + 3 * 4) * d,
            "in_proj": item * (d + 2 * e) + item * (2 * e + 2 * d),
            "scan": item * 12 * e if pooled else item * 3 * e + saved + item * 5 * e + saved,
            "out_proj": item * (e + d) + item * (d + 2 * e),
        }
        tokens = case.batch * (length + special) * depth
        flop, exponentials, moved_all = (
            3 * products * tokens,
            (2 * 2 * n * scanned + 10 * pooled) * e * tokens,
            sum(moved.values()) * tokens,
        )
        total = Work(total.flop + flop, total.exponentials + exponentials, total.bytes + moved_all)
    return total


def beside_vim(rows: list[dict[str, Any]], floor: dict[str, float]) -> list[dict[str, Any]]:
    """Rounded rows with ratios to Vim's, and the floor in Vim's own."""
    vim = next((row for row in rows if row["model"] == "vim"), None)
    finished = []
    for row in rows:
        ratios = {"time / vim": row["ms"] / vim["ms"], "GB / vim": row["GB"] / vim["GB"]} if vim else {}
        shown = row | ratios | (floor if row is vim else dict.fromkeys(floor, ""))
        finished.append({key: _rounded(value) for key, value in shown.items()})
    return finished


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def plot(table: Path, picture: Path) -> None:
    """Bars of the time and the memory of every model beside Vim's, by case and mode."""
    rows = read_csv(table)
    cases = list(dict.fromkeys((row["case"], row["mode"]) for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows if row["model"] != "vim"))
    figure, axes = plt.subplots(2, 1, figsize=(1.5 + 1.3 * len(cases), 6), layout="constrained", sharex=True)
    for axis, what in zip(axes, ("time / vim", "GB / vim"), strict=True):
        for i, model in enumerate(models):
            values = {(row["case"], row["mode"]): float(row[what]) for row in rows if row["model"] == model}
            places = [place + (i - (len(models) - 1) / 2) * 0.35 for place in range(len(cases))]
            bars = axis.bar(places, [values.get(case, 0.0) for case in cases], 0.35, label=model)
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_ylabel({"time / vim": "time / Vim's", "GB / vim": "peak memory / Vim's"}[what])
    names = ["\n".join((*case.split(", "), mode)) for case, mode in cases]
    axes[1].set_xticks(range(len(cases)), names, fontsize=7)
    axes[0].legend(fontsize=8)
    axes[0].set_title(f"{rows[0]['run']}\n{rows[0]['device']}", fontsize=8)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def print_table(rows: list[dict[str, Any]]) -> None:
    """As Markdown."""
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print(flush=True)


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.plot:
        plot(*options.plot)
        return
    torch.set_float32_matmul_precision("high")
    dtype = DTYPES[options.dtype]
    rates = Work(product_rate(options.device, dtype), exp_rate(options.device), copy_rate(options.device))
    about = {
        "run": f"training step, {options.dtype}, {options.mask:.0%} hidden, decoder {options.decoder_width} x 2"
        + f", made again: {options.recompute}",
        "device": clock(options.device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(*about.values(), sep="\n")
    print(
        f"products {rates.flop:.3g} FLOP/s, exponentials {rates.exponentials:.3g}/s, copy {rates.bytes:.3g} bytes/s\n"
    )
    rows: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    begun = time.perf_counter()
    for case in options.cases:
        if options.seconds and time.perf_counter() - begun > options.seconds:
            print(f"{case}: not measured, {options.seconds:.0f} seconds are over")
            continue
        work = work_of(case, options)
        floor = {f"{name} ms": 1e3 * amount / rate for name, amount, rate in zip(FLOOR, work, rates, strict=True)}
        for mode in options.modes:
            measured, spent = measure(case, mode, options)
            measured = beside_vim(measured, floor)
            print_table(measured)
            if spent:
                print_table(spent)
            rows += measured
            kernels += spent
            if options.out:  # after each case, for whoever stops it
                write_csv(options.out / "pretrain_step.csv", rows, about)
                plot(options.out / "pretrain_step.csv", options.out / "pretrain_step.png")
                if kernels:
                    write_csv(options.out / "kernels.csv", kernels, about)


if __name__ == "__main__":
    main()
