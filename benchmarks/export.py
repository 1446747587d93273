"""Exported backbones: forms of the scan in ONNX, and whole backbones in onnxruntime and AOTInductor beside PyTorch.

python -m benchmarks.export forms [--threads N]
python -m benchmarks.export backbone [--size vim_tiny] [--formats onnx aoti] [--threads N]

forms: both directions of a mixer of Vim-Ti (384 channels, 16 states), batch 1, in onnxruntime, the fastest of five, in
milliseconds. Chunks have their length fixed, which an exported backbone has not; the Loop gets its inputs laid out.
backbone: fresh weights, batch 1, in turn; the fastest of five, and the largest difference of the outputs.
"""

import argparse
import io
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from benchmarks.machine import clock, versions
from vim_backbone import create_model
from vim_backbone.export import export
from vim_backbone.programs import FORMATS
from vim_kernels.export import recurrence

D, N = 384, 16
LENGTHS = (197, 4097)
SIZES = ((224, 224), (384, 512), (1024, 1024))
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Scan(nn.Module):
    """What exports take: a token a step."""

    def forward(self, step: Tensor, drive: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tensor:
        """(2, b, l, d) -> the same."""
        return recurrence(step, drive, B, C, A, None)[0]


class Tiles(nn.Module):
    """A Scan of tiles of tokens, whose exponentials and outputs are one call each."""

    def __init__(self, tile: int) -> None:
        super().__init__()
        self.tile = tile

    def forward(self, step: Tensor, drive: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tensor:
        """(2, b, l, d) -> the same."""
        l, tile = step.shape[2], self.tile
        tiles = (l + tile - 1) // tile
        A_nd = A.mT.contiguous()[:, None]

        def one(h: Tensor, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
            step, drive, B, C = rows
            decay, drives, states = torch.exp(step[..., None, :] * A_nd), drive[..., None, :] * B[..., None], []
            for k in range(tile):
                h = decay[k] * h + drives[k]
                states.append(h)
            return h.clone(), (C[..., None, :] @ torch.stack(states))[..., 0, :]

        inputs = [F.pad(t, (0, 0, 0, tiles * tile - l)).unflatten(2, (tiles, tile)) for t in (step, drive, B, C)]
        _, y = scan(one, A_nd.new_zeros(2, step.shape[1], N, D), [t.permute(2, 3, 0, 1, 4) for t in inputs])
        return y.permute(2, 3, 0, 1, 4).flatten(2, 3)[:, :, :l]


class Chunks(nn.Module):
    """Ordinary operators alone: a step in all chunks at once, then from chunk to chunk, as many as tokens in one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, step: Tensor, drive: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tensor:
        """(2, b, l, d) -> the same."""
        l, size = step.shape[2], self.size
        decay = torch.exp(step[..., None, :] * A.mT[:, None, None])
        padded = [
            F.pad(t, (0, 0, 0, 0, 0, size * size - l)).unflatten(2, (size, size))
            for t in (decay, drive[..., None, :] * B[..., None])
        ]
        decays, drives = (t.unbind(3) for t in padded)
        states, through = [drives[0]], [decays[0]]
        for k in range(1, size):
            states.append(decays[k] * states[-1] + drives[k])
            through.append(decays[k] * through[-1])
        before = [torch.zeros_like(states[0][:, :, 0])]
        for chunk in range(size - 1):
            before.append(through[-1][:, :, chunk] * before[-1] + states[-1][:, :, chunk])
        every = torch.stack(states, 3) + torch.stack(through, 3) * torch.stack(before, 2)[:, :, :, None]
        return (C[..., None, :] @ every.flatten(2, 3)[:, :, :l])[..., 0, :]


def loop() -> bytes:
    """ONNX's Loop, a token a step, of inputs (l, 2, 1, ...)."""
    node, info, real = helper.make_node, helper.make_tensor_value_info, TensorProto.FLOAT
    tokens = {"step": [1, D], "drive": [1, D], "B": [N, 1], "C": [1, N]}
    state = ("h", real, [2, 1, N, D])
    body = helper.make_graph(
        [
            *(node("Gather", [name, "i"], [f"{name}_i"], axis=0) for name in tokens),
            node("Mul", ["step_i", "A"], ["exponent"]), node("Exp", ["exponent"], ["decay"]),
            node("Mul", ["decay", "h"], ["kept"]), node("Mul", ["drive_i", "B_i"], ["added"]),
            node("Add", ["kept", "added"], ["h_new"]), node("MatMul", ["C_i", "h_new"], ["y_i"]),
            node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info(*state)],
        [info("go_on", TensorProto.BOOL, []), info("h_new", *state[1:]), info("y_i", real, [2, 1, 1, D])],
    )  # fmt: skip
    graph = helper.make_graph(
        [node("Loop", ["length", "", "h0"], ["last", "y"], body=body)],
        "loop",
        [
            *(info(name, real, ["l", 2, 1, *sizes]) for name, sizes in tokens.items()),
            info("A", *state[1:]), info("h0", *state[1:]), info("length", TensorProto.INT64, []),
        ],
        [info("y", real, ["l", 2, 1, 1, D])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def of_loop(inputs: Inputs) -> dict[str, np.ndarray]:
    """What the Loop is fed with."""
    step, drive, B, C, A = (t.permute(2, 0, 1, 3) if t.dim() == 4 else t.mT[:, None] for t in inputs)
    rows = {"step": step[..., None, :], "drive": drive[..., None, :], "B": B[..., None], "C": C[..., None, :], "A": A}
    fed = {name: t.contiguous().numpy() for name, t in rows.items()}
    return fed | {"h0": np.zeros((2, 1, N, D), np.float32), "length": np.array(len(step))}


def draw(l: int) -> Inputs:
    """Step, drive, B, C and A."""
    rng = torch.Generator().manual_seed(l)
    step, drive, B, C = (torch.randn(2, 1, l, n, generator=rng) for n in (D, D, N, N))
    return F.softplus(step - 3), drive, B, C, -torch.arange(1.0, N + 1).expand(2, D, N)


def in_float64(step: Tensor, drive: Tensor, B: Tensor, C: Tensor, A: Tensor) -> np.ndarray:
    """The recurrence as an equation."""
    step, drive, B, C, A = (t.double() for t in (step, drive, B, C, A))
    h, outputs = torch.zeros(2, 1, D, N).double(), []
    for t in range(step.shape[2]):
        h = torch.exp(step[:, :, t, :, None] * A[:, None]) * h + drive[:, :, t, :, None] * B[:, :, t, None]
        outputs.append((h @ C[:, :, t, :, None])[..., 0])
    return torch.stack(outputs, 2).numpy()


def session_of(program: str | bytes, threads: int) -> onnxruntime.InferenceSession:
    """Of onnxruntime, on so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])


def milliseconds(*runs: Callable[[], object]) -> list[float]:
    """The fastest of five of each, in turn."""
    spent: list[list[float]] = [[] for _ in runs]
    for _ in range(5):
        for run, times in zip(runs, spent, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [1e3 * min(times) for times in spent]


def forms(threads: int) -> None:
    """Print a row a form and length."""
    print("| form | tokens | ms | error against float64 | peak of the process, GB |\n|---|---|---|---|---|")
    kinds: list[tuple[str, Callable[[int], nn.Module] | None]] = [
        ("Scan, a token a step", lambda _: Scan()), ("Loop, a token a step", None),
        ("Scan, 8 tokens a step", lambda _: Tiles(8)), ("Scan, 32 tokens a step", lambda _: Tiles(32)),
        ("chunks, no loop", lambda l: Chunks(int((l - 1) ** 0.5) + 1)),
    ]  # fmt: skip
    for name, build in kinds:
        for l in LENGTHS:
            inputs = draw(l)
            if build is None:
                session, fed = session_of(loop(), threads), of_loop(inputs)
            else:
                file = io.BytesIO()
                with torch.no_grad():
                    torch.onnx.export(torch.export.export(build(l), inputs), f=file, opset_version=18, verbose=False)  # pyright: ignore
                session = session_of(file.getvalue(), threads)
                fed = {i.name: t.contiguous().numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
            y = np.asarray(session.run(None, fed)[0])
            y = y if build else y[..., 0, :].transpose(1, 2, 0, 3)
            error = np.abs(y - in_float64(*inputs)).max()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            (spent,) = milliseconds(lambda s=session, f=fed: s.run(None, f))
            print(f"| {name} | {l} | {spent:.1f} | {error:.1e} | {peak:.1f} |", flush=True)


def backbone(size: str, formats: Sequence[str], threads: int) -> None:
    """Print a row a format and size of picture."""
    print("| format | pixels | ms | PyTorch ms | ratio | difference |\n|---|---|---|---|---|---|")
    torch.manual_seed(0)
    model = create_model(size).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(Path(place) / "backbone")
        for name in formats:
            file = Path(place) / f"{name}{FORMATS[name].ending}"
            export(Path(place) / "backbone", file, format=name)
            run: Callable[[Tensor], Any] = FORMATS[name].load(file)
            if name == "onnx":
                session = session_of(str(file), threads)
                run = lambda images, s=session: [torch.from_numpy(s.run(None, {"images": images.numpy()})[0])]  # noqa: E731
            for height, width in SIZES:
                images = torch.randn(1, 3, height, width)
                difference = (run(images)[0] - model(images)).abs().max().item()
                ours, torchs = milliseconds(lambda r=run, i=images: r(i), lambda i=images: model(i))
                times = f"{ours:.0f} | {torchs:.0f} | {ours / torchs:.1f}"
                print(f"| {name} | {height} x {width} | {times} | {difference:.1e} |", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["forms", "backbone"])
    parser.add_argument("--size", default="vim_tiny", help="name of the backbone")
    parser.add_argument("--formats", nargs="+", default=["onnx"], help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    print(f"{clock('cpu')}; {versions()}, onnxruntime {onnxruntime.__version__}\n")
    if options.what == "forms":
        forms(options.threads)
    else:
        backbone(options.size, options.formats, options.threads)


if __name__ == "__main__":
    main()
