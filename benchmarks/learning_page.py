"""The table and the plot of `benchmarks.learning`."""

import itertools
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.learning_recipes import NETS, OBJECTIVES

STYLES = {"linear": "-", "knn": "--"}
KEY = ("net", "objective", "label", "what", "labels", "step")
"""What the seeds have in common."""


def name_of(entry: dict[str, Any]) -> str:
    """Net, objective and label, in words."""
    return " ".join(filter(None, (entry["net"], entry["objective"], entry["label"])))


def over_seeds(scores: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation, None of one score."""
    return mean(scores), stdev(scores) if len(scores) > 1 else None


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds (None of one), of every score, and the minutes that it cost."""
    scores_of: dict[tuple[Any, ...], list[float]] = {}
    minutes_of: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        key = tuple(row[name] for name in KEY)
        scores_of.setdefault(key, []).append(row["top1"])
        minutes_of.setdefault(key, []).append(row["pretraining_minutes"] + row["minutes"])
    return [
        dict(zip(KEY, key, strict=True))
        | dict(zip(("mean", "deviation"), over_seeds(scores), strict=True))
        | {"seeds": len(scores)}
        | {"minutes": mean(minutes_of[key])}
        for key, scores in scores_of.items()
    ]


def labels_of(count: int) -> str:
    """A number of labels of each class, in words."""
    return {-1: "all labels", 0: "frozen"}.get(count, f"{count} labels a class")


def draw(path: Path, rows: list[dict[str, Any]], about: dict[str, str]) -> None:
    """Frozen features over the pretraining, or at its end, and fine-tuning with and without it."""
    means = summary(rows)
    most = max(sum(entry["what"] in STYLES for entry in means), sum(entry["what"] not in STYLES for entry in means))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(4.5, 1 + 0.32 * most)), layout="constrained")
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


def group_of(entry: dict[str, Any]) -> tuple[str, ...]:
    """What the points of a line have in common."""
    return tuple(entry[name] for name in ("net", "objective", "label", "what"))


def lines(axes: Axes, means: list[dict[str, Any]]) -> None:
    """Scores over the steps of pretraining; a bar is a deviation of the seeds."""
    groups = itertools.groupby(sorted(means, key=group_of), group_of)
    for (net, objective, _, what), group in groups:
        points = sorted(group, key=lambda entry: entry["step"])
        steps, scores = [e["step"] for e in points], [e["mean"] for e in points]
        axes.errorbar(steps, scores, [e["deviation"] or 0.0 for e in points],
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
        strength = OBJECTIVES[entry["objective"] or "scratch"]
        faint = 0.4 if entry["what"] == "knn" else 1.0
        axes.barh(place, entry["mean"], color=NETS[entry["net"]], alpha=faint * strength)
        axes.plot(scores, [place] * len(scores), "o", color="black", markersize=3)
        axes.text(0.01, place, f"{entry['mean']:.3f}", va="center")
    shown = [f"{name_of(e)}, {e['what']}" + (f", {labels_of(e['labels'])}" if e["labels"] else "") for e in means]
    axes.set_yticks(range(len(means)), shown, fontsize=8)
    axes.set(xlim=(0, 1), xlabel="top-1")


def print_table(rows: list[dict[str, Any]], about: dict[str, str]) -> None:
    """In Markdown. Minutes are those of pretraining and of what follows, of one seed."""
    names = ("net", "objective", "label", "evaluated by", "labels", "steps of pretraining", "top-1, mean", "deviation",
             "seeds", "minutes")  # fmt: skip
    print("\n" + "\n".join(about.values()) + "\n")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for entry in summary(rows):
        values = (entry["net"], entry["objective"], entry["label"], entry["what"], labels_of(entry["labels"]))
        print("| " + " | ".join(map(str, (*values, entry["step"]))), end=" | ")
        deviation = "" if entry["deviation"] is None else f"{entry['deviation']:.3f}"
        print(f"{entry['mean']:.3f} | {deviation} | {entry['seeds']} | {entry['minutes']:.2f} |")
