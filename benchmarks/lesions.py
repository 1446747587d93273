"""What resolution buys: lesions of the eye, segmented at several widths of the same pictures, by Vim and by a ViT.

`python -m benchmarks.lesions --folder FOLDER` trains a segmenter on IDRiD's fundus photographs (54 + 27, 2048 x 1360,
in ADE20K's layout) for each width, net, start and seed, and prints the IoU of each class on the validation pictures, at
the maps' full size. A picture is one scan at each width, in training and in evaluation; augmentation, steps and
pictures a step are the same. `--starts own` pretrains on crops of the training pictures first, without their maps.
`--out` gets lesions.csv and lesions.png.
"""

import argparse
import contextlib
import csv
import io
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.machine import clock, versions, write_csv
from benchmarks.vit import blocks_of
from finetune.segmentation.config import SegmentationConfig
from finetune.segmentation.task import SegmentationTask
from finetune.train import finetune
from launch.run.cli import parse
from launch.run.metrics import METRICS, peak_memory_gb, read_rows
from pretrain.config import PretrainConfig
from pretrain.train import build_model, pretrain

NETS = {"vim": "tab:blue", "pooled": "tab:green", "vit": "tab:orange"}
"""Vim by its full and its pooled scan, and a ViT of half the blocks; each with its colour."""
STARTS = {"scratch": "fresh weights", "own": "pretrained on crops of the training pictures"}
ASPECT = 2048 / 1360
QUIET = ["--trackers=[]", "--overwrite", "--precision=bf16", "--log_every=20"]
FEW = 8
"""Rows of metrics at the start that do not count for the speed: kernels are compiled then."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="images/ and annotations/ of IDRiD's lesions")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048], help="of the pictures, in pixels")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["vim", "vit"])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["scratch"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of a step")
    parser.add_argument("--model", default="vim_tiny")
    parser.add_argument("--depth", type=int, default=24, help="Vim's blocks")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--pretraining", type=int, default=500, help="steps of 64 crops of 512 pixels for --starts own")
    parser.add_argument("--workers", type=int, help="processes that read pictures")
    parser.add_argument("--work", type=Path, default=Path("runs/lesions"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder for lesions.csv and lesions.png")
    return parser.parse_args()


def side_of(width: int, patch: int) -> list[int]:
    """Height and width of the whole picture, in full patches."""
    return [round(side / patch) * patch for side in (width / ASPECT, width)]


def backbone_of(net: str, start: str, seed: int, options: argparse.Namespace) -> Path:
    """Folder of the weights that fine-tuning starts from."""
    halves = 2 if net == "vit" else 1
    folder = options.work / f"{start}-{net}-{seed}"
    workers = [f"--data.workers={options.workers}"] if options.workers is not None else []
    config = parse(PretrainConfig, [
        *QUIET, *workers, f"--out={options.work}", f"--name=pretrain-{net}-{seed}", f"--seed={seed}",
        f"--data.source={options.folder / 'images/training'}", "--data.min_scale=0.05",
        f"--model.name={options.model}", f"--model.depth={options.depth // halves}",
        f"--model.patch_size={options.patch}", "--model.img_size=512",
        f"--model.scan={'pooled' if net == 'pooled' else 'full'}", "--decoder.width=192",
        f"--decoder.depth={2 // halves}", f"--steps={options.pretraining}", "--batch_size=64", "--optim.base_lr=1e-3",
        "--optim.warmup_steps=50", "--optim.clip_grad=1", f"--picture_every={options.pretraining}",
    ], "pretrain/main.py", "")  # fmt: skip
    if start == "scratch":
        return config.method.encoder(build_model(config)).save_pretrained(folder)
    with contextlib.redirect_stderr(io.StringIO()):
        return pretrain(config) / "backbone"


Scores = dict[str, float]


def segment(backbone: Path, name: str, width: int, seed: int, options: argparse.Namespace) -> tuple[Scores, Scores]:
    """IoU by class and mIoU; and pictures a second, share of waiting for them, and peak memory in GB."""
    workers = [f"--data.workers={options.workers}"] if options.workers is not None else []
    config = parse(SegmentationConfig, [
        *QUIET, *workers, f"--backbone={backbone}", f"--out={options.work}", f"--name={name}",
        f"--data.source={options.folder}", f"--seed={seed}", f"--model.img_size={side_of(width, options.patch)}",
        "--model.drop_path_rate=0", f"--steps={options.steps}", f"--batch_size={options.batch}",
        f"--optim.base_lr={options.rate * 256 / options.batch}", f"--optim.warmup_steps={options.steps // 20}",
        "--optim.layer_decay=1", "--optim.clip_grad=1", "--crop.ratio=[0.8,1.25]", "--crop.category_max=1",
        "--crop.photometric=false", "--test.mode=whole", "--pictures=4",
    ], "finetune/main.py", "")  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.redirect_stderr(io.StringIO()):
        folder = finetune(SegmentationTask(config))
    (evaluation,) = folder.glob("evaluations/step-*")
    with (evaluation / "classes.csv").open(newline="") as file:
        scores = {row["class"]: float(row["IoU"]) for row in csv.DictReader(file)}
    steady = [row for row in read_rows(folder / METRICS) if "images_per_second" in row][FEW:] or [{}]
    costs = {
        name: round(median(row.get(name, float("nan")) for row in steady), 3)
        for name in ("images_per_second", "data_wait_share")
    }
    mean_iou = json.loads((evaluation / "metrics.json").read_text())["mIoU"]
    return scores | {"mIoU": mean_iou}, costs | {"peak_gb": round(peak_memory_gb(device), 2)}


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Scores, Scores]]:
    """Seed, net, start and width of each case, its scores and its costs, as they are done."""
    for seed, net, start in product(options.seeds, options.nets, options.starts):
        with blocks_of("vit" if net == "vit" else "vim"):
            backbone = backbone_of(net, start, seed, options)
            for width in options.widths:
                begun = time.monotonic()
                scores, costs = segment(backbone, f"{net}-{start}-{width}-{seed}", width, seed, options)
                case = {"seed": seed, "net": net, "start": start, "width": width}
                yield case, scores, costs | {"seconds": round(time.monotonic() - begun)}


def summary(rows: list[dict[str, Any]], classes: list[str]) -> list[dict[str, Any]]:
    """Mean and deviation of each class over the seeds, by net, start and width."""
    keys = dict.fromkeys((row["net"], row["start"], int(row["width"])) for row in rows)
    means = []
    for key in keys:
        same = [row for row in rows if (row["net"], row["start"], int(row["width"])) == key]
        for name in classes:
            values = [float(row[name]) for row in same]
            spread = stdev(values) if len(values) > 1 else 0.0
            means.append({"key": key, "class": name, "mean": mean(values), "deviation": spread, "seeds": len(values)})
    return means


def print_table(rows: list[dict[str, Any]], classes: list[str]) -> None:
    """IoU by class as a table of Markdown."""
    means = summary(rows, classes)
    print("| net | start | width | seeds | " + " | ".join(classes) + " |\n" + "|---" * (4 + len(classes)) + "|")
    for key in dict.fromkeys(entry["key"] for entry in means):
        same = [entry for entry in means if entry["key"] == key]
        cells = [f"{entry['mean']:.3f} ± {entry['deviation']:.3f}" for entry in same]
        print("| " + " | ".join([*map(str, key), str(same[0]["seeds"]), *cells]) + " |")


def draw(path: Path, rows: list[dict[str, Any]], classes: list[str], about: str) -> None:
    """IoU over the width of the pictures, an axis a class."""
    means = summary(rows, classes)
    columns = 3
    figure, axes = plt.subplots(
        -(-len(classes) // columns), columns, figsize=(10, 5.6), layout="constrained", sharex=True, squeeze=False
    )
    for axis, name in zip(axes.flat, classes, strict=False):
        for net, start in dict.fromkeys(entry["key"][:2] for entry in means):
            line = [e for e in means if e["key"][:2] == (net, start) and e["class"] == name]
            line.sort(key=lambda entry: entry["key"][2])
            widths, values = [e["key"][2] for e in line], [e["mean"] for e in line]
            style = "-" if start == "scratch" else "--"
            axis.errorbar(widths, values, [e["deviation"] for e in line], label=f"{net}, {start}", color=NETS[net],
                          linestyle=style, marker="o", markersize=4, capsize=3)  # fmt: skip
            axis.set_xticks(widths, [str(width) for width in widths])
        axis.set_title(name, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(classes) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("width of the picture in pixels")
    axes[0][0].legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("IoU")
    figure.suptitle(about, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train and evaluate all cases; print and draw."""
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "run": f"{options.model}, patches of {options.patch}, {options.steps} steps of {options.batch}",
        "device": clock(device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    rows: list[dict[str, Any]] = []
    classes: list[str] = []
    for row, scores, costs in cases(options):
        classes = list(scores)
        rows.append(row | scores | costs)
        print(*rows[-1].values(), flush=True)
        if options.out:
            write_csv(options.out / "lesions.csv", rows, about)
    print("\n" + "\n".join(about.values()) + "\n")
    print_table(rows, classes)
    if options.out:
        draw(options.out / "lesions.png", rows, classes, f"{about['run']}; {about['device']}")


if __name__ == "__main__":
    main()
