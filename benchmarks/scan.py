"""The scan beside its peers and the machine's roof: time, state updates a second, share of the roof, peak memory.

`python -m benchmarks.scan` prints one row for each size, pass and implementation; `--out DIR` adds scan.csv and
scan.png, and `--plot` draws a scan.csv anew. A state update is one (token, channel, direction, state): it takes one
exponential, and on a GPU the rate of exponentials is the roof. "scan x 2" is both directions with D, z and
softplus(dt + bias) as two single-direction calls, the only form that mamba_ssm has; "layer" is everything between
in_proj and out_proj; "scan" is the part of it behind softplus, both directions and the gate in one launch. "graph ms"
is the same replayed as a CUDA graph, that is without Python; updates and ratios (time / ours) are of that where there
is one.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan  # has no public name yet

from benchmarks.machine import clock, copy_rate, exp_rate, graphed, read_csv, seconds, versions, write_csv
from vim_kernels import ScanWeights, available_backends, bidirectional_scan, selective_scan
from vim_kernels.dispatch.contract import BidirectionalScan

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]
except ImportError:
    selective_scan_fn = None

N, WIDTH = 16, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {
    "cuda": ["128x197x384", "256x197x384", "512x197x384", "64x1025x1536", "16x6085x384", "16x6085x1536", "1x6085x384"],
    "cpu": ["1x197x384", "8x197x384", "1x1025x384", "1x6085x384"],
}


class Inputs(NamedTuple):
    """Of one layer: channel-last for ours, channel-first for mamba_ssm."""

    xz: Tensor
    weights: tuple[ScanWeights, ScanWeights]
    scan: dict[str, Tensor]
    official: dict[str, Tensor]


def draw(b: int, l: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """Random inputs as a Vim of width d / 2 has them."""
    torch.manual_seed(0)
    rank = -(-d // 32)

    def tensor(*shape: int, scale: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(kind)

    def weights() -> ScanWeights:
        A_log = torch.arange(1, N + 1, device=device).float().log().repeat(d, 1)
        projections = tensor(rank + 2 * N, d, scale=d**-0.5), tensor(d, rank, scale=rank**-0.5)
        return ScanWeights(tensor(d, WIDTH), tensor(d), *projections, tensor(d) - 4, A_log, tensor(d))

    scan = {name: tensor(b, l, d, kind=dtype) for name in ("x", "dt", "z")}
    scan |= {name: tensor(b, l, N, kind=dtype) for name in ("B", "C")}
    scan |= {"A": -torch.arange(1, N + 1, device=device).float().repeat(d, 1), "D": tensor(d), "dt_bias": tensor(d) - 4}
    renamed = {"x": "u", "dt": "delta", "dt_bias": "delta_bias"}
    official = {
        renamed.get(k, k): v.transpose(1, 2).contiguous() if v.dim() == 3 else v.clone() for k, v in scan.items()
    }
    return Inputs(tensor(b, l, 2 * d, kind=dtype), (weights(), weights()), scan, official)


def both(scan: Callable[..., Tensor], tensors: dict[str, Tensor], first: dict, second: dict) -> Tensor:
    """Two directions of a single-direction scan."""
    return scan(**tensors, **first) + scan(**tensors, **second)


def loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """The recurrence as PyTorch would write it: a loop over tokens, for torch.compile."""
    dt = torch.nn.functional.softplus(dt.float() + dt_bias)
    h = x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32)
    ys = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = (step * A).exp() * h + step * x[:, t, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    y = torch.stack(ys, 1) + D * x
    return (y * torch.nn.functional.silu(z.float())).to(x.dtype)


def associative(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, reverse: bool = False
) -> Tensor:
    """The recurrence as PyTorch's associative scan of (decay, drive) pairs, for torch.compile."""
    dt = torch.nn.functional.softplus(dt.float() + dt_bias)
    pairs = (dt[..., None] * A).exp(), (dt * x)[..., None] * B[:, :, None].float()
    mode = "pointwise" if x.is_cuda else "generic"
    _, h = associative_scan(_then, pairs, 1, reverse=reverse, combine_mode=mode)
    y = (h * C[:, :, None]).sum(-1) + D * x
    return (y * torch.nn.functional.silu(z.float())).to(x.dtype)


def _then(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return first[0] * second[0], second[0] * first[1] + second[1]


class Case(NamedTuple):
    """What a row measures."""

    forward: Callable[[], object]
    backward: Callable[[], object] | None


def cases(inputs: Inputs, backend: str, rivals: list[str]) -> dict[str, Callable[[], Case]]:
    """Row name -> what makes its case."""
    ours = {"dt_softplus": True, "backend": backend}
    found = {
        f"layer, {backend}": lambda: differentiated(
            lambda: bidirectional_scan(inputs.xz, *inputs.weights, backend=backend),
            [inputs.xz, *(t for w in inputs.weights for t in w if t is not None)],
        ),
        f"scan x 2, {backend}": lambda: differentiated(
            lambda: both(selective_scan, inputs.scan, ours, ours | {"reverse": True}), list(inputs.scan.values())
        ),
    }
    if backend == "triton":
        found["scan, triton"] = lambda: one_launch(inputs)
    if "mamba_ssm" in rivals and selective_scan_fn is not None:
        official, peer = {"delta_softplus": True}, selective_scan_fn
        found["scan x 2, mamba_ssm"] = lambda: differentiated(
            lambda: both(peer, inputs.official, official, official), list(inputs.official.values())
        )
    if "associative_scan" in rivals:
        compiled = torch.compile(associative, dynamic=False)  # it has no backward pass on GPUs
        tensors = inputs.scan
        found["scan x 2, associative_scan"] = lambda: Case(lambda: both(compiled, tensors, {}, {"reverse": True}), None)
    if "loop" in rivals:
        found["scan x 2, loop"] = lambda: differentiated(
            lambda: both(loop, inputs.scan, {}, {}), list(inputs.scan.values())
        )
    return found


def differentiated(call: Callable[[], Tensor], leaves: list[Tensor]) -> Case:
    """A forward without gradients, and the backward alone."""

    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    for leaf in leaves:
        leaf.requires_grad_()
    out = call()
    gradient = torch.randn_like(out)
    return Case(forward, lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True))


def one_launch(inputs: Inputs) -> Case:
    """The scan kernels alone, on inputs made before."""
    from vim_kernels.triton_backend import mixer, plan, recurrence, tensors

    x, z = inputs.xz.detach().chunk(2, dim=-1)
    rows = plan.tokens_of(x, None)
    weights = [ScanWeights._make(None if t is None else t.detach() for t in w) for w in inputs.weights]
    laid_out = mixer.mixer_weights(x, *weights)
    made = mixer.MixerInputs.empty(x, *laid_out.padded, low=False)
    mixer.mixer_inputs(x, laid_out, rows, made, None)
    arguments = made.scan(laid_out)
    out = x.new_empty(rows.rows, x.shape[2])
    whole = BidirectionalScan(inputs.xz.detach(), *weights, cu_seqlens=None, gaps=None, gated=True)
    states, ungated = mixer.bidirectional_scan_saved(whole)

    def forward(*, save: bool = False) -> None:
        recurrence.scan_forward(
            arguments, tensors.flat(z), out, rows, scale=0.5, states=states if save else None,
            ungated=ungated.view_as(out) if save else None, initial=None, want_final=False,
        )  # fmt: skip

    def backward() -> object:
        options = {"dfinal": None, "softplus": True, "want_initial": False, "gate": recurrence.Gate(1.0)}
        return recurrence.scan_backward(arguments, gradient, rows, states=states, **options)

    forward(save=True)
    gradient = torch.randn_like(out)
    return Case(forward, backward)


def measure(run: Callable[[], object], device: str) -> tuple[float, float, float]:
    """Seconds, seconds as a CUDA graph (the same on a CPU), and peak bytes above the inputs."""
    spent = seconds(run, device)
    if device != "cuda":
        return spent, spent, 0.0
    idle = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated() - idle
    return spent, seconds(graphed(run), device), peak


def rows_of(size: str, options: argparse.Namespace, roof: float, rivals: list[str]) -> list[dict[str, Any]]:
    """Print and return the rows of one size."""
    b, l, d = map(int, size.split("x"))
    rows = []
    inputs = draw(b, l, d, DTYPES[options.dtype], options.device)
    bases: dict[str, float] = {}
    for what, make in cases(inputs, options.backend, rivals).items():
        try:
            case = make()
            found = [measure(run, options.device) for run in case if run is not None]
        except RuntimeError as error:  # out of memory, or a peer that PyTorch cannot compile here
            if f", {options.backend}" in what and not isinstance(error, torch.OutOfMemoryError):
                raise
            print(f"{size} {what}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        for which, (spent, graph, peak) in zip(Case._fields, found, strict=False):
            base = bases.setdefault(f"{what.split(',')[0]} {which}", graph)
            updates = 2 * b * l * d * N / graph
            row = {
                "batch x length x channels": size,
                "pass": which,
                "what": what,
                "ms": f"{1e3 * spent:.3f}",
                "graph ms": f"{1e3 * graph:.3f}" if options.device == "cuda" else "",
                "time / ours": f"{graph / base:.2f}",
                "1e9 updates/s": f"{updates / 1e9:.1f}",
                "% of exp roof": f"{100 * updates / roof:.0f}",
                "peak MB": f"{peak / 1e6:.0f}" if peak else "",
            }
            print("| " + " | ".join(row.values()) + " |", flush=True)
            rows.append(row)
        del case
    return rows


def plot(table: Path, picture: Path) -> None:
    """The plot of a scan.csv."""
    rows = read_csv(table)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    order = list(dict.fromkeys(row["batch x length x channels"] for row in rows))
    names = list(dict.fromkeys(row["what"] for row in rows))
    for axis, which in zip(axes, ("forward", "backward"), strict=True):
        for name in names:
            mine = [row for row in rows if row["pass"] == which and row["what"] == name]
            places = [order.index(row["batch x length x channels"]) for row in mine]
            axis.plot(places, [float(row["1e9 updates/s"]) for row in mine], marker="o", label=name)
        axis.set(yscale="log", title=which)
        axis.set_xticks(range(len(order)), order, rotation=30, ha="right")
        axis.grid(axis="y", which="both", alpha=0.3)
    axes[0].set(ylabel="1e9 state updates a second", xlabel="batch x length x channels")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['date']}", fontsize=9)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure and print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if device == "cuda" else "fp32")
    parser.add_argument("--backend", default="triton" if device == "cuda" else "cpu", help="of vim_kernels")
    parser.add_argument("--sizes", nargs="+", help="BATCHxLENGTHxCHANNELS")
    parser.add_argument("--rivals", nargs="*", help="mamba_ssm and associative_scan unless given; loop (slow)")
    parser.add_argument("--out", type=Path, help="folder for scan.csv and scan.png")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("CSV", "PNG"), help="only draw a table measured before")
    options = parser.parse_args()
    if options.plot:
        plot(*options.plot)
        return
    if reason := available_backends(options.device).get(options.backend, "unknown"):
        parser.error(f"backend {options.backend!r}: {reason}")
    if options.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be taken on the default stream
    roof = exp_rate(options.device)
    about = {"device": clock(options.device), "versions": versions(), "date": time.strftime("%Y-%m-%d")}
    print("\n".join([*about.values(), options.dtype]))
    print(f"exponentials {roof / 1e9:.1f} G/s, copy {copy_rate(options.device) / 1e9:.0f} GB/s\n")
    if options.rivals is None:
        options.rivals = ["mamba_ssm", "associative_scan"]
    if "mamba_ssm" in options.rivals and selective_scan_fn is None:
        print("mamba_ssm is not installed: no rows of it\n")
    titles = (
        "batch x length x channels",
        "pass",
        "what",
        "ms",
        "graph ms",
        "time / ours",
        "1e9 updates/s",
        "% of exp roof",
        "peak MB",
    )
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    rows = []
    for size in options.sizes or SIZES[options.device]:
        rows += rows_of(size, options, roof, options.rivals)
        if options.out:  # after each size, for whoever stops it
            write_csv(options.out / "scan.csv", rows, about | {"dtype": options.dtype})
            plot(options.out / "scan.csv", options.out / "scan.png")


if __name__ == "__main__":
    main()
