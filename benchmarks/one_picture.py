"""One picture as one sequence, from a thousand tokens to millions: time, memory, and the slope of cost against tokens.

On a GPU, all of it, each row printed as it is made, CSV and plot written after each:

    python -m benchmarks.one_picture --seconds 240 --out one_picture
    python -m benchmarks.one_picture --seconds 100 --model vim_small --nets row compiled --sizes 8192 16384 19968
    python -m benchmarks.one_picture --train 8192 16384 --seconds 240 --out one_picture
    python -m benchmarks.one_picture --check 1557504 4194304
    torchrun --nproc_per_node 2 -m benchmarks.one_picture --ranks --seconds 120 --sizes 8192 16384 19968

Nets: "row" is the whole picture as one sequence through a Vim, "sliced" the same in slices of `--slice` tokens, for
less memory (`vim_backbone.block.set_slices`), "compiled" the first under torch.compile, "tiles" the same Vim on the
picture cut into tiles of `--tile` pixels, which know nothing of each other, and "vit" a ViT of the same width and half
as many blocks (as many parameters) on the whole sequence, by flash attention. Pixels are random, a window of them made
once: each is embedded by window (vim_backbone/windows.py), so that no whole picture is ever there; of tiles one is
embedded for each batch. Memory is all that was allocated at most, on a GPU with the weights of all nets. The slope is
that of the logarithms of ms and tokens, from the row before: 1 is linear, 2 is square. A case is left out that, by the
slope of its net, would take longer than `--cap`.

Under torchrun `--ranks` measures one sequence over all processes (vim_backbone/stretch.py), each with as many rows of
patches, beside the row that each process takes by itself: ms of the slowest, GB of the first, and as "error" the
largest difference of patches from those of the row, over their largest value. A process that is out of memory amid
their exchange ends all, with the rows before it written.

`--train` takes masked training steps (forward, backward, AdamW) in place of forward passes, full and pooled, at the
levels of `model.recompute` in `--levels`; what does not fit in the memory says so. `--check` compares rows of so many
tokens, packed between two short ones, with a reference in float64 (benchmarks/long_rows.py): every token, of a few
channels.
"""

import argparse
import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.long_rows import packed_row_errors
from benchmarks.machine import clock, peak_allocated, read_csv, versions, write_csv
from benchmarks.pretrain_step import Case, Trainer, grouped
from benchmarks.vit import blocks_of
from vim_backbone import VimConfig, VisionMamba, named_config
from vim_backbone.block import set_slices
from vim_backbone.memory import LEVELS
from vim_backbone.sequence_parallel import encode_stretch, rows_of
from vim_backbone.stretch import Stretch
from vim_backbone.windows import Window, embed_by_window

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NETS = ("row", "sliced", "compiled", "tiles", "vit")
GPU_SIZES = (512, 1024, 2048, 4096, 8192, 12288, 16384, 19968, 24576, 32768)
CPU_SIZES = (512, 1024, 2048)
WINDOW = {"cpu": 32, "cuda": 256}
"""Side of a window, in patches."""
TILE_TOKENS = 2**17
"""Tokens of the tiles that are taken at a time."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_tiny", help="vim_tiny, vim_small, ...")
    parser.add_argument("--depth", type=int, help="blocks, for a try")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides in pixels; 512 to 32768 on a GPU")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["row", "sliced", "tiles", "vit"])
    parser.add_argument("--scan", choices=("full", "pooled"), default="full")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights, in training of the autocast; bf16 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tile", type=int, default=1024, help="side of a tile in pixels")
    parser.add_argument("--slice", type=int, default=2**17, help="tokens of a slice")
    parser.add_argument("--each", type=float, default=1.0, help="seconds to measure a case for")
    parser.add_argument("--cap", type=float, default=12.0, help="leave out a case that would take so many a run")
    parser.add_argument("--seconds", type=float, help="start no case after so many")
    parser.add_argument("--compile", action="store_true", help="add the net 'compiled'")
    parser.add_argument("--ranks", action="store_true", help="one sequence over the processes of torchrun")
    parser.add_argument("--kernels", action="store_true", help="print where the time of the largest row goes")
    parser.add_argument("--train", type=int, nargs="+", metavar="SIZE", help="training steps at these sides instead")
    parser.add_argument("--scans", nargs="+", choices=("full", "pooled"), default=["full", "pooled"], help="of --train")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS[1:]), help="of --train")
    parser.add_argument("--decoder-width", type=int, default=512, help="of --train")
    parser.add_argument("--mask", type=float, default=0.75, help="of --train: share of the patches that is hidden")
    parser.add_argument("--check", type=int, nargs="+", metavar="TOKENS", help="compare values instead")
    parser.add_argument("--out", type=Path, help="folder for one_picture.csv, or _train.csv, and the plot")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("CSV", "PNG"), help="only draw a table measured before")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.sizes = sorted(options.sizes or (GPU_SIZES if on_gpu else CPU_SIZES))
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    if options.ranks:
        options.nets = ["row", "ranks"]
    options.nets += ["compiled"] if options.compile and "compiled" not in options.nets else []
    return options


class Net:
    """A net of a row: `run(size)` takes a whole picture through it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.name, self.options = name, options
        config = named_config(options.model, num_classes=0).to_dict()
        if options.scan == "pooled" and name != "vit":
            config |= {"scan": "pooled", "class_token": "none", "global_pool": "avg"}
        depth = options.depth or config["depth"]
        config["depth"] = max(1, depth // 2) if name == "vit" else depth
        with blocks_of("vit" if name == "vit" else "vim"):
            self.model = VisionMamba(VimConfig.from_dict(config)).eval()
        self.model.to(options.device, DTYPES[options.dtype])
        self.window = WINDOW[options.device]
        side = self.window * self.model.config.stride
        self.pixels = torch.randn(1, 3, side, side).to(self.model.pos_embed)
        self.shifted = 0, self.pixels
        self.encode: Callable[..., tuple[Tensor, Tensor]] = self.model.encode
        set_slices(self.model, options.slice if name == "sliced" else None)
        if name == "compiled":
            torch._dynamo.config.recompile_limit = max(8, len(options.sizes))
            self.encode = torch.compile(self.model.encode, dynamic=False)

    @torch.inference_mode()
    def run(self, size: int) -> Tensor:
        """Patches (tiles, l, d_model) of a picture of this side in pixels; of tiles those of the last ones."""
        if self.name == "ranks":
            return self.of_stretch(size)
        if self.name != "tiles":
            return self.features(size, 1)
        tile = self.options.tile
        grid = self.model.config.grid(tile, tile)
        left, most = (-(-size // tile)) ** 2, max(1, TILE_TOKENS // math.prod(grid))
        features = self.pixels
        while left > 0:
            features = self.features(tile, min(left, most))
            left -= most
        return features

    def features(self, size: int, pictures: int) -> Tensor:
        """Patches (pictures, l, d_model), each picture embedded by window."""
        config = self.model.config
        grid = config.grid(size, size)
        tokens = [embed_by_window(self.model, grid, self.read, self.window).expand(pictures, -1, -1)]
        lines = None
        if config.scan == "pooled":
            lines = self.model.lines(torch.empty(pictures, 3, 1, 1, device=tokens[0].device).expand(-1, -1, size, size))
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.options.device == "cuda" else nullcontext()
        with flash:
            return self.encode(tokens.pop(), lines=lines)[1]

    def of_stretch(self, size: int) -> Tensor:
        """Patches (1, l, d_model) that this process holds of a picture."""
        grid, rank, processes = self.model.config.grid(size, size), dist.get_rank(), dist.get_world_size()
        rows = [rows_of(grid, each, processes) for each in range(processes)]
        stretch = Stretch(tuple(len(own) * grid[1] for own in rows), rank)
        try:
            tokens = [embed_by_window(self.model, grid, self.read, self.window, rows[rank])]
            return encode_stretch(self.model, tokens.pop(), stretch)[1]
        except torch.OutOfMemoryError:  # the others wait for it, at a place that no exchange with them would meet
            print(f"ranks at {size} px: out of memory on process {rank}, which ends all", file=sys.stderr, flush=True)
            os._exit(1)

    def read(self, window: Window) -> Tensor:
        """What a window holds of a picture that repeats, down and to the right; windows begin a whole side apart."""
        left, top, right, bottom = window.pixels(self.model.config)
        shift = top % self.pixels.shape[2]
        if shift != self.shifted[0]:  # a process's rows need not begin where a window of the whole picture does
            self.shifted = shift, self.pixels.roll(-shift, 2)
        return self.shifted[1][:, :, : bottom - top, : right - left]


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one run, where there are several processes of the slowest.

    Raises torch.OutOfMemoryError on all processes where one is out of memory.
    """
    if dist.is_initialized():
        dist.barrier()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    failure: torch.OutOfMemoryError | None = None
    try:
        run()
    except torch.OutOfMemoryError as error:
        failure = torch.OutOfMemoryError(str(error))  # without what holds the memory
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = slowest(math.inf if failure else time.perf_counter() - start, device)
    if seconds == math.inf:
        raise failure or torch.OutOfMemoryError("on another process")
    return seconds


def slowest(value: float, device: str) -> float:
    """The largest of all processes, which then decide alike."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def clear(device: str) -> None:
    """Give back what the last case took."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(run: Callable[[], object], options: argparse.Namespace) -> dict[str, Any]:
    """Median and fastest ms, GB at most, and how many runs; a run before warms up. A long one is measured once."""
    clear(options.device)
    timed(run, options.device)
    times: list[float] = []
    while sum(times) < options.each or (len(times) < 2 and sum(times) < 3):
        times.append(timed(run, options.device))
    if options.device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
        memory = peak_allocated(profiled)
    return {
        "ms": _rounded(1e3 * median(times)), "fastest ms": _rounded(1e3 * min(times)), "GB": _rounded(memory / 1e9),
        "runs": len(times),
    }  # fmt: skip


def forward_rows(options: argparse.Namespace, late: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """A row for every net and size, size by size."""
    nets = {name: Net(name, options) for name in options.nets}
    before: dict[str, dict[str, Any]] = {}
    for size in options.sizes:
        for name, net in nets.items():
            tokens = math.prod(net.model.config.grid(size, size)) + net.model.num_prefix_tokens
            last = before.get(name)
            if late() or (last and expected_seconds(last, tokens, 2.0 if name == "vit" else 1.0) > options.cap):
                continue
            if (name == "tiles" and size <= options.tile) or (name == "sliced" and tokens <= options.slice):
                continue
            row = {"net": name, "model": options.model, "scan": options.scan, "pixels": size, "tokens": tokens}
            try:
                row |= measure(functools.partial(net.run, size), options)
            except torch.OutOfMemoryError:
                if not dist.is_initialized() or dist.get_rank() == 0:
                    print(f"{name} at {size} px: out of memory", flush=True)
                continue
            row["M tokens/s"] = _rounded(tokens / row["ms"] / 1e3)
            row["slope"] = _rounded(slope(last, row)) if last else ""
            if name == "ranks":
                alone = before.get("row", {"pixels": 0})
                both = alone["pixels"] == size
                row["times row"] = _rounded(alone["ms"] / row["ms"]) if both else ""
                row["error"] = _rounded(stretch_error(nets, size, options.device)) if both else ""
            elif options.ranks:
                row["times row"] = row["error"] = ""
            before[name] = row
            yield row
    for name in ("row", "ranks") if options.kernels else ():
        if name in before:
            print(f"\nkernels of {name}")
            print_kernels(functools.partial(nets[name].run, before[name]["pixels"]), options.device)


def stretch_error(nets: dict[str, Net], size: int, device: str) -> float:
    """Largest difference of what all processes make of a picture from what one makes, over its largest value."""
    clear(device)
    part = nets["ranks"].run(size)
    grid = nets["row"].model.config.grid(size, size)
    rows = rows_of(grid, dist.get_rank(), dist.get_world_size())
    try:
        whole = nets["row"].run(size)
        here = whole[:, rows.start * grid[1] : rows.stop * grid[1]]
        error = ((part.float() - here).abs().amax() / whole.abs().amax()).item()
    except torch.OutOfMemoryError:  # the others wait for what it has to say
        error = math.inf
    return slowest(error, device)


def expected_seconds(last: dict[str, Any], tokens: int, power: float) -> float:
    """Of a run on more tokens than the last one had."""
    return last["ms"] / 1e3 * (tokens / last["tokens"]) ** power


def slope(last: dict[str, Any], row: dict[str, Any]) -> float:
    """Of the logarithms of ms and tokens."""
    return math.log(row["ms"] / last["ms"]) / math.log(row["tokens"] / last["tokens"])


def print_kernels(run: Callable[[], object], device: str) -> None:
    """Where the time goes, by groups of kernels, of the first process. For all processes."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        timed(run, device)
    events = profiled.key_averages() if not dist.is_initialized() or dist.get_rank() == 0 else []
    for row in grouped(
        [(e.key, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3, e.count) for e in events]
    ):
        print(f"{row['ms']:10.3f} ms {row['launches']:6d}  {row['kernels']}", flush=True)


def train_rows(options: argparse.Namespace, late: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """A row for every size, scan and level of recomputing."""
    for size in sorted(options.train):
        for scan in options.scans:
            for level in options.levels:
                if late():
                    return
                case = Case(options.model, size, 1, depth=options.depth, scan=scan)
                row: dict[str, Any] = {
                    "net": f"step, {scan}", "model": options.model, "pixels": size, "tokens": (size // 16) ** 2,
                    "made again": level,
                }  # fmt: skip
                settings = argparse.Namespace(**vars(options) | {"recompute": level})
                clear(options.device)
                try:
                    trainer = Trainer("vim", case, "plain", settings)
                    row |= measure(trainer.step, options)
                except torch.OutOfMemoryError:
                    row |= {"ms": "out of memory", "fastest ms": "", "GB": "", "runs": 0}
                trainer = None
                yield row


def check(options: argparse.Namespace) -> None:
    """Print the errors of long rows."""
    d = named_config(options.model).d_inner
    print(f"bidirectional_scan, d_inner {d}, 16 states: largest error beside float64, over the largest value\n")
    for tokens in options.check:
        for name, dtype in DTYPES.items():
            clear(options.device)
            try:
                errors = packed_row_errors(tokens, (5, 300), d, dtype, options.device)
            except torch.OutOfMemoryError:
                print(f"| {tokens} | {name} | out of memory | |", flush=True)
                continue
            for part, error in errors.items():
                print(f"| {tokens} | {name} | {part} | {error:.2g} |", flush=True)


def plot(table: Path, picture: Path) -> None:
    """Time and memory of every net against tokens, with a line of slope 1."""
    rows = [row for row in read_csv(table) if row["GB"]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, what, unit in zip(axes, ("ms", "GB"), ("ms", "GB at most"), strict=True):
        for net in dict.fromkeys(row["net"] for row in rows):
            chosen = [row for row in rows if row["net"] == net]
            points = [int(row["tokens"]) for row in chosen], [float(row[what]) for row in chosen]
            axis.plot(*points, marker="o", markersize=4, label=net)
        ends = [min(int(row["tokens"]) for row in rows), max(int(row["tokens"]) for row in rows)]
        top = max((row for row in rows if row["net"] == rows[0]["net"]), key=lambda row: int(row["tokens"]))
        line = [float(top[what]) * tokens / int(top["tokens"]) for tokens in ends]
        axis.plot(ends, line, color="grey", linestyle=":", label="slope 1")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['run']}\n{rows[0]['device']}", fontsize=8)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.plot:
        plot(*options.plot)
        return
    if options.ranks:
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    first = not options.ranks or dist.get_rank() == 0
    begun = time.perf_counter()
    what = f"masked training step, decoder {options.decoder_width}" if options.train else "forward, one picture"
    about = {
        "run": f"{what}, {options.model}, {options.dtype}", "device": clock(options.device), "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if first:
        print(*about.values(), sep="\n", flush=True)
    if options.check:
        check(options)
        return

    def late() -> bool:
        return bool(options.seconds) and slowest(time.perf_counter() - begun, options.device) > options.seconds

    rows: list[dict[str, Any]] = []
    for row in train_rows(options, late) if options.train else forward_rows(options, late):
        if not rows and first:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        rows.append(row)
        if first:
            print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
        if options.out and first:  # after each row, for whoever stops it
            name = "one_picture_train" if options.train else "one_picture"
            write_csv(options.out / f"{name}.csv", rows, about)
            plot(options.out / f"{name}.csv", options.out / f"{name}.png")
    if late() and first:
        print(f"{options.seconds:.0f} seconds are over: what is missing was not measured")
    if options.ranks:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
