"""What a sweep costs beyond its training, and what stopping early saves, on two slots of this machine.

`python -m benchmarks.sweep` runs 32 short trials without a scheduler, then the same trials under ASHA, and prints two
tables. A slot's time is that of the sweep from Ray being up to the last trial's end, start of the workers included; a
trial's own time is what the same run takes in its worker: building, steps, evaluations, saving.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil
import torch

from benchmarks.machine import clock, versions
from finetune.sample_data import KINDS, Sizes
from finetune.sweeping import driver as sweeping
from finetune.sweeping.config import RayConfig, SchedulerConfig, SweepConfig
from finetune.sweeping.driver import resolve, sweep
from finetune.sweeping.ledger import Entry, Ledger
from vim_backbone import VimConfig, VisionMamba

SLOTS = 2


def timed_sweep(config: SweepConfig) -> tuple[float, list[Entry]]:
    """Seconds that the trials took together, Ray's own start left out, and what became of them."""
    seconds: list[float] = []
    tune_trials = sweeping.tune_trials

    def timed(*arguments: object) -> None:
        start = time.monotonic()
        tune_trials(*arguments)  # pyright: ignore[reportArgumentType]
        seconds.append(time.monotonic() - start)

    sweeping.tune_trials = timed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        sweep(config)
    finally:
        sweeping.tune_trials = tune_trials
    ledger = Ledger(config.folder, config.mode, config.metric, resolve(config)[1])
    entries = ledger.entries()
    ledger.close()
    return seconds[0], entries


def step_seconds(entry: Entry) -> float:
    """Time in training steps alone, by the run's own log of its speed at every step."""
    assert entry.checkpoint is not None
    lines = (Path(entry.checkpoint) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(8 / row["images_per_second"] for row in map(json.loads, lines) if "images_per_second" in row)


def main() -> None:
    """Run both sweeps and print the tables."""
    parser = argparse.ArgumentParser("benchmarks.sweep", description=__doc__)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100, help="of each trial")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        torch.manual_seed(0)
        VisionMamba(
            VimConfig.from_dict({"d_model": 64, "depth": 4, "img_size": 32, "patch_size": 4, "num_classes": 0})
        ).save_pretrained(place / "backbone")
        KINDS["classification"][0](place / "data", Sizes(240, 60, 32, 0))
        config = SweepConfig(
            task="classification", metric="loss", mode="min", searcher="random", trials=options.trials,
            space={"optim.base_lr": {"loguniform": [1e-4, 0.3]}, "optim.weight_decay": {"loguniform": [1e-3, 0.3]}},
            fields={
                "backbone": str(place / "backbone"), "data.source": str(place / "data"), "data.workers": 0,
                "steps": options.steps, "evaluate_every": max(1, options.steps // 5), "batch_size": 8, "log_every": 1,
                "optim.warmup_steps": 5, "augment.auto_augment": None, "augment.mixup": 0, "augment.cutmix": 0,
                "model.drop_path_rate": 0.0,
            },
            scheduler=SchedulerConfig(kind="none"), ray=RayConfig(cpus=SLOTS), out=str(place / "runs"), name="all",
        )  # fmt: skip
        wall, entries = timed_sweep(config)
        asha = replace(config, name="asha", scheduler=SchedulerConfig(kind="asha", grace=20, reduction=3))
        asha_wall, asha_entries = timed_sweep(asha)

        slot = SLOTS * wall
        in_trials = sum(e.evaluations[-1].seconds for e in entries)
        steps = sum(step_seconds(e) for e in entries)
        print(f"\n{clock('cpu')}; {versions()}; load {psutil.getloadavg()[0]:.1f}; {time.strftime('%Y-%m-%d')}\n")
        print(f"| {options.trials} trials of {options.steps} steps on {SLOTS} slots | |\n|---|---|")
        print(f"| slot time | {slot:.1f} s |")
        print(f"| of it the trials' own | {in_trials:.1f} s, {in_trials / slot:.2f} |")
        print(f"| of it training steps | {steps:.1f} s, {steps / slot:.2f} |")
        print(f"| between trials, each | {(slot - in_trials) / len(entries):.2f} s |")
        print(f"| a trial's own, median | {median(e.evaluations[-1].seconds for e in entries):.2f} s |\n")
        print("| | steps taken | slot time | best loss |\n|---|---|---|---|")
        for kind, seconds, trials in (("all to the end", wall, entries), ("asha", asha_wall, asha_entries)):
            steps_taken = sum(e.evaluations[-1].step for e in trials if e.evaluations)
            best = min(e.score("loss") or 9.0 for e in trials if e.state == "finished")
            print(f"| {kind} | {steps_taken} | {SLOTS * seconds:.1f} s | {best:.4f} |")


if __name__ == "__main__":
    main()
