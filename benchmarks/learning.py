"""Does masked pretraining help? Scikit-learn's digits, few labels, several seeds; a ViT of the same size beside Vim.

`python -m benchmarks.learning` draws the digits, pretrains on the training pictures without their labels, judges the
frozen features at several points on the way, and fine-tunes on a few labels of each class, from the pretrained and from
fresh weights. Both nets go through the engines of pretrain/ and finetune/, and differ in their blocks alone. Each seed
has its own split, weights, masks and labels. Prints means and spreads; `--out` gets learning.csv and learning.png.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
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

DEPTHS = {"vim": 4, "vit": 2}
"""Blocks of width 192; a ViT's block has about twice the parameters of a Vim's."""
SIZE, PATCH = 32, 4
TRAIN, VAL = 1297, 500
RATES = {"vim": {"pretrained": 1e-2, "scratch": 1e-2}, "vit": {"pretrained": 1e-2, "scratch": 3e-3}}
"""Learning rates of fine-tuning per 256 pictures: the better one of 3e-3 and 1e-2 on seed 100."""
POINTS = (0.0, 0.1, 0.3, 1.0)
"""Shares of the pretraining after which frozen features are judged."""
QUIET = ["--trackers=[]", "--data.workers=0", "--overwrite", "--model.drop_path_rate=0"]
PLAIN = ["--augment.auto_augment=null", "--augment.color_jitter=0", "--augment.mixup=0", "--augment.cutmix=0",
         "--augment.erasing=0", "--augment.flip=0", "--augment.min_scale=0.6", "--augment.crop_pct=1"]  # fmt: skip


def options_given() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nets", nargs="+", choices=DEPTHS, default=list(DEPTHS))
    parser.add_argument("--epochs", type=int, default=15, help="of pretraining")
    parser.add_argument("--shots", type=int, default=5, help="labelled pictures of each class")
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning, of 50 pictures each")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="folder for data and runs")
    parser.add_argument("--out", type=Path, help="folder for learning.csv and learning.png")
    return parser.parse_args()


class Seed:
    """One net, all of whose randomness follows from one seed."""

    def __init__(self, net: str, seed: int, options: argparse.Namespace) -> None:
        self.net, self.seed, self.options = net, seed, options
        self.work = options.work / f"{net}-{seed}"
        self.data = options.work / f"digits-{seed}"
        self.rows: list[dict[str, Any]] = []

    def note(self, what: str, labels: int, step: int, top1: float) -> None:
        """Keep and print one score."""
        row = {"seed": self.seed, "net": self.net, "what": what, "labels": labels, "step": step, "top1": top1}
        self.rows.append(row)
        print(*row.values(), flush=True)

    def run(self) -> list[dict[str, Any]]:
        """Pretrain, probe, fine-tune."""
        if not self.data.exists():
            digits(self.data, Sizes(TRAIN, VAL, SIZE, self.seed))
        with blocks_of(self.net):
            backbones = self.pretrained()
            for step, folder in backbones.items():
                for mode in ("linear", "knn"):
                    self.note(mode, TRAIN, step, self.classify(folder, f"--mode={mode}"))
            last, shots = max(backbones), self.options.shots
            few = (f"--data.shots={shots}", f"--steps={self.options.steps}", "--batch_size=50")
            warm = (f"--optim.warmup_steps={self.options.steps // 10}", "--optim.clip_grad=1")
            for what, rate in RATES[self.net].items():
                fresh = what == "scratch"
                how = (f"--optim.base_lr={rate}", f"--optim.layer_decay={1 if fresh else 0.65}",
                       f"--model.from_scratch={str(fresh).lower()}")  # fmt: skip
                self.note(what, 10 * shots, last, self.classify(backbones[last], *few, *warm, *how))
        return self.rows

    def pretrained(self) -> dict[int, Path]:
        """Step -> the folder of the backbone as it was then."""
        batch = 64
        total = self.options.epochs * TRAIN // batch
        points = [round(total * share) for share in POINTS]
        every = max(1, points[1])
        config = parse(PretrainConfig, [
            f"--data.source={self.data}/train", f"--out={self.work}", f"--seed={self.seed}", *QUIET,
            f"--steps={total}", f"--batch_size={batch}", "--optim.base_lr=4e-3",
            "--optim.warmup_steps=20", "--optim.clip_grad=1",
            f"--model.img_size={SIZE}", f"--model.patch_size={PATCH}", f"--model.depth={DEPTHS[self.net]}",
            "--decoder.width=96", "--decoder.depth=1", "--data.flip=false", "--data.min_scale=0.6",
            f"--checkpoint_every={every}", f"--keep_every={every}", f"--picture_every={total}",
        ], "pretrain/main.py", "")  # fmt: skip
        encoder = config.objective.encoder(build_model(config))  # the weights that the run starts with
        backbones = {0: encoder.save_pretrained(self.work / "at-0")}
        with contextlib.redirect_stderr(io.StringIO()):
            folder = pretrain(config)
        for step in points[1:]:
            saved = min((folder / CHECKPOINTS).glob("step-*"), key=lambda path: abs(int(path.name[5:]) - step))
            tensors = load_file(saved / "model.safetensors")
            encoder.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("encoder.")})
            done = int(saved.name[5:])
            backbones[done] = encoder.save_pretrained(self.work / f"at-{done}")
        return backbones

    def classify(self, backbone: Path, *how: str) -> float:
        """Top-1 on the validation pictures."""
        halved = str(self.net == "vim").lower()  # a ViT's block counts for two of Vim's
        config = parse(ClassificationConfig, [
            f"--backbone={backbone}", f"--data.source={self.data}", f"--out={self.work}", f"--seed={self.seed}",
            *QUIET, *PLAIN, "--model.global_pool=avg", "--pictures=1", f"--optim.half_rate={halved}", *how,
        ], "finetune/main.py", "")  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):
            folder = finetune(ClassificationTask(config))
        (metrics,) = folder.glob("evaluations/step-*/metrics.json")
        return json.loads(metrics.read_text())["top1"]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, of every score."""
    scores_of: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        scores_of.setdefault((row["net"], row["what"], row["labels"], row["step"]), []).append(row["top1"])
    return [
        dict(zip(("net", "what", "labels", "step"), key, strict=True))
        | {"mean": mean(scores), "deviation": stdev(scores) if len(scores) > 1 else 0.0, "seeds": len(scores)}
        for key, scores in scores_of.items()
    ]


def draw(path: Path, rows: list[dict[str, Any]], about: dict[str, str]) -> None:
    """Probes over the pretraining, and few labels with and without it; a line or dot for each seed, bars for means."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours, styles = {"vim": "tab:blue", "vit": "tab:orange"}, {"linear": "-", "knn": "--"}
    means = summary(rows)
    for (net, colour), (what, style) in ((n, w) for n in colours.items() for w in styles.items()):
        points = [entry for entry in means if (entry["net"], entry["what"]) == (net, what)]
        if points:
            steps, scores = [e["step"] for e in points], [e["mean"] for e in points]
            left.errorbar(steps, scores, [e["deviation"] for e in points], label=f"{net}, {what}", color=colour,
                          linestyle=style, marker="o", markersize=4, capsize=3)  # fmt: skip
    left.set(title="frozen features", xlabel="steps of pretraining", ylabel="top-1 of ten digits")
    left.legend(loc="lower right", fontsize=9)
    tuned = [entry for entry in means if entry["what"] in ("pretrained", "scratch")]
    for place, entry in enumerate(tuned):
        scores = [r["top1"] for r in rows if (r["net"], r["what"]) == (entry["net"], entry["what"])]
        right.bar(place, entry["mean"], color=colours[entry["net"]], alpha=1 if entry["what"] == "pretrained" else 0.4)
        right.plot([place] * len(scores), scores, "o", color="black", markersize=4)
    right.set_xticks(range(len(tuned)), [f"{entry['net']}\n{entry['what']}" for entry in tuned])
    right.set(title=f"fine-tuned on {tuned[0]['labels']} labels", ylim=(0, 1))
    figure.suptitle(f"{about['run']}; {about['device']}", fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run all seeds, print and draw."""
    options = options_given()
    torch.set_num_threads(options.threads)
    about = {
        "run": f"digits, {options.epochs} epochs of MAE, {options.steps} steps of fine-tuning",
        "device": clock("cpu"),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = [row for seed in options.seeds for net in options.nets for row in Seed(net, seed, options).run()]
    print("\n" + "\n".join(about.values()) + "\n")
    print("| net | judged by | labels | steps of pretraining | top-1, mean | deviation | seeds |\n" + "|---" * 7 + "|")
    for entry in summary(rows):
        scores = f"{entry['mean']:.3f} | {entry['deviation']:.3f}"
        print(
            f"| {entry['net']} | {entry['what']} | {entry['labels']} | {entry['step']} | {scores} | {entry['seeds']} |"
        )
    if options.out:
        write_csv(options.out / "learning.csv", rows, about)
        draw(options.out / "learning.png", rows, about)


if __name__ == "__main__":
    main()
