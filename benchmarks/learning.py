"""Does pretraining help? Few labels, several seeds; Vim with the full and the pooled scan beside a ViT.

`python -m benchmarks.learning` draws scikit-learn's digits, pretrains on the training pictures without their labels,
evaluates the frozen features at several points on the way, and fine-tunes on a few labels of each class, from the
pretrained and from fresh weights. `--data cifar10 --folder FOLDER` does the same with CIFAR-10's parquet files, and
`--data tinyimagenet` with Tiny ImageNet's. `--objectives mae nepa ar` compares what is learned without labels. All nets
go through the engines of pretrain/ and finetune/, and differ in their blocks alone. Each seed has weights, masks and
labels of its own. Prints means and spreads; `--out` gets learning.csv and learning.png.
"""

import argparse
import contextlib
import io
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from safetensors.torch import load_file

from benchmarks.machine import clock, versions, write_csv
from benchmarks.vit import blocks_of
from finetune.classification.config import ClassificationConfig
from finetune.classification.task import ClassificationTask
from finetune.sample_data import Sizes, digits
from finetune.train import finetune
from launch.run.cli import parse
from launch.run.folder import CHECKPOINTS
from pretrain.config import PretrainConfig
from pretrain.train import build_model, pretrain

NETS = {"vim": "tab:blue", "pooled": "tab:green", "vit": "tab:orange"}
"""Nets, each with its colour: Vim by its full and by its pooled scan, and a ViT of half the blocks, which have about
twice the parameters of a Vim's."""
OBJECTIVES = {"mae": 1.0, "nepa": 0.75, "ar": 0.55}
"""Objectives, each with the strength of its colour."""
CAUSAL = [name for name in OBJECTIVES if name != "mae"]
STYLES = {"linear": "-", "knn": "--"}
TRAIN, VAL = 1297, 500
"""Pictures of the digits."""
QUIET = ["--trackers=[]", "--overwrite", "--model.drop_path_rate=0"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A set of pictures, and how nets are pretrained and fine-tuned on it."""

    size: int
    """Side of the pictures in pixels."""
    patch: int
    depth: int
    """Blocks of Vim."""
    decoder: tuple[int, int]
    """Width, and Vim blocks."""
    pictures: int
    """To pretrain on."""
    pretraining_batch: int
    pretraining: list[str]
    augmentation: list[str]
    tuning: list[tuple[int | None, int]]
    """Labels of each class, None for all of them, and steps of fine-tuning with them."""
    batch: int
    """Of fine-tuning."""
    rates: dict[str, dict[str, float]]
    """Net -> learning rates of fine-tuning per 256 pictures."""
    points: tuple[float, ...]
    """Shares of the pretraining after which frozen features are evaluated."""


PLAIN = ["--augment.auto_augment=null", "--augment.color_jitter=0", "--augment.mixup=0", "--augment.cutmix=0",
         "--augment.erasing=0", "--augment.crop_pct=1"]  # fmt: skip
REAL = Recipe(
    size=32, patch=4, depth=12, decoder=(192, 2),
    pictures=50000, pretraining_batch=1024,
    pretraining=["--optim.base_lr=1e-3", "--optim.warmup_steps=100", "--data.min_scale=0.4"],
    augmentation=[*PLAIN, "--augment.flip=0.5", "--augment.min_scale=0.4"],
    tuning=[(500, 200), (None, 500)], batch=512,
    rates={net: {"pretrained": 1e-3, "scratch": 1e-3} for net in NETS},
    points=(1.0,),
)  # fmt: skip
RECIPES = {
    "digits": Recipe(
        size=32, patch=4, depth=4, decoder=(96, 1),
        pictures=TRAIN, pretraining_batch=64,
        pretraining=["--optim.base_lr=4e-3", "--optim.warmup_steps=20", "--data.flip=false", "--data.min_scale=0.6"],
        augmentation=[*PLAIN, "--augment.flip=0", "--augment.min_scale=0.6"],
        tuning=[(5, 100)], batch=50,
        rates={"vim": {"pretrained": 1e-2, "scratch": 1e-2}, "pooled": {"pretrained": 1e-2, "scratch": 1e-2},
               "vit": {"pretrained": 1e-2, "scratch": 3e-3}},  # the better of 3e-3 and 1e-2 on seed 100
        points=(0.0, 0.1, 0.3, 1.0),
    ),
    "cifar10": REAL,
    "tinyimagenet": replace(REAL, size=64, patch=8, tuning=[(25, 200), (None, 500)]),
}  # fmt: skip


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=RECIPES, default="digits")
    parser.add_argument("--folder", type=Path, help="the parquet files of the real sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["vim", "vit"])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["mae"], help="of pretraining")
    parser.add_argument("--epochs", type=int, default=15, help="of pretraining")
    parser.add_argument("--rates", type=float, nargs="+", help="try these rates of fine-tuning instead of the recipe's")
    parser.add_argument("--processes", type=int, default=1, help="seeds and nets that run at the same time")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures, for each of them")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="folder for data and runs")
    parser.add_argument("--out", type=Path, help="folder for learning.csv and learning.png")
    options = parser.parse_args()
    if options.data != "digits" and not options.folder:
        parser.error(f"--data {options.data} needs --folder, with its parquet files")
    if "pooled" in options.nets and set(options.objectives) & set(CAUSAL):
        parser.error(f"the pooled scan learns by mae alone, not by {', '.join(CAUSAL)}")
    return options


class Seed:
    """One net and objective, all of whose randomness follows from one seed."""

    def __init__(self, net: str, objective: str, seed: int, options: argparse.Namespace) -> None:
        self.net, self.seed, self.options, self.recipe = net, seed, options, RECIPES[options.data]
        self.objective = objective
        self.work = options.work / f"{net}-{objective}-{seed}"
        self.data = options.folder or options.work / f"digits-{seed}"
        self.quiet = [*QUIET, f"--data.workers={options.workers}", f"--precision={options.precision}"]
        self.rows: list[dict[str, Any]] = []

    def note(self, what: str, labels: int, step: int, top1: float) -> None:
        """Keep and print one score."""
        learned = {"net": self.net, "objective": "" if what.startswith("scratch") else self.objective}
        row = {"seed": self.seed} | learned | {"what": what, "labels": labels, "step": step, "top1": top1}
        self.rows.append(row)
        print(*row.values(), flush=True)

    def run(self) -> list[dict[str, Any]]:
        """Pretrain, probe, fine-tune."""
        if not self.options.folder and not self.data.exists():
            digits(self.data, Sizes(TRAIN, VAL, self.recipe.size, self.seed))
        with blocks_of("vit" if self.net == "vit" else "vim"):
            backbones = self.pretrained()
            for step, folder in backbones.items():
                for mode in STYLES:
                    self.note(
                        mode, 0, step, self.classify(folder, f"--mode={mode}", f"--batch_size={self.recipe.batch}")
                    )
            last = max(backbones)
            for (shots, steps), (start, rate) in self.tunings():
                few = [f"--data.shots={shots}"] if shots else []
                how = (f"--steps={steps}", f"--batch_size={self.recipe.batch}", f"--optim.warmup_steps={steps // 10}",
                       "--optim.clip_grad=1", f"--optim.base_lr={rate}",
                       f"--optim.layer_decay={1 if start == 'scratch' else 0.65}",
                       f"--model.from_scratch={str(start == 'scratch').lower()}")  # fmt: skip
                what = f"{start} {rate:g}" if self.options.rates else start
                self.note(what, shots or -1, last, self.classify(backbones[last], *few, *how))
        return self.rows

    def tunings(self) -> Iterator[tuple[tuple[int | None, int], tuple[str, float]]]:
        """Labels of each class and steps, with the start and the rate; from scratch once for all objectives."""
        for budget in self.recipe.tuning:
            for start, rate in self.recipe.rates[self.net].items():
                if start == "scratch" and self.objective != self.options.objectives[0]:
                    continue
                for tried in self.options.rates or [rate]:
                    yield budget, (start, tried)

    def pretrained(self) -> dict[int, Path]:
        """Step -> the folder of the backbone as it was then."""
        recipe, halves = self.recipe, 2 if self.net == "vit" else 1
        width, depth = recipe.decoder
        decoders = {"mae": [f"--decoder.width={width}", f"--decoder.depth={max(1, depth // halves)}"],
                    "ar": [f"--ar.width={width}", f"--ar.depth={depth}"]}  # fmt: skip
        source = self.data / ("train*.parquet" if self.options.folder else "train")
        total = self.options.epochs * recipe.pictures // recipe.pretraining_batch
        wanted = [round(total * share) for share in recipe.points if share]
        every = max(1, wanted[0])
        config = parse(PretrainConfig, [
            f"--data.source={source}", f"--out={self.work}", f"--seed={self.seed}", *self.quiet, *recipe.pretraining,
            f"--steps={total}", f"--batch_size={recipe.pretraining_batch}", "--optim.clip_grad=1",
            f"--model.img_size={recipe.size}", f"--model.patch_size={recipe.patch}",
            f"--model.depth={recipe.depth // halves}",
            f"--model.scan={'pooled' if self.net == 'pooled' else 'full'}",
            f"--objective={self.objective}", *decoders.get(self.objective, []),
            f"--checkpoint_every={every}", f"--keep_every={every}", f"--picture_every={total}",
        ], "pretrain/main.py", "")  # fmt: skip
        encoder = config.method.encoder(build_model(config))  # the weights that the run starts with
        backbones = {0: encoder.save_pretrained(self.work / "at-0")} if 0.0 in recipe.points else {}
        with contextlib.redirect_stderr(io.StringIO()):
            folder = pretrain(config)
        for step in wanted:
            saved = min((folder / CHECKPOINTS).glob("step-*"), key=lambda path: abs(int(path.name[5:]) - step))
            tensors = load_file(saved / "model.safetensors")
            encoder.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("encoder.")})
            done = int(saved.name[5:])
            backbones[done] = encoder.save_pretrained(self.work / f"at-{done}")
        return backbones

    def classify(self, backbone: Path, *how: str) -> float:
        """Top-1 on the validation pictures."""
        source = f"hf:{self.data}" if self.options.folder else self.data
        halved = str(self.net != "vit").lower()  # a ViT's block counts for two of Vim's
        config = parse(ClassificationConfig, [
            f"--backbone={backbone}", f"--data.source={source}", f"--out={self.work}", f"--seed={self.seed}",
            *self.quiet, *self.recipe.augmentation, "--model.global_pool=avg", "--pictures=1",
            f"--optim.half_rate={halved}", *how,
        ], "finetune/main.py", "")  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):
            folder = finetune(ClassificationTask(config))
        (metrics,) = folder.glob("evaluations/step-*/metrics.json")
        return json.loads(metrics.read_text())["top1"]


KEY = ("net", "objective", "what", "labels", "step")
"""What the seeds have in common."""


def name_of(entry: dict[str, Any]) -> str:
    """Net and objective, in words."""
    return f"{entry['net']} {entry['objective']}".strip()


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, of every score."""
    scores_of: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        scores_of.setdefault(tuple(row[name] for name in KEY), []).append(row["top1"])
    return [
        dict(zip(KEY, key, strict=True))
        | {"mean": mean(scores), "deviation": stdev(scores) if len(scores) > 1 else 0.0, "seeds": len(scores)}
        for key, scores in scores_of.items()
    ]


def labels_of(count: int) -> str:
    """A number of labels of each class, in words."""
    return {-1: "all labels", 0: "frozen"}.get(count, f"{count} labels a class")


def draw(path: Path, rows: list[dict[str, Any]], about: dict[str, str]) -> None:
    """Frozen features over the pretraining, or at its end, and fine-tuning with and without it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    means = summary(rows)
    frozen = [entry for entry in means if entry["what"] in STYLES]
    if len({entry["step"] for entry in frozen}) > 1:
        lines(left, frozen)
    else:
        bars(left, frozen, rows)
    left.set(title="frozen features")
    bars(right, [entry for entry in means if entry["what"] not in STYLES], rows)
    right.set(title="fine-tuned")
    figure.suptitle(f"{about['run']}; {about['device']}", fontsize=9)
    figure.savefig(path, dpi=130)


def lines(axes: Axes, means: list[dict[str, Any]]) -> None:
    """Scores over the steps of pretraining; a bar is a deviation of the seeds."""
    for net, objective, what in itertools.product(NETS, OBJECTIVES, STYLES):
        points = [
            entry for entry in means if (entry["net"], entry["objective"], entry["what"]) == (net, objective, what)
        ]
        if points:
            steps, scores = [e["step"] for e in points], [e["mean"] for e in points]
            axes.errorbar(steps, scores, [e["deviation"] for e in points],
                          label=f"{name_of(points[0])}, {what}", color=NETS[net], alpha=OBJECTIVES[objective],
                          linestyle=STYLES[what], marker="o", markersize=4, capsize=3)  # fmt: skip
    axes.set(xlabel="steps of pretraining")
    axes.legend(loc="lower right", fontsize=9)


def bars(axes: Axes, means: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Means with their values, best at the top, and a dot for each seed."""
    means = sorted(means, key=lambda entry: entry["mean"])
    for place, entry in enumerate(means):
        key = {name: entry[name] for name in KEY[:-1]}
        scores = [row["top1"] for row in rows if row.items() >= key.items()]
        plain = entry["what"].startswith("scratch") or entry["what"] == "knn"
        strength = OBJECTIVES.get(entry["objective"], 1.0)
        axes.barh(place, entry["mean"], color=NETS[entry["net"]], alpha=0.4 * strength if plain else strength)
        axes.plot(scores, [place] * len(scores), "o", color="black", markersize=3)
        axes.text(0.01, place, f"{entry['mean']:.3f}", va="center")
    shown = [f"{name_of(e)}, {e['what']}" + (f"\n{labels_of(e['labels'])}" if e["labels"] else "") for e in means]
    axes.set_yticks(range(len(means)), shown, fontsize=8)
    axes.set(xlim=(0, 1), xlabel="top-1")


def run_seed(net: str, objective: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All scores of one net, objective and seed."""
    torch.set_num_threads(options.threads)
    return Seed(net, objective, seed, options).run()


def scores(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Those of each net, objective and seed, as they are done."""
    cases = [(*case, options) for case in itertools.product(options.nets, options.objectives, options.seeds)]
    cases.sort(key=lambda case: options.seeds.index(case[2]))
    if options.processes == 1:
        yield from (run_seed(*case) for case in cases)
        return
    with ProcessPoolExecutor(options.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        yield from (done.result() for done in as_completed([pool.submit(run_seed, *case) for case in cases]))


def main() -> None:
    """Run all seeds, print and draw."""
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "run": f"{options.data}, {options.epochs} epochs of {', '.join(options.objectives)}",
        "device": clock(device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    rows: list[dict[str, Any]] = []
    for done in scores(options):
        rows += done
        if options.out:
            write_csv(options.out / "learning.csv", rows, about)
    print("\n" + "\n".join(about.values()) + "\n")
    print(
        "| net | objective | evaluated by | labels | steps of pretraining | top-1, mean | deviation | seeds |\n"
        + "|---" * 8
        + "|"
    )
    for entry in summary(rows):
        values = (entry["net"], entry["objective"], entry["what"], labels_of(entry["labels"]), entry["step"])
        print("| " + " | ".join(map(str, values)), end=" | ")
        print(f"{entry['mean']:.3f} | {entry['deviation']:.3f} | {entry['seeds']} |")
    if options.out:
        draw(options.out / "learning.png", rows, about)


if __name__ == "__main__":
    main()
