"""The table and the plot of `benchmarks.dense`."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.learning_page import over_seeds
from benchmarks.learning_recipes import NETS

STARTS = {"scratch": 0.35, "own": 1.0, "tinyimagenet": 0.65}
"""Fresh weights, pretrained on the task's own pictures, or on Tiny ImageNet; each with the strength of its colour."""
KEY = ("label", "size", "net", "start")
"""What the seeds have in common."""
COSTS = ("step", "images_per_second", "data_wait_share", "peak_gb", "seconds", "pretraining_seconds")
MACHINE = ("device", "versions", "date")

Row = dict[str, Any]


def scores_in(rows: list[Row]) -> list[str]:
    """Names of the scores."""
    return [name for name in rows[0] if name not in (*KEY, *COSTS, *MACHINE, "data", "seed")]


def groups(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that differ in their seed alone."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["label"], row["size"], list(NETS).index(row["net"]), row["start"])):
        found.setdefault(tuple(row[name] for name in KEY), []).append(row)
    return found


def spread(rows: list[Row], name: str) -> str:
    """Mean and standard deviation of a score; of one seed the score alone."""
    centre, deviation = over_seeds([row[name] for row in rows])
    return f"{centre:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def print_table(rows: list[Row]) -> None:
    """In Markdown, with the machines that the rows come from."""
    for machine in dict.fromkeys(", ".join(str(row.get(name)) for name in MACHINE) for row in rows):
        print(machine)
    print()
    names = scores_in(rows)
    print("| " + " | ".join([*KEY, "seeds", *names, "seconds"]) + " |\n" + "|---" * (len(KEY) + len(names) + 2) + "|")
    for key, same in groups(rows).items():
        cells = [spread(same, name) for name in names]
        seconds = mean(row["seconds"] for row in same)
        print("| " + " | ".join([*map(str, key), str(len(same)), *cells, f"{seconds:.0f}"]) + " |")


def draw(path: Path, rows: list[Row], about: str) -> None:
    """An axis a score: means as bars, with a dot for each seed, in a group for each size."""
    names, found = scores_in(rows), groups(rows)
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 0.24 * lines * len(found) + 1.4 * lines), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axis, name in zip(axes.flat, names, strict=False):
        bars(axis, found, name)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    devices = dict.fromkeys(str(row.get("device")) for row in rows)
    figure.suptitle("; ".join([about, *devices]), fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bars(axis: Axes, found: dict[tuple[Any, ...], list[Row]], name: str) -> None:
    """One score of all groups, from top to bottom."""
    place, places, before = 0.0, [], None
    for key, same in found.items():
        label, size, net, start = key
        place -= 1.6 if before not in (None, (label, size)) else 1.0
        before = (label, size)
        places.append(place)
        axis.barh(place, mean(row[name] for row in same), color=NETS[net], alpha=STARTS[start])
        axis.plot([row[name] for row in same], [place] * len(same), "o", color="black", markersize=2.5)
    axis.set_yticks(places, [f"{key[1]} px {key[2]}, {key[3]} {key[0]}".strip() for key in found], fontsize=8)
    axis.set_title(name, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlim(left=0)
