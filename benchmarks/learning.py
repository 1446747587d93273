"""Does pretraining help? Few labels, several seeds; Vim with the full and the pooled scan beside a ViT.

`python -m benchmarks.learning` draws scikit-learn's digits, pretrains on the training pictures without their labels,
evaluates the frozen features at several points on the way, and fine-tunes on a few labels of each class, from the
pretrained and from fresh weights. `--data cifar10 --folder FOLDER` does the same with CIFAR-10's parquet files, and
`--data tinyimagenet` with Tiny ImageNet's. `--objectives scratch mae nepa ar` compares what is learned without labels.
All nets go through the engines of pretrain/ and finetune/, and differ in their blocks alone. Each seed has weights,
masks and labels of its own.

A case is a net, an objective and a seed. Its scores are written and printed as they are made, in a folder of its own
below `--work`; the same command goes on with what is not there yet, and several commands, each with cases of its own,
can share the folder and a GPU. The table at the end, and learning.csv and learning.png in `--out`, are of all cases in
the folder. Pretraining has the same epochs or `--steps` for all objectives, or, with `--seconds`, as many steps as each
took in so long when it was measured, once, by `--measure` or by the first case.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.learning_page import STYLES, draw, print_table
from benchmarks.learning_recipes import NETS, OBJECTIVES, RECIPES, TRAIN, VAL
from benchmarks.machine import clock, versions, write_csv
from benchmarks.vit import blocks_of
from finetune.classification.config import ClassificationConfig
from finetune.classification.task import ClassificationTask
from finetune.model_folder import read_weights
from finetune.sample_data import Sizes, digits
from finetune.train import finetune
from launch.run.cli import parse
from launch.run.folder import CHECKPOINTS
from launch.run.metrics import METRICS, read_rows
from launch.run.signals import Stopped
from pretrain.config import PretrainConfig
from pretrain.train import build_model, pretrain
from vim_backbone import VisionMamba, from_pretrained
from vim_backbone.files import append_lines, json_line

CAUSAL = ["nepa", "ar"]
QUIET = ["--trackers=[]", "--model.drop_path_rate=0"]
ROWS, SETTINGS = "rows.jsonl", "settings.json"
PENALTIES = [1e-5, 1e-3, 1e-1]
"""Of which the linear probe chooses."""
MEASURED_STEPS, WARM_STEPS = 60, 20
"""Of `--measure`: how many are run, and how many of them do not count."""
SAME_FOR_ALL = (
    "data",
    "precision",
    "epochs",
    "steps",
    "seconds",
    "tune",
    "rates",
    "pretrain_with",
    "tune_with",
    "teacher",
    "cache",
)
"""Options that all cases of a name in a folder must share."""


def labels_and_steps(text: str) -> tuple[int | None, int]:
    """LABELS:STEPS of the command line."""
    labels, _, steps = text.partition(":")
    return None if labels == "all" else int(labels), int(steps)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=RECIPES, default="digits")
    parser.add_argument("--folder", type=Path, help="the parquet files of the real sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["vim", "vit"])
    text = "of pretraining; scratch: fine-tuning from fresh weights"
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["scratch", "mae"], help=text)
    parser.add_argument("--teacher", help="of --objectives distill: a model of timm, such as local-dir:FOLDER")
    parser.add_argument("--epochs", type=int, default=15, help="of pretraining")
    parser.add_argument("--steps", type=int, help="of pretraining, in place of --epochs")
    text = "of pretraining, in place of --epochs: each net and objective has the steps that it does in so long"
    parser.add_argument("--seconds", type=float, help=text)
    text = "measure the steps of --seconds, with nothing else on the machine, and end"
    parser.add_argument("--measure", action="store_true", help=text)
    parser.add_argument("--tune", type=labels_and_steps, nargs="*", metavar="LABELS:STEPS",
                        help="of fine-tuning: labels of each class or all, in place of the recipe's")  # fmt: skip
    parser.add_argument("--rates", type=float, nargs="+", help="try these rates of fine-tuning instead of the recipe's")
    parser.add_argument("--label", default="", help="name of these settings in the table, such as gap")
    text = "more fields of pretraining, such as mae.gap_aware=true"
    parser.add_argument("--pretrain-with", nargs="+", default=[], metavar="FIELD=VALUE", help=text)
    text = "more fields of fine-tuning, such as augment.mixup=0.8"
    parser.add_argument("--tune-with", nargs="+", default=[], metavar="FIELD=VALUE", help=text)
    text = "leave what was fine-tuned on all labels as a backbone, teacher/, which can teach"
    parser.add_argument("--publish", action="store_true", help=text)
    parser.add_argument("--processes", type=int, default=1, help="cases that run at the same time")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures, for each of them")
    text = "decode the pictures once in each process and cut views on the device; --workers are for decoding"
    parser.add_argument("--cache", action="store_true", help=text)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="folder for data and runs")
    parser.add_argument("--out", type=Path, help="folder for learning.csv and learning.png")
    options = parser.parse_args(argv)
    if options.data != "digits" and not options.folder:
        parser.error(f"--data {options.data} needs --folder, with its parquet files")
    if "pooled" in options.nets and set(options.objectives) & set(CAUSAL):
        parser.error(f"the pooled scan does not learn by {' or '.join(CAUSAL)}")
    if ("distill" in options.objectives) != bool(options.teacher):
        parser.error("--objectives distill and --teacher go together")
    if options.steps is not None and options.seconds is not None:
        parser.error("give --steps or --seconds, not both")
    if options.measure and options.seconds is None:
        parser.error("--measure goes with --seconds")
    if "vit" in options.nets and any("gap_aware=true" in word for word in options.pretrain_with):
        parser.error("--pretrain-with mae.gap_aware=true is of Vim: a ViT has no scan")
    if options.publish and set(options.nets) - {"vim", "pooled"}:
        parser.error("--publish is of Vim: timm does not know the ViT of these benchmarks")
    return options


def silent(engine: Callable[[Any], Path], config: Any) -> Path:
    """The folder of a run, without what it prints."""
    with contextlib.redirect_stderr(io.StringIO()):
        return engine(config)


def end_readers() -> None:
    """Processes that read pictures do not mind signals: this one would wait for those that are left when it ends."""
    gc.collect()
    for child in active_children():
        child.kill()


class Case:
    """One net and objective, all of whose randomness follows from one seed."""

    def __init__(self, net: str, objective: str, seed: int, options: argparse.Namespace) -> None:
        self.net, self.seed, self.options, self.recipe = net, seed, options, RECIPES[options.data]
        self.objective = objective
        name = "-".join(filter(None, (net, objective, options.label, str(seed))))
        self.work = options.work / name
        self.data = options.folder or self.work / "digits"
        self.quiet = [*QUIET, f"--data.workers={options.workers}", f"--precision={options.precision}",
                      f"--out={self.work}", f"--seed={seed}", *["--data.cache=device"] * options.cache]  # fmt: skip
        self.halves = 2 if net == "vit" else 1
        self.rows: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Make the folder, or read what was done in it. Raises SystemExit where that had other settings."""
        settings = {name: getattr(self.options, name) for name in SAME_FOR_ALL if name not in self.without()}
        settings = {
            name: value for name, value in settings.items() if value is not False
        }  # folders of before have none
        settings = json.loads(json.dumps(settings, default=str))
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / SETTINGS
        if path.exists() and (before := json.loads(path.read_text())) != settings:
            name = next(name for name in before | settings if before.get(name) != settings.get(name))
            sys.exit(f"{self.work} was made with {name} {before.get(name)}: take another --label or --work")
        path.write_text(json.dumps(settings))
        self.rows = read_rows(self.work / ROWS)
        if not self.options.folder and not self.data.exists():
            digits(self.data, Sizes(TRAIN, VAL, self.recipe.size, self.seed))

    def without(self) -> tuple[str, ...]:
        """Settings that change nothing of it."""
        if self.objective == "scratch":
            return ("epochs", "steps", "seconds", "teacher")
        return () if self.objective == "distill" else ("teacher",)

    def note(self, what: str, labels: int, step: int, score: Callable[[], float], pretraining: float) -> None:
        """Make, keep and print one score, unless it is there."""
        if any((row["what"], row["labels"], row["step"]) == (what, labels, step) for row in self.rows):
            return
        start = time.perf_counter()
        top1 = score()
        row = {
            "seed": self.seed, "net": self.net, "objective": "" if self.objective == "scratch" else self.objective,
            "label": self.options.label, "what": what, "labels": labels, "step": step, "top1": top1,
            "pretraining_minutes": round(pretraining, 3), "minutes": round((time.perf_counter() - start) / 60, 3),
        }  # fmt: skip
        self.rows.append(row)
        append_lines(self.work / ROWS, json_line(row))
        print(*row.values(), flush=True)

    def run(self) -> None:
        """Pretrain, probe, fine-tune."""
        self.begin()
        with blocks_of("vit" if self.net == "vit" else "vim"):
            backbones, minutes = self.pretrained()
            for step, folder in backbones.items():
                share = minutes * step / max(1, max(backbones))
                for mode in STYLES if self.objective != "scratch" else ():
                    how = (f"--mode={mode}", f"--batch_size={self.recipe.batch}", f"--probe.penalties={PENALTIES}")
                    self.note(mode, 0, step, lambda folder=folder, how=how: self.classify(folder, *how), share)
            last = max(backbones)
            for (shots, steps), rate in self.tunings():
                few = [f"--data.shots={shots}"] if shots else []
                start = "scratch" if self.objective == "scratch" else "pretrained"
                how = (f"--steps={steps}", f"--batch_size={self.recipe.batch}", f"--optim.warmup_steps={steps // 10}",
                       "--optim.clip_grad=1", f"--optim.base_lr={rate}",
                       f"--optim.layer_decay={1 if start == 'scratch' else 0.65}",
                       f"--model.from_scratch={str(start == 'scratch').lower()}",
                       *few, *(f"--{word}" for word in self.options.tune_with))  # fmt: skip
                what = f"{start} {rate:g}" if self.options.rates else start
                self.note(what, shots or -1, last, lambda how=how: self.classify(backbones[last], *how), minutes)

    def tunings(self) -> Iterator[tuple[tuple[int | None, int], float]]:
        """Labels of each class and steps, with the rate."""
        start = "scratch" if self.objective == "scratch" else "pretrained"
        for budget in self.recipe.tuning if self.options.tune is None else self.options.tune:
            for rate in self.options.rates or [self.recipe.rates[self.net][start]]:
                yield budget, rate

    def pretrained(self) -> tuple[dict[int, Path], float]:
        """Step -> the folder of the backbone as it was then; and the minutes of training of the last."""
        if self.objective == "scratch":
            return {0: self.fresh(self.config(1, 1))}, 0.0
        total = self.steps()
        wanted = [max(1, round(total * share)) for share in self.recipe.points if share]
        config = self.config(total, max(1, wanted[0]))
        backbones = {0: self.fresh(config)} if 0.0 in self.recipe.points else {}
        done = {step: self.work / f"at-{step}" for step in wanted}
        if not all((folder / "model.safetensors").exists() for folder in done.values()):
            folder = silent(pretrain, config)
            encoder = config.method.encoder(build_model(config))
            for step, path in done.items():
                saved = min((folder / CHECKPOINTS).glob("step-*"), key=lambda each: abs(int(each.name[5:]) - step))
                tensors = load_file(saved / "model.safetensors")
                encoder.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("encoder.")})
                encoder.save_pretrained(path)
        rows = read_rows(config.folder / METRICS)
        return backbones | done, sum(seconds_of(rows, config.batch_size)) / 60

    def fresh(self, config: PretrainConfig) -> Path:
        """The backbone with the weights that the run starts with."""
        if not (self.work / "at-0" / "model.safetensors").exists():
            config.method.encoder(build_model(config)).save_pretrained(self.work / "at-0")
        return self.work / "at-0"

    def config(self, total: int, every: int, *more: str) -> PretrainConfig:
        """Of a run of so many steps, with checkpoints kept at every so many."""
        recipe = self.recipe
        width, depth = recipe.decoder
        decoder = [f"--decoder.width={width}", f"--decoder.depth={max(1, depth // self.halves)}"]
        own = {"ar": [f"--ar.width={width}", f"--ar.depth={depth}"], "scratch": decoder, "mae": decoder,
               "distill": [*decoder, f"--distill.teacher={self.options.teacher}"]}  # fmt: skip
        source = f"hf:{self.data}" if self.options.folder else self.data / "train"  # the same rows as `classify` opens
        words = [
            *self.quiet, "--resume=auto", f"--data.source={source}", *recipe.pretraining,
            f"--steps={total}", f"--batch_size={recipe.pretraining_batch}", "--optim.clip_grad=1",
            f"--model.img_size={recipe.size}", f"--model.patch_size={recipe.patch}",
            f"--model.depth={recipe.depth // self.halves}",
            f"--model.scan={'pooled' if self.net == 'pooled' else 'full'}",
            f"--objective={'mae' if self.objective == 'scratch' else self.objective}", *own.get(self.objective, []),
            f"--checkpoint_every={every if len(recipe.points) > 1 else max(1, every // 4)}", f"--keep_every={every}",
            f"--picture_every={total}", "--log_every=10", *(f"--{word}" for word in self.options.pretrain_with), *more,
        ]  # fmt: skip
        return parse(PretrainConfig, words, "pretrain/main.py", "")

    def steps(self) -> int:
        """Of pretraining, by the budget."""
        options = self.options
        if options.seconds is None:
            return options.steps or options.epochs * self.recipe.pictures // self.config(1, 1).batch_size
        return max(1, round(options.seconds / self.seconds_a_step()))

    def seconds_a_step(self) -> float:
        """As measured once for the net and the objective, alone on the machine where `--measure` was asked for."""
        label = f"-{self.options.label}" if self.options.label else ""
        path = self.options.work / f"seconds-{self.net}-{self.objective}{label}.json"
        if not path.exists():
            own = ("--name=measured", "--resume=false", "--overwrite", f"--checkpoint_every={MEASURED_STEPS}")
            config = self.config(MEASURED_STEPS, MEASURED_STEPS, *own)
            folder = silent(pretrain, config)
            rows = read_rows(folder / METRICS)
            late = [row for row in rows if row["step"] > WARM_STEPS and "images_per_second" in row]
            taken = median(config.batch_size / row["images_per_second"] for row in late)
            shutil.rmtree(folder)
            path.write_text(json.dumps(taken))
            print(self.net, self.objective, self.options.label, f"{taken:.4f} s a step", flush=True)
        return json.loads(path.read_text())

    def classify(self, backbone: Path, *how: str) -> float:
        """Top-1 on the validation pictures."""
        source = f"hf:{self.data}" if self.options.folder else self.data
        halved = str(self.net != "vit").lower()  # a ViT's block counts for two of Vim's
        config = parse(ClassificationConfig, [
            f"--backbone={backbone}", f"--data.source={source}", *self.quiet, *self.recipe.augmentation, "--overwrite",
            "--model.global_pool=avg", "--pictures=1", f"--optim.half_rate={halved}", *how,
        ], "finetune/main.py", "")  # fmt: skip
        folder = silent(lambda given: finetune(ClassificationTask(given)), config)
        (metrics,) = folder.glob("evaluations/step-*/metrics.json")
        top1 = json.loads(metrics.read_text())["top1"]
        if self.options.publish and config.mode == "train" and config.data.shots is None:
            tensors = read_weights(folder)[1]
            whole: VisionMamba = from_pretrained(backbone)
            whole.load_state_dict({name: tensors[f"backbone.{name}"] for name in whole.state_dict()})
            print("teacher:", whole.save_pretrained(self.work / "teacher"), flush=True)
        shutil.rmtree(folder)
        return top1


def seconds_of(rows: list[dict[str, Any]], batch: int) -> Iterator[float]:
    """What the steps of each row of metrics took; a row of a resumed run counts from the row before."""
    before = 0
    for row in rows:
        if "images_per_second" in row:
            yield (row["step"] - before) * batch / row["images_per_second"]
            before = row["step"]


def run_case(net: str, objective: str, seed: int, options: argparse.Namespace) -> str | None:
    """All scores of one net, objective and seed; why it failed, if it did."""
    torch.set_num_threads(options.threads)
    try:
        case = Case(net, objective, seed, options)
        if options.measure:
            case.begin()
            with blocks_of("vit" if net == "vit" else "vim"):
                case.seconds_a_step()
        else:
            case.run()
    except Stopped:
        raise
    except Exception as error:
        traceback.print_exc()
        return f"{net} {objective} {seed} failed: {error}"
    finally:
        end_readers()
    return None


def run_cases(options: argparse.Namespace) -> Iterator[str | None]:
    """Each net, objective and seed; what is wrong with it as it is done."""
    seeds = options.seeds[:1] if options.measure else options.seeds
    objectives = [name for name in options.objectives if not (options.measure and name == "scratch")]
    cases = [
        (net, objective, seed, options) for seed, net, objective in itertools.product(seeds, options.nets, objectives)
    ]
    if options.processes == 1 or options.measure:
        yield from (run_case(*case) for case in cases)
        return
    with ProcessPoolExecutor(options.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        yield from (done.result() for done in as_completed([pool.submit(run_case, *case) for case in cases]))


def main() -> None:
    """Run all cases, print and draw."""
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget = f"{options.epochs} epochs"
    if options.steps or options.seconds:
        budget = f"{options.steps} steps" if options.steps else f"{options.seconds:g} seconds"
    about = {
        "run": f"{options.data}, {budget} of pretraining",
        "device": clock(device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    wrong, rows = [], []
    try:
        if options.seconds and options.processes > 1 and not options.measure:  # one after the other, before they share
            wrong += filter(None, run_cases(argparse.Namespace(**vars(options) | {"measure": True})))
        for failure in run_cases(options):
            wrong += [failure] if failure else []
            rows = [row for path in sorted(options.work.glob(f"*/{ROWS}")) for row in read_rows(path)]
            if options.out and rows:
                write_csv(options.out / "learning.csv", rows, about)
    except Stopped as stopped:
        sys.exit(f"{stopped}; so does this command")
    if rows and not options.measure:
        print_table(rows, about)
        if options.out:
            draw(options.out / "learning.png", rows, about)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
