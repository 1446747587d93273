"""Embedding: pictures a second and peak memory beside a ViT and onnxruntime; loading and importing.

python -m benchmarks.embed rates [--sizes 224 512 1024 2048] [--device cuda --precision bf16] [--out DIR]
python -m benchmarks.embed files [--sizes 224 1024] [--device cuda --precision bf16]
python -m benchmarks.embed loading

rates: pooled features of pictures in memory on the device, fresh weights. "vim embed" is what the command does with
a row of pictures (a list packed, results on the CPU), "vim batch" the model on a tensor, "deit" timm's DeiT of the same
width with PyTorch's scaled_dot_product_attention, "onnx" our export in onnxruntime (on CPU; its making takes minutes).
Cases run in turn; medians. Memory: on a GPU what the allocator gave out at most; on a CPU the peak of a process of its
own that computes once, above what it had with the model loaded.
files: the whole command, from JPEG files on disk to .npy, model loading left out; beside the decoding alone.
loading: `vim_backbone.load` beside `torch.load` of the same tensors, and importing, in fresh processes; medians.
Rows are printed as they are made; --out DIR keeps them as embed.csv.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

import vim_backbone
from benchmarks.machine import clock, versions, write_csv
from vim_backbone.embed import FolderPictures, number_of_threads
from vim_backbone.embedding.features import Selection, compute
from vim_backbone.embedding.job import Job, parser_of
from vim_backbone.embedding.parts import Parts
from vim_backbone.embedding.work import read_ahead
from vim_backbone.export import export

DEIT = {"vim_tiny": "deit_tiny_patch16_224", "vim_small": "deit_small_patch16_224", "vim_base": "deit_base_patch16_224"}
PATCHES = {"cpu": 1 << 12, "cuda": 1 << 16}
"""Patches of a batch, but of a picture that has more alone."""
Row = dict[str, Any]
Run = Callable[[Tensor], object]


def of_onnx(file: str, threads: int) -> Run:
    """The export in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def build(case: str, options: argparse.Namespace, size: int) -> Run:
    """What computes the pooled features of pictures (b, 3, size, size) on the device."""
    torch.manual_seed(0)
    if case == "onnx":
        return of_onnx(options.onnx, options.threads)
    if case == "deit":
        return timm.create_model(DEIT[options.model], img_size=size, num_classes=0).to(options.device).eval()
    model = vim_backbone.create_model(options.model, img_size=size, num_classes=0).to(options.device).eval()
    return model if case == "vim batch" else lambda images: compute(model, list(images), Selection())


def once(run: Run, images: Tensor, options: argparse.Namespace) -> None:
    """One batch, to its end."""
    bf16 = options.precision == "bf16"
    with torch.inference_mode(), torch.autocast(options.device, torch.bfloat16, enabled=bf16):
        run(images)
    if options.device == "cuda":
        torch.cuda.synchronize()


def pictures_of(options: argparse.Namespace, size: int) -> Tensor:
    """A batch of noise."""
    batch = options.batch or min(256, max(1, PATCHES[options.device] // (size // 16) ** 2))
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(options.device)


def memory(case: str, options: argparse.Namespace, size: int) -> float:
    """Peak megabytes above what is there when the model is loaded."""
    if options.device == "cpu":
        context = multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        process = context.Process(target=memory_of_process, args=(case, options, size, queue))
        process.start()
        process.join()
        return queue.get() if process.exitcode == 0 else float("nan")
    run, images = build(case, options, size), pictures_of(options, size)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once(run, images, options)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def memory_of_process(case: str, options: argparse.Namespace, size: int, queue: Any) -> None:
    """The peak of this process, after a first picture of the smallest size has compiled what there is to compile."""
    torch.set_num_threads(options.threads)
    run, images = build(case, options, size), pictures_of(options, size)
    if case != "deit":  # which takes one size
        once(run, images[:1, :, :224, :224].contiguous(), options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5)); Linux alone
    before = peak_resident()
    once(run, images, options)
    queue.put((peak_resident() - before) / 1e6)


def peak_resident() -> int:
    """Bytes of memory that this process had at most; `ru_maxrss` would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def rates(options: argparse.Namespace) -> Iterator[Row]:
    """A row a size and case."""
    for size in options.sizes:
        images = pictures_of(options, size)
        runs = {case: build(case, options, size) for case in options.cases}
        for run in runs.values():
            once(run, images, options)
        spent: dict[str, list[float]] = {case: [] for case in runs}
        start = time.perf_counter()
        while time.perf_counter() - start < options.seconds or len(spent[options.cases[0]]) < 3:
            for case, run in runs.items():
                before = time.perf_counter()
                once(run, images, options)
                spent[case].append(time.perf_counter() - before)
        del runs
        ours = median(spent[options.cases[0]])
        for case, times in spent.items():
            yield {
                "pixels": size, "case": case, "batch": len(images),
                "pictures/s": round(len(images) / median(times), 2), "time / first": round(median(times) / ours, 2),
                "peak MB": round(memory(case, options, size)), "rounds": len(times),
            }  # fmt: skip


def files(options: argparse.Namespace) -> Iterator[Row]:
    """A row a size: the command, and its reading alone."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder = vim_backbone.create_model(options.model, num_classes=0).save_pretrained(f"{place}/backbone")
        for size in options.sizes:
            pictures = Path(place) / str(size)
            pictures.mkdir()
            smooth = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8))
            for number in range(options.pictures):
                smooth.rotate(number).resize((size, size)).save(pictures / f"{number}.jpg")
            argv = [str(folder), str(pictures), f"{place}/out.npy", "--device", options.device, "--overwrite"]
            argv += ["--precision", options.precision, "--batch_size", str(options.batch or 64)]
            job = Job.of(parser_of("", "", "").parse_args(argv))
            source, threads = FolderPictures(pictures, job.transform), number_of_threads(None)
            start = time.perf_counter()
            assert not any(isinstance(got, str) for _, got in read_ahead(source, range(len(source)), threads))
            reading = time.perf_counter() - start
            took = []
            for _time in range(2):  # the first one compiles
                parts = Parts(job.arguments.out, len(source))
                job.start(parts, job.settings(source))
                start = time.perf_counter()
                job.compute(source, parts, threads, print, lambda _: None)
                job.write(source, parts, print)
                took.append(time.perf_counter() - start)
            yield {
                "pixels": size, "pictures": len(source), "threads": threads,
                "pictures/s": round(len(source) / took[1], 1), "reading alone/s": round(len(source) / reading, 1),
            }  # fmt: skip


def loading(_: argparse.Namespace) -> Iterator[Row]:
    """A row for each way to load or import."""
    with tempfile.TemporaryDirectory() as place:
        for name in DEIT:
            model = vim_backbone.create_model(name, num_classes=0)
            folder, file = model.save_pretrained(f"{place}/{name}"), f"{place}/{name}.pth"
            torch.save(model.state_dict(), file)

            def with_model(name: str = name, file: str = file) -> None:
                model = vim_backbone.create_model(name, num_classes=0)
                model.load_state_dict(torch.load(file, weights_only=True))

            ways: dict[str, Callable[[], object]] = {
                "vim_backbone.load": lambda folder=folder: vim_backbone.load(folder),
                "torch.load": lambda file=file: torch.load(file, weights_only=True),
                "torch.load into a model": with_model,
            }
            spent: dict[str, list[float]] = {way: [] for way in ways}
            for _round in range(7):
                for way, load in ways.items():
                    start = time.perf_counter()
                    load()
                    spent[way].append(time.perf_counter() - start)
            size = os.path.getsize(file) / 1e6
            for way, times in spent.items():
                yield {"what": f"{name} ({size:.0f} MB): {way}", "seconds": round(median(times), 3)}
    code = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import {0}; " \
           "print(b - a, time.perf_counter() - b)"  # fmt: skip
    for module in ("vim_backbone", "vim_backbone.embed", "vim_backbone.timm", "vim_backbone.transformers"):
        command = [sys.executable, "-c", code.format(module)]
        pairs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(5)]
        of_torch, beyond = (median(map(float, times)) for times in zip(*pairs, strict=True))
        yield {"what": f"import {module}, beyond torch's {of_torch:.2f} s", "seconds": round(beyond, 3)}


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rates", "files", "loading"])
    parser.add_argument("--model", choices=DEIT, default="vim_tiny")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1024, 2048], help="sides in pixels")
    parser.add_argument("--batch", type=int, help="pictures of a batch; by the patches when not given")
    parser.add_argument("--pictures", type=int, default=64, help="files of each size")
    parser.add_argument("--device", choices=PATCHES, default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--cases", nargs="+", default=["vim embed", "vim batch", "deit"], help="and onnx, on CPU")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure for, each size; at least three rounds")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, help="folder for embed.csv")
    return parser.parse_args(argv)


def main() -> None:
    """Measure and print."""
    options = arguments_of()
    torch.set_num_threads(options.threads)
    about = {"device": clock(options.device), "versions": versions(), "date": time.strftime("%Y-%m-%d")}
    about["run"] = f"{options.what}, {options.model}, {options.precision}"
    print("\n".join(about.values()), end="\n\n")
    with tempfile.TemporaryDirectory() as place:
        if "onnx" in options.cases:
            options.onnx = f"{place}/vim.onnx"
            model = vim_backbone.create_model(options.model, num_classes=0)
            export(model.save_pretrained(f"{place}/backbone"), options.onnx)
        rows: list[Row] = []
        for row in {"rates": rates, "files": files, "loading": loading}[options.what](options):
            if not rows:
                print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
            print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
            rows.append(row)
            if options.out:  # after each row, for whoever stops it
                write_csv(options.out / "embed.csv", rows, about)


if __name__ == "__main__":
    main()
