"""Dense tasks on real pictures: what pretraining buys, and resolution, for Vim by either scan and for a ViT.

`python -m benchmarks.dense --data lesions --folder FOLDER` trains a segmenter (UperNet) on IDRiD's fundus photographs
(54 + 27, 2048 x 1360, in ADE20K's layout), at several widths of the same pictures, and scores the maps at full size; a
picture is one scan, in training and in evaluation. `--data facades` trains a detector (Mask R-CNN) on street
photographs (488 + 110, 640 x 640, in COCO's layout). A case is a seed, a size, a start of the weights and a net; all go
through the engines of pretrain/ and finetune/ with the same steps, pictures and rates.

Weights are fresh, or from MAE on the task's own training pictures without their labels, or on Tiny ImageNet
(`--tinyimagenet FOLDER`): pretrained once for each net, with seed 0. A row is written into `--work`/rows.jsonl as it
is made; the same command goes on with the cases that have none. `--processes` cases run at a time, spread over all
GPUs; with 0 the rows that are there are printed. `--out` gets a table and a plot, named after the data.
"""

import argparse
import csv
import fcntl
import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from PIL import Image

from benchmarks.dense_page import STARTS, draw, print_table
from benchmarks.learning import end_readers, silent
from benchmarks.learning_recipes import NETS
from benchmarks.machine import clock, versions, write_csv
from benchmarks.vit import blocks_of
from finetune.config import FinetuneConfig
from finetune.registry import TASKS
from finetune.train import finetune
from launch.run.cli import parse
from launch.run.metrics import METRICS, peak_memory_gb, read_rows
from launch.run.signals import Stopped
from pretrain.config import PretrainConfig
from pretrain.train import build_model, pretrain
from vim_backbone.files import append_lines, json_line

ROWS = "rows.jsonl"
QUIET = ["--trackers=[]", "--overwrite", "--precision=bf16", "--log_every=20", "--optim.clip_grad=1"]
FEW = 4
"""Rows of metrics at the start that do not count for the speed: kernels are compiled then."""
TILE = 512
"""Longest side in pixels of what is pretrained on: large pictures are cut, at full, half and quarter size."""


class Recipe(NamedTuple):
    """A task with its pictures."""

    task: str
    pictures: str
    """Folder of those to train on."""
    aspect: float
    """Width over height."""
    sizes: list[int]
    """Widths of the pictures in pixels."""
    batch: int
    rate: float
    """Learning rate of a step."""
    fields: list[str]


RECIPES = {
    "lesions": Recipe(
        "segmentation", "images/training", 2048 / 1360, [2048, 512, 1024], 2, 5e-4,
        ["--crop.ratio=[0.8,1.25]", "--crop.category_max=1", "--crop.photometric=false", "--test.mode=whole"],
    ),
    "facades": Recipe(
        "detection", "train", 1, [640], 8, 5e-4,
        ["--jitter.scale=[0.8,1.25]", "--head.proposals=500", "--head.samples=256"],
    ),
}  # fmt: skip


class Case(NamedTuple):
    """One training of the task."""

    data: str
    seed: int
    size: int
    start: str
    net: str
    label: str
    """Name of the settings, where there are several."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(filter(None, (*map(str, self),)))


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=RECIPES, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the data set")
    parser.add_argument("--tinyimagenet", type=Path, help="its parquet files, for --starts tinyimagenet")
    parser.add_argument("--sizes", type=int, nargs="+", help="widths of the pictures in pixels, the first ones first")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["vim", "vit"], help="the same")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["scratch", "own"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning")
    parser.add_argument("--rate", type=float, help="learning rate of a step, in place of the recipe's")
    parser.add_argument("--depth", type=int, default=24, help="Vim's blocks; the ViT has half of them")
    parser.add_argument("--pretraining", type=int, default=400, help="steps of MAE")
    parser.add_argument("--label", default="", help="name of these settings in the table, such as dice_ce")
    text = "more fields of fine-tuning, such as head.loss=dice_ce"
    parser.add_argument("--tune-with", nargs="+", default=[], metavar="FIELD=VALUE", help=text)
    parser.add_argument("--pretrain-with", nargs="+", default=[], metavar="FIELD=VALUE", help="of pretraining")
    parser.add_argument("--processes", type=int, default=1, help="cases that run at the same time")
    parser.add_argument("--workers", type=int, default=3, help="processes that read pictures, for each of them")
    parser.add_argument("--readers", type=int, default=6, help="the same while one pretrains")
    parser.add_argument("--last-start", type=float, help="seconds after which no further case begins")
    parser.add_argument("--work", type=Path, default=Path("runs/dense"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder for the table and the plot")
    options = parser.parse_args(argv)
    if "tinyimagenet" in options.starts and not options.tinyimagenet:
        parser.error("--starts tinyimagenet needs --tinyimagenet, the folder of its parquet files")
    return options


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time inside, the others wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tiles(folder: Path, to: Path) -> Path:
    """Folder of the pictures as they are, or, where they are larger than a tile, of pieces of them."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    with Image.open(files[0]) as picture:
        if max(picture.size) < 2 * TILE:
            return folder
    part = to.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for path in files:
        whole = Image.open(path).convert("RGB")
        for scale in (1, 2, 4):
            picture = whole.resize((whole.width // scale, whole.height // scale), Image.Resampling.LANCZOS)
            columns, rows = (-(-side // TILE) for side in picture.size)
            for i, j in product(range(columns), range(rows)):
                left, upper = picture.width * i // columns, picture.height * j // rows
                box = left, upper, picture.width * (i + 1) // columns, picture.height * (j + 1) // rows
                picture.crop(box).save(part / f"{path.stem}-{scale}-{i}-{j}.jpg", quality=95)
    return part.rename(to)


def pretraining(net: str, start: str, options: argparse.Namespace, seed: int = 0) -> PretrainConfig:
    """What a net's weights come from; for fresh ones, the same net."""
    halves, scan = 2 if net == "vit" else 1, "pooled" if net == "pooled" else "full"
    recipe = RECIPES[options.data]
    folder, of_start = options.folder / recipe.pictures, ["--model.img_size=256"]
    name = f"pretrain-{start}-{net}"
    if start == "own":
        name = f"pretrain-{options.data}-{net}"
        with alone(options.work / f"{options.data}.lock"):
            done = options.work / f"tiles-{options.data}"
            folder = done if done.exists() else tiles(folder, done)
        of_start += ["--batch_size=128", "--optim.base_lr=3e-3", "--data.min_scale=0.2"]
    if start == "tinyimagenet":
        folder = options.tinyimagenet / "train*.parquet"
        of_start = ["--model.img_size=128", "--batch_size=512", "--optim.base_lr=1e-3", "--data.min_scale=0.4"]
    return parse(PretrainConfig, [
        *QUIET, f"--data.workers={options.readers}", f"--out={options.work}", f"--name={name}",
        f"--seed={seed}", f"--data.source={folder}", "--model.name=vim_tiny",
        f"--model.depth={options.depth // halves}", "--model.patch_size=16", f"--model.scan={scan}",
        "--decoder.width=192", f"--decoder.depth={2 // halves}", f"--steps={options.pretraining}",
        f"--optim.warmup_steps={options.pretraining // 10}", f"--picture_every={options.pretraining}",
        f"--checkpoint_every={options.pretraining}", *of_start, *(f"--{word}" for word in options.pretrain_with),
    ], "pretrain/main.py", "")  # fmt: skip


def backbone_of(case: Case, options: argparse.Namespace) -> tuple[Path, float]:
    """Folder of the weights that fine-tuning starts from, and the seconds that pretraining took."""
    if case.start == "scratch":
        config = pretraining(case.net, case.start, options, case.seed)
        folder = options.work / "fresh" / case.name
        return config.method.encoder(build_model(config)).save_pretrained(folder), 0.0
    config = pretraining(case.net, case.start, options)
    seconds = config.folder.with_suffix(".json")
    with alone(seconds.with_suffix(".lock")):
        if not seconds.exists():
            begun = time.monotonic()
            silent(pretrain, config)
            end_readers()
            loss = [row["loss"] for row in read_rows(config.folder / METRICS) if "loss" in row][-1]
            print(case.net, case.start, f"pretrained, loss {loss:.3f}", flush=True)
            seconds.write_text(json.dumps(time.monotonic() - begun))
    return config.folder / "backbone", json.loads(seconds.read_text())


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Scores of a case, and what it cost."""
    recipe = RECIPES[options.data]
    task = TASKS[recipe.task]
    with blocks_of("vit" if case.net == "vit" else "vim"):
        backbone, pretraining_seconds = backbone_of(case, options)
        begun, rate = time.monotonic(), options.rate or recipe.rate
        side = [round(side / 16) * 16 for side in (case.size / recipe.aspect, case.size)]
        config: FinetuneConfig = parse(task.config_class, [
            *QUIET, f"--data.workers={options.workers}", f"--backbone={backbone}", f"--out={options.work}",
            f"--name={case.name}", f"--data.source={options.folder}", f"--seed={case.seed}",
            f"--model.img_size={side}", "--model.drop_path_rate=0", f"--steps={options.steps}",
            f"--batch_size={recipe.batch}", f"--optim.base_lr={rate * 256 / recipe.batch}", "--optim.layer_decay=1",
            f"--optim.warmup_steps={options.steps // 10}", "--optim.schedule=cosine", "--optim.weight_decay=0.05",
            "--pictures=3", *recipe.fields, *(f"--{word}" for word in options.tune_with),
        ], "finetune/main.py", "")  # fmt: skip
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        folder = silent(lambda given: finetune(task(given)), config)
    steady = [row for row in read_rows(folder / METRICS) if "images_per_second" in row][FEW:] or [{}]
    costs = {name: round(median(row.get(name, float("nan")) for row in steady), 3)
             for name in ("images_per_second", "data_wait_share")}  # fmt: skip
    (evaluation,) = folder.glob("evaluations/step-*")
    return case._asdict() | {"step": options.steps} | scores_of(evaluation) | costs | {
        "peak_gb": round(peak_memory_gb(device), 2), "seconds": round(time.monotonic() - begun),
        "pretraining_seconds": round(pretraining_seconds),
    }  # fmt: skip


def scores_of(evaluation: Path) -> dict[str, float]:
    """IoU by class and mIoU; or COCO's AP of boxes and masks."""
    metrics = json.loads((evaluation / "metrics.json").read_text())
    if "mIoU" not in metrics:
        return {name: metrics[name] for name in ("box_AP", "box_AP50", "mask_AP", "mask_AP50")}
    with (evaluation / "classes.csv").open(newline="") as file:
        return {row["class"]: float(row["IoU"]) for row in csv.DictReader(file)} | {"mIoU": metrics["mIoU"]}


def cases(options: argparse.Namespace) -> list[Case]:
    """Those that have no row yet; the sooner, the further to the front of their lists a size and a net stand."""
    done = {tuple(row[name] for name in Case._fields) for row in read_rows(options.work / ROWS)}
    sizes = options.sizes or RECIPES[options.data].sizes
    every = product([options.data], options.seeds, sizes, options.starts, options.nets, [options.label])
    left = [case for case in map(Case._make, every) if case not in done]
    return sorted(left, key=lambda case: sizes.index(case.size) + options.nets.index(case.net))


def work(todo: Any, options: argparse.Namespace) -> None:
    """What one process does: cases, until there are no more."""
    torch.set_num_threads(1)
    failed = False
    for case in iter(todo.get, None):
        if options.last_start and time.time() > options.begun + options.last_start:
            continue
        try:
            row = run_case(case, options) | options.machine
            append_lines(options.work / ROWS, json_line(row))
            print(*(row[name] for name in row if name not in options.machine), flush=True)
        except Stopped:
            raise
        except Exception:
            failed = True
            print(f"{case.name} failed", flush=True)
            traceback.print_exc()
        finally:
            end_readers()
            gc.collect()
            torch.cuda.empty_cache()
    sys.exit(int(failed))


def run_cases(options: argparse.Namespace) -> bool:
    """All cases, each process on one of the GPUs; whether all went well."""
    context = get_context("spawn")
    todo, processes = context.Queue(), []
    for case in [*cases(options), *[None] * options.processes]:
        todo.put(case)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    for number in range(options.processes):
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[number % len(gpus.split(","))]
        processes.append(context.Process(target=work, args=(todo, options)))
        processes[-1].start()
    for process in processes:
        process.join()
    return all(process.exitcode == 0 for process in processes)


def main() -> None:
    """Train and evaluate all cases; print and draw."""
    options = parse_options()
    options.begun = time.time()
    options.work.mkdir(parents=True, exist_ok=True)
    options.machine = {
        "device": clock("cuda" if torch.cuda.is_available() else "cpu"),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    good = run_cases(options)
    if rows := [row for row in read_rows(options.work / ROWS) if row["data"] == options.data]:
        print_table(rows)
        if options.out:
            run = f"{options.data}, Vim of {options.depth} blocks, {rows[0]['step']} steps"
            write_csv(options.out / f"{options.data}.csv", rows, {"run": run})
            draw(options.out / f"{options.data}.png", rows, run)
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
