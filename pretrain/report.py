"""One page on runs of pretraining: `python -m pretrain.report RUN [RUN ...]`; every run writes its own at its end."""

import argparse
import base64
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from launch.run import cli
from launch.run.config import flattened, plain
from launch.run.folder import CONFIG, CONTROL
from launch.run.metrics import LOG, METRICS, read_rows
from launch.run.training import BAD_STEPS
from launch.run.yaml_files import read_yaml
from pretrain.charts import COLOURS, Curve, chart
from pretrain.config import PretrainConfig
from pretrain.watching.maps import FEATURES
from vim_backbone.errors import UserError
from vim_backbone.files import write_text

REPORT = "report.html"
LAST = (("held_out_loss", "held-out loss (last)", ".4f"), ("linear", "linear probe (last)", ".1%"),
        ("knn", "nearest neighbours (last)", ".1%"), ("rank_me", "RankMe (last)", ".1f"))  # fmt: skip
"""Columns whose last value the table of runs has, what it is called, and its form."""
MOST_PICTURES = 12
"""Pictures of a run that the page holds, evenly spread over its steps."""
MOST_LINES = 200
"""Lines of a run's log that the page holds, its last ones."""
TITLES = {
    "loss": "loss",
    "held_out_loss": "held-out loss",
    "linear": "linear probe, top-1",
    "knn": "nearest neighbours, top-1",
    "rank_me": "RankMe, the effective rank of features",
    "images_per_second": "pictures a second",
    "data_wait_share": "share of the time spent waiting for data",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
    "memory_gb": "peak memory, GB",
    "height": "height of the views, pixels",
}
"""Columns of metrics.jsonl that are drawn first, and what they are called; further ones follow under their names."""
BESIDE = {"loss": ("held_out_loss", "loss (dashed: held out)"),
          "linear": ("knn", "linear probe (dashed: nearest neighbours), top-1")}  # fmt: skip
"""Columns that have another one dashed in the same drawing, and what both are called."""
LOGARITHMIC = {"lr", "grad_norm"}
"""Columns that are drawn so where they span decades."""
NO_CHART = {"step", "tokens_per_second", "stage", "width", "eval_seconds"}
"""Columns that say nothing more."""


@dataclass(frozen=True)
class RunRecord:
    """What a run has left in its folder so far."""

    folder: Path
    name: str
    fields: dict[str, Any]
    """Dotted field -> value of its config."""
    metrics: list[dict[str, Any]]
    log: list[dict[str, Any]]
    """Its lines, with time and step."""
    bad_steps: list[dict[str, Any]]
    pictures: dict[str, list[tuple[int, Path]]]
    """Folder -> step and file of each picture of what was learned."""
    published: bool

    @property
    def step(self) -> int:
        """The last one that it wrote down."""
        return self.metrics[-1]["step"] if self.metrics else 0

    def values(self, column: str) -> list[float]:
        """A column of the metrics, where it is a number."""
        return [row[column] for row in self.metrics if isinstance(row.get(column), (int, float))]

    def facts(self) -> dict[str, str]:
        """Name -> text of what the table of runs shows."""
        ends = {column: self.values(column) for column in TITLES}
        seconds = self.values("eval_seconds")
        last = ends["loss"][-max(1, len(ends["loss"]) // 10) :]
        return {
            "state": f"{'done' if self.published else 'not published'}, step {self.step:,}",
            "loss (last tenth)": f"{np.mean(last):.4f}" if last else "",
            **{name: _last(ends[column], form) for column, name, form in LAST},
            "evaluations": f"{len(seconds)}, {sum(seconds):.1f} s" if seconds else "",
            "pictures a second (median)": _median(ends["images_per_second"], ".1f"),
            "waiting for data (median)": _median(ends["data_wait_share"], ".0%"),
            "peak memory": f"{max(ends['memory_gb']):.2f} GB" if ends["memory_gb"] else "",
            "bad steps": str(len(self.bad_steps)),
            "starts": str(max(1, sum(bool(row.get("start")) for row in self.log))),
        }


def _last(values: list[float], form: str) -> str:
    return format(values[-1], form) if values else ""


def _median(values: list[float], form: str) -> str:
    return format(float(np.median(values)), form) if values else ""


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder, also while it goes on. Raises UserError for a folder that is none."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run's folder (it has no {CONFIG}): give the folder that a run printed last")
    pictures: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*/step-*.png"), key=lambda path: (path.parent.name == FEATURES, path)):
        if (step := path.stem.removeprefix("step-")).isdigit():
            pictures.setdefault(path.parent.name, []).append((int(step), path))
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        fields=flattened(read_yaml(folder / CONFIG)),
        metrics=read_rows(folder / METRICS),
        log=read_rows(folder / LOG),
        bad_steps=read_rows(folder / BAD_STEPS),
        pictures={name: sorted(some) for name, some in pictures.items()},
        published=(folder / "backbone" / "config.json").is_file(),
    )


def field_table(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Fields and their value in each run: where runs differ, or where the only one differs from the defaults."""
    columns = [run.fields for run in runs]
    if len(runs) == 1:
        columns = [flattened(plain(PretrainConfig())), *columns]
    names = dict.fromkeys(name for column in columns for name in column)
    return [
        (name, ["" if column.get(name) is None else str(column[name]) for column in columns[-len(runs) :]])
        for name in names
        if name not in ("name", *CONTROL) and len({str(column.get(name)) for column in columns}) > 1
    ]


def charts(runs: Sequence[RunRecord]) -> list[str]:
    """A drawing (SVG) for each column of the metrics with all runs, and marks at restarts and bad steps."""
    names = dict.fromkeys(name for run in runs for row in run.metrics for name in row)
    columns = [*(name for name in TITLES if name in names), *(name for name in names if name not in TITLES)]
    svgs = []
    companions = {other for column, (other, _) in BESIDE.items() if column in names}
    for column in (column for column in columns if column not in NO_CHART | companions):
        other, both = BESIDE.get(column, ("", ""))
        curves, dashed = ([curve_of(run, name) for run in runs] for name in (column, other))
        if any(curve.values for curve in curves):
            title = both if any(curve.values for curve in dashed) else TITLES.get(column, column)
            svgs.append(chart(title, curves, dashed, logarithmic=column in LOGARITHMIC))
    return svgs


def curve_of(run: RunRecord, column: str) -> Curve:
    """A column of a run's metrics over the steps, with marks where it was restarted or had a bad step."""
    rows = [row for row in run.metrics if isinstance(row.get(column), (int, float))]
    starts = [row["step"] for row in run.log if row.get("start") and row["step"]]
    marks = starts + [row["step"] for row in run.bad_steps]
    return Curve([row["step"] for row in rows], [row[column] for row in rows], marks)


def embedded(path: Path) -> str | None:
    """A picture file as a data URL, in WebP; None for one that cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "WEBP", quality=80, method=1)
    except OSError:
        return None
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def spread(pictures: list[tuple[int, Path]]) -> list[tuple[int, str]]:
    """Step and data URL of as many pictures as the page holds, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(pictures) - 1, min(MOST_PICTURES, len(pictures))).round().astype(int))
    urls = [(pictures[index][0], embedded(pictures[index][1])) for index in chosen]
    return [(step, url) for step, url in urls if url is not None]


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write one page that needs no network on the runs in these folders.

    Raises UserError for a folder that is no run's, or a file that cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    facts = [run.facts() for run in runs]
    names = [name for name in facts[0] if any(each[name] for each in facts)]
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    page = templates.get_template("report_template.html").render(
        title=", ".join(run.name for run in runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else ""),
        runs=[
            {
                "name": run.name,
                "folder": str(run.folder),
                "colour": COLOURS[number % len(COLOURS)],
                "facts": {name: facts[number][name] for name in names},
                "pictures": {name: spaced for name, some in run.pictures.items() if (spaced := spread(some))},
                "log": run.log[-MOST_LINES:],
                "earlier": max(0, len(run.log) - MOST_LINES),
                "bad_steps": run.bad_steps,
                "published": run.published,
                "objective": run.fields.get("objective", "mae"),
            }
            for number, run in enumerate(runs)
        ],
        fields=field_table(runs),
        charts=charts(runs),
    )
    write_text(out, page)


def main(argv: list[str]) -> None:
    """Write the page, and print its path last."""
    parser = argparse.ArgumentParser("pretrain.report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, also of one that goes on")
    text = f"HTML file to write; RUN/{REPORT} for one run, {REPORT} for several"
    parser.add_argument("--out", type=Path, default=None, help=text)
    arguments = parser.parse_args(argv)
    out = arguments.out or (arguments.runs[0] / REPORT if len(arguments.runs) == 1 else Path(REPORT))
    write_report(arguments.runs, out)
    print(out)  # noqa: T201 - the command's result


if __name__ == "__main__":
    sys.exit(cli.run(main))
