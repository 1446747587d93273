"""Time of Python between a public op and its kernels: microseconds a call at sizes whose kernels take next to none.

python -m benchmarks.dispatch [--backend NAME] [--calls N]

Every op, and a layer of Vim (add + norm, both projections, mixer), forward without gradients, and forward and backward
with them. Seconds are those of the calling thread (`time.thread_time`), one thread, the median of many calls.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.machine import clock, versions
from vim_backbone.block import Block
from vim_backbone.config import VimConfig
from vim_kernels import ScanWeights, add_rms_norm, bidirectional_scan, causal_conv1d, selective_scan, use_backend

LENGTH, D_INNER, D_STATE, DT_RANK, D_CONV = 4, 32, 4, 2, 4
SHAPES = (
    (D_INNER, D_CONV), (D_INNER,), (DT_RANK + 2 * D_STATE, D_INNER), (D_INNER, DT_RANK), (D_INNER,),
    (D_INNER, D_STATE), (D_INNER,),
)  # fmt: skip

Call = Callable[[], Tensor]


def draw(*shape: int) -> Tensor:
    """A leaf of normal numbers."""
    return (0.1 * torch.randn(shape)).requires_grad_()


def cases() -> dict[str, tuple[Call, list[Tensor]]]:
    """What is called, and the leaves that get a gradient."""
    x, dt, B, C = draw(1, LENGTH, D_INNER), draw(1, LENGTH, D_INNER), *(draw(1, LENGTH, D_STATE) for _ in range(2))
    A, D = (-torch.rand(D_INNER, D_STATE)).requires_grad_(), draw(D_INNER)
    xz, forward, backward = draw(1, LENGTH, 2 * D_INNER), *(ScanWeights(*map(draw2, SHAPES)) for _ in range(2))
    taps, bias, weight, residual = draw(D_INNER, D_CONV), draw(D_INNER), draw(D_INNER), draw(1, LENGTH, D_INNER)
    config = VimConfig(d_model=D_INNER // 2, d_state=D_STATE, depth=1, img_size=(32, 32))
    block, h, stream = Block(config, 0.0), draw(1, LENGTH, D_INNER // 2), draw(1, LENGTH, D_INNER // 2)
    both = [t for t in (*forward, *backward) if t is not None]
    return {
        "selective_scan": (lambda: selective_scan(x, dt, A, B, C, D, dt_softplus=True), [x, dt, A, B, C, D]),
        "bidirectional_scan": (lambda: bidirectional_scan(xz, forward, backward), [xz, *both]),
        "causal_conv1d": (lambda: causal_conv1d(x, taps, bias), [x, taps, bias]),
        "add_rms_norm": (lambda: add_rms_norm(x, residual, weight)[0], [x, residual, weight]),
        "layer": (lambda: block(h, stream)[0], [h, stream, *block.parameters()]),
    }


def draw2(shape: tuple[int, ...]) -> Tensor:
    """`draw` of a shape."""
    return draw(*shape)


def microseconds(run: Callable[[], object], calls: int) -> float:
    """Median of `calls` calls in this thread, after a warm-up."""
    for _ in range(20):
        run()
    spent = []
    for _ in range(calls):
        start = time.thread_time_ns()
        run()
        spent.append(time.thread_time_ns() - start)
    return median(spent) / 1e3


def main() -> None:
    """Print a row an op."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu", help="of vim_kernels")
    parser.add_argument("--calls", type=int, default=400, help="of which the median is taken")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{clock('cpu')}; {versions()}; backend {options.backend}, median of {options.calls} calls\n")
    print("| op | forward without gradients, us | forward and backward, us |\n|---|---|---|")
    with use_backend(options.backend):
        for name, (run, leaves) in cases().items():

            def step(run: Call = run, leaves: list[Tensor] = leaves) -> object:
                return torch.autograd.grad(run().sum(), leaves, allow_unused=True)

            with torch.no_grad():
                plain = microseconds(run, options.calls)
            print(f"| {name} | {plain:.1f} | {microseconds(step, options.calls):.1f} |", flush=True)


if __name__ == "__main__":
    main()
