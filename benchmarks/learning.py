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
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.vit import blocks_of
from finetune.classification.config import ClassificationConfig
from finetune.classification.task import run as classify
from finetune.sample_data import Sizes, digits
from launch.cli import parse
from launch.folder import CHECKPOINTS
from pretrain.config import PretrainConfig
from pretrain.train import build_model, pretrain

DEPTHS = {"vim": 4, "vit": 2}
"""Blocks of width 192; a ViT's block has about twice the parameters of a Vim's."""
SIZE, PATCH = 32, 4
TRAIN, VAL = 1297, 500
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
    parser.add_argument("--epochs", type=int, default=60, help="of pretraining")
    parser.add_argument("--mask", type=float, default=0.75, help="share of the patches that is hidden")
    parser.add_argument("--pretrain-lr", type=float, default=4e-3, help="of pretraining, per 256 pictures")
    parser.add_argument("--shots", type=int, nargs="+", default=[5], help="labelled pictures of each class")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning, of 50 pictures each")
    parser.add_argument(
        "--tuned-lr", type=float, default=1e-2, help="of fine-tuning pretrained weights, per 256 pictures"
    )
    parser.add_argument("--scratch-lr", type=float, default=1e-2, help="of training fresh weights, per 256 pictures")
    parser.add_argument("--layer-decay", type=float, default=0.65, help="of fine-tuning pretrained weights")
    parser.add_argument("--threads", type=int, help="of the CPU")
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
            last = max(backbones)
            for shots in self.options.shots:
                few = (f"--data.shots={shots}", f"--steps={self.options.steps}", "--batch_size=50")
                warm = ("--optim.warmup_steps=15", "--optim.clip_grad=1")
                tuned = (f"--optim.base_lr={self.options.tuned_lr}", f"--optim.layer_decay={self.options.layer_decay}")
                fresh = (
                    f"--optim.base_lr={self.options.scratch_lr}",
                    "--optim.layer_decay=1",
                    "--model.from_scratch=true",
                )
                for what, how in (("pretrained", tuned), ("scratch", fresh)):
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
            f"--steps={total}", f"--batch_size={batch}", f"--optim.base_lr={self.options.pretrain_lr}",
            "--optim.warmup_steps=40", "--optim.clip_grad=1", f"--mask.ratio={self.options.mask}",
            f"--model.img_size={SIZE}", f"--model.patch_size={PATCH}", f"--model.depth={DEPTHS[self.net]}",
            "--decoder.width=96", "--decoder.depth=1", "--data.flip=false", "--data.min_scale=0.6",
            f"--checkpoint_every={every}", f"--keep_every={every}", f"--picture_every={total}",
        ], "pretrain/main.py", "")  # fmt: skip
        encoder = build_model(config).encoder  # the weights that the run starts with
        found = {0: encoder.save_pretrained(self.work / "at-0")}
        with contextlib.redirect_stderr(io.StringIO()):
            folder = pretrain(config)
        for step in points[1:]:
            near = min((p for p in (folder / CHECKPOINTS).glob("step-*")), key=lambda p: abs(int(p.name[5:]) - step))
            tensors = load_file(near / "model.safetensors")
            encoder.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("encoder.")})
            done = int(near.name[5:])
            found[done] = encoder.save_pretrained(self.work / f"at-{done}")
        return found

    def classify(self, backbone: Path, *how: str) -> float:
        """Top-1 on the validation pictures."""
        config = parse(ClassificationConfig, [
            f"--backbone={backbone}", f"--data.source={self.data}", f"--out={self.work}", f"--seed={self.seed}", *QUIET,
            *PLAIN, "--model.global_pool=avg", "--pictures=1", f"--optim.half_rate={str(self.net == 'vim').lower()}", *how,
        ], "finetune/main.py", "")  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):
            folder = classify(config)
        (metrics,) = folder.glob("evaluations/step-*/metrics.json")
        return json.loads(metrics.read_text())["top1"]


def main() -> None:
    """Run all seeds, print and draw."""
    options = options_given()
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    rows = [row for seed in options.seeds for net in options.nets for row in Seed(net, seed, options).run()]
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
