"""A whole Vim beside timm's DeiT of the same width: forward pass, or training step, at growing picture sizes.

`python -m benchmarks.backbone --sizes 224 512 1024 1248` prints one table a run; `--out DIR` adds a CSV and a plot.
Runs of all models alternate in one process, so that a busy machine slows all of them; times are medians. Ratios are
time / Vim's time: above 1, Vim is faster. The floor: "products" is what the matrix products take at the rate of a
large one; "G exp" counts the exponentials of scan or softmax. Memory is what the
allocator gave out at most at a time, above the idle model; compiled rows are compiled once more for it without CUDA
graphs, which take theirs from a pool of their own when they are recorded.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import psutil
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import clock, peak_allocated, product_rate, read_csv, versions, write_csv
from vim_backbone import VisionMamba
from vim_backbone.config import named_config
from vim_kernels import less_memory, use_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEIT = {"vim_tiny": "deit_tiny_patch16_224", "vim_small": "deit_small_patch16_224", "vim_base": "deit_base_patch16_224"}
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "eager": SDPBackend.MATH,
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=DEIT, default="vim_tiny")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512], help="picture sides in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: weights; in a training step, autocast")
    parser.add_argument("--train", action="store_true", help="forward and backward instead of the forward pass")
    parser.add_argument("--mask", type=float, default=0.0, help="train on what is left when this share is masked")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", help="of vim_kernels; by default what it picks for the device")
    parser.add_argument("--attention", nargs="+", help="DeiT's: sdpa (PyTorch picks), flash, cudnn, eager")
    parser.add_argument("--compile", action="store_true", help="also time both under torch.compile, with CUDA graphs")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--seconds", type=float, default=30.0, help="to measure for, each size; at least three rounds")
    parser.add_argument("--less-memory", action="store_true", help="Vim in more slices of the batch, forward only")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--kernels", type=int, default=0, metavar="COUNT", help="print that many kernels of a Vim run")
    parser.add_argument("--out", type=Path, help="folder for backbone.csv and backbone.png")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("CSV", "PNG"), help="only draw a table measured before")
    options = parser.parse_args()
    options.train |= options.mask > 0
    options.attention = options.attention or (["sdpa"] if options.device == "cpu" else ["flash", "cudnn", "eager"])
    return options


class Case:
    """One model at one picture size: `run()` is what is timed."""

    def __init__(self, name: str, options: argparse.Namespace, size: int, *, graphs: bool = True) -> None:
        torch.manual_seed(0)
        kind, *details = name.split()
        self.options, self.is_vim = options, kind == "vim"
        if self.is_vim:
            model: nn.Module = VisionMamba(named_config(options.model, img_size=(size, size)))
        else:
            model = timm.create_model(DEIT[options.model], img_size=size)
        dtype = DTYPES[options.dtype]
        self.model = model.to(options.device, torch.float32 if options.train else dtype).train(options.train)
        self.images = torch.randn(options.batch, 3, size, size).to(options.device, next(model.parameters()).dtype)
        patches = (size // 16) ** 2
        self.kept = torch.randperm(patches)[: round(patches * (1 - options.mask))].sort().values.to(options.device)
        self.attention = "sdpa" if self.is_vim else details[0]
        features = self._vim_features if self.is_vim else self._deit_features
        self.timed: Callable[[Tensor], Tensor] = features if options.train else self.model
        if "compiled" in details:
            mode = "reduce-overhead" if graphs and options.device == "cuda" else "default"
            self.timed = torch.compile(self.timed, mode=mode)

    def run(self) -> None:
        """A forward pass, or a forward and a backward one."""
        with self._context():
            if not self.options.train:
                with torch.no_grad():
                    self.timed(self.images)
            else:
                with torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.dtype == "bf16"):
                    loss = self.timed(self.images).float().square().mean()
                loss.backward()
                self.model.zero_grad(set_to_none=True)
        if self.options.device == "cuda":
            torch.cuda.synchronize()

    def _context(self) -> AbstractContextManager[Any]:
        if self.is_vim:
            contexts = ExitStack()
            if self.options.backend:
                contexts.enter_context(use_backend(self.options.backend))
            if self.options.less_memory:
                contexts.enter_context(less_memory())
            return contexts
        return nullcontext() if self.attention == "sdpa" else sdpa_kernel(ATTENTION[self.attention])

    def _vim_features(self, images: Tensor) -> Tensor:
        model = self.model
        assert isinstance(model, VisionMamba)
        return torch.cat(model.encode(model.embed_patches(images)[:, self.kept]), dim=1)

    def _deit_features(self, images: Tensor) -> Tensor:
        vit: Any = self.model
        tokens = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return vit.norm(vit.blocks(torch.cat([first, tokens[:, self.kept]], dim=1)))


def case_names(options: argparse.Namespace) -> list[str]:
    """The rows of a table."""
    names = ["vim", *(f"deit {attention}" for attention in options.attention)]
    return names + (["vim compiled", f"deit {options.attention[0]} compiled"] if options.compile else [])


def measure(cases: dict[str, Case], seconds: float) -> tuple[dict[str, list[float]], float]:
    """Seconds of every run of every case, and the share of all cores that other processes used meanwhile."""
    for case in cases.values():
        case.run()
        case.run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    start, cpu, busy = time.perf_counter(), time.process_time(), busy_seconds()
    while time.perf_counter() - start < seconds or len(times["vim"]) < 3:
        for name, case in cases.items():
            before = time.perf_counter()
            case.run()
            times[name].append(time.perf_counter() - before)
    others = busy_seconds() - busy - (time.process_time() - cpu)
    return times, max(0.0, others) / (time.perf_counter() - start) / (psutil.cpu_count() or 1)


def busy_seconds() -> float:
    """CPU time that all processes together have used."""
    spent = psutil.cpu_times()
    return sum(spent) - spent.idle - getattr(spent, "iowait", 0.0) - getattr(spent, "guest", 0.0)


def peak_megabytes(name: str, options: argparse.Namespace, size: int) -> float:
    """Peak memory of a run above what the model and the pictures take."""
    case = Case(name, options, size, graphs=False)
    case.run()
    if options.device == "cuda":
        idle = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.run()
        return (torch.cuda.max_memory_allocated() - idle) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        case.run()
    return peak_allocated(profiled) / 1e6


def costliest(case: Case, count: int) -> str:
    """Where the time of a run goes: on a GPU its kernels, on a CPU PyTorch's operations without what they call."""
    on_gpu = case.options.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        case.run()
    spent = [
        ((e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3, e.count, e.key)
        for e in profiled.key_averages()
    ]
    lines = [f"\n{sum(ms for ms, _, _ in spent):.2f} ms in {sum(calls for _, calls, _ in spent)} calls:"]
    lines += [f"{ms:9.3f} {calls:5d} {name[:100]}" for ms, calls, name in sorted(spent, reverse=True)[:count]]
    return "\n".join([*lines, ""])


def work(is_vim: bool, options: argparse.Namespace, size: int) -> tuple[float, float]:
    """Floating-point operations of the matrix products, and exponentials, of one run."""
    config = named_config(options.model)
    d, e, n, depth = config.d_model, config.d_inner, config.d_state, config.depth
    columns = -(-d // 16) + 2 * n
    tokens = round((size // 16) ** 2 * (1 - options.mask)) + 1
    if is_vim:
        products = tokens * (2 * d * 2 * e + 2 * 2 * e * columns + 2 * e * d)
        exponentials = 2 * tokens * e * n
    else:
        depth = 12
        products = tokens * (2 * 12 * d * d) + 4 * tokens * tokens * d
        exponentials = tokens * tokens * d // 64
    passes = 3 if options.train else 1
    return options.batch * depth * products * passes, options.batch * depth * exponentials * passes


def measure_size(options: argparse.Namespace, size: int, gemm_rate: float) -> list[dict[str, Any]]:
    """Print and return the rows of one picture size."""
    cases = {name: Case(name, options, size) for name in case_names(options)}
    times, others = measure(cases, options.seconds)
    kernels = costliest(cases.get("vim compiled", cases["vim"]), options.kernels) if options.kernels else ""
    del cases
    ours = median(times["vim"])
    rows = []
    for name, seconds in times.items():
        products, exponentials = work(name.startswith("vim"), options, size)
        row: dict[str, Any] = {
            "pixels": size,
            "model": name.replace("vim", options.model),
            "ms": round(1e3 * median(seconds), 2),
            "fastest ms": round(1e3 * min(seconds), 2),
            "time / vim": round(median(seconds) / ours, 2),
            "products ms": round(1e3 * products / gemm_rate, 2),
            "G exp": round(exponentials / 1e9, 2),
            "peak MB": "" if options.no_memory else round(peak_megabytes(name, options, size)),
            "rounds": len(seconds),
            "others' cores %": round(100 * others),
        }
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
        rows.append(row)
    print(kernels, end="", flush=True)
    return rows


def plot(table: Path, picture: Path) -> None:
    """The plot of a backbone.csv."""
    rows = read_csv(table)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for model in dict.fromkeys(row["model"] for row in rows):
        chosen = [row for row in rows if row["model"] == model]
        pixels = [int(row["pixels"]) for row in chosen]
        axes.plot(pixels, [float(row["ms"]) for row in chosen], marker="o", label=model)
    axes.set(xscale="log", yscale="log", xlabel="side of the picture in pixels", ylabel="ms")
    sides = sorted({int(row["pixels"]) for row in rows})
    axes.set_xticks(sides, map(str, sides), minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(axis="y", which="both", alpha=0.3)
    axes.set_title(f"{rows[0]['run']}\n{rows[0]['device']}", fontsize=8)
    axes.legend()
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.plot:
        plot(*options.plot)
        return
    what = f"training step, {options.mask:.0%} masked" if options.train else "forward pass"
    about = {
        "run": f"{what}, batch {options.batch}, {options.dtype}",
        "device": clock(options.device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    gemm_rate = product_rate(options.device, DTYPES[options.dtype])
    for value in about.values():
        print(value)
    print(f"matrix products at {gemm_rate / 1e9:.0f} GFLOP/s\n")
    columns = (
        "pixels",
        "model",
        "ms",
        "fastest ms",
        "time / vim",
        "products ms",
        "G exp",
        "peak MB",
        "rounds",
        "others' cores %",
    )
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    rows = []
    for size in options.sizes:
        rows += measure_size(options, size, gemm_rate)
        if options.out:  # after each size, for whoever stops it
            write_csv(options.out / "backbone.csv", rows, about)
            plot(options.out / "backbone.csv", options.out / "backbone.png")


if __name__ == "__main__":
    main()
