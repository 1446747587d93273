"""The results of a sweep: results.csv, a picture, report.html, the best model, commands that repeat the best trials."""

import base64
import csv
import html
import shlex
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import optuna
import yaml
from matplotlib.ticker import MaxNLocator
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial
from ray import tune

from finetune.sweeping.config import SweepConfig
from finetune.sweeping.ledger import Entry, Ledger
from finetune.sweeping.progress import score_of, short
from finetune.sweeping.timeline import about, draw_timeline, lanes_of, spans_of
from finetune.sweeping.trial import arguments
from vim_backbone.files import write_json, write_text

RESULTS, REPORT, BEST = "results.csv", "report.html", "best"
PICTURE = "sweep.png"
FEWEST = 8
"""Trials below which the importance of a field is a matter of chance alone."""


def write_report(config: SweepConfig, ledger: Ledger) -> list[str]:
    """Write all of it into the sweep's folder; returns lines for the user."""
    entries = ledger.entries()
    write_results(config.folder / RESULTS, entries, ledger)
    lines = [f"{sum(e.state == state for e in entries)} {state}" for state in ("finished", "stopped early", "failed")]
    summary = [f"{', '.join(lines)} of {config.trials} trials; the record is {config.folder / RESULTS}"]
    picture = draw(config, ledger)
    if best := ledger.best(1):
        summary.append(publish_best(config, best[0]))
    else:
        summary.append("no trial has come to its end, so that there is no best model")
    write_html(config, ledger, picture)
    summary.append(f"report: {config.folder / REPORT}")
    return summary


def write_results(path: Path, entries: list[Entry], ledger: Ledger) -> None:
    """One row a trial: state, score, how far it came, its fields, all metrics of its last evaluation, the error."""
    metrics = sorted({name for e in entries for row in e.evaluations[-1:] for name in row.metrics})
    fields = [d.field for d in ledger.space]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["trial", "state", "step", "percent", "seconds", *metrics, *fields, "checkpoint", "error"])
        for e in entries:
            last = e.evaluations[-1] if e.evaluations else None
            reached = [last.step, last.percent, round(last.seconds, 3)] if last else ["", "", ""]
            values = [last.metrics.get(name, "") if last else "" for name in metrics]
            settings = [e.fields.get(name, "") for name in fields]
            table.writerow([e.number, e.state, *reached, *values, *settings, e.checkpoint or "", e.error or ""])


def draw(config: SweepConfig, ledger: Ledger) -> Path | None:
    """One picture: best so far, curves of the trials, parallel coordinates, importance of the fields, who ran when."""
    entries = [e for e in ledger.entries() if e.evaluations]
    if not entries:
        return None
    rows = len(lanes_of(spans_of(entries)))
    places: Any = [["best", "curves"], ["parallel", "importance"], *([["timeline", "timeline"]] if rows else [])]
    heights = [3.5, 3.5, *([0.8 + 0.3 * rows] if rows else [])]
    figure, axes = plt.subplot_mosaic(
        places, figsize=(11, sum(heights)), layout="constrained", gridspec_kw={"height_ratios": heights}
    )
    figure.suptitle(about(config, ledger.entries()), fontsize="medium")
    draw_best_so_far(axes["best"], config, ledger)
    draw_curves(axes["curves"], config, ledger, entries)
    draw_parallel(axes["parallel"], config, ledger, entries)
    draw_importance(axes["importance"], config, ledger)
    if rows:
        draw_timeline(axes["timeline"], config, entries)
    path = config.folder / PICTURE
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def draw_best_so_far(axes: Any, config: SweepConfig, ledger: Ledger) -> None:
    """The score of each finished trial, and the best up to it."""
    finished = [e for e in ledger.entries() if e.state == "finished"]
    scores = [e.score(config.metric) or 0.0 for e in finished]
    best = (np.maximum if config.mode == "max" else np.minimum).accumulate(scores) if scores else []
    numbers = [e.number for e in finished]
    axes.plot(numbers, scores, "o", color="tab:gray", alpha=0.6, label="finished trial")
    early = [e for e in ledger.entries() if e.state == "stopped early"]
    axes.plot(
        [e.number for e in early], [e.score(config.metric) for e in early], "x", color="tab:gray", alpha=0.5,
        label="stopped early",
    )  # fmt: skip
    last = len(ledger.entries()) - 1
    axes.step([*numbers, last], [*best, *best[-1:]] if scores else [np.nan], where="post", label="best so far")
    axes.set(xlabel="trial", ylabel=config.metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.legend(fontsize="small", loc="best")


def draw_curves(axes: Any, config: SweepConfig, ledger: Ledger, entries: list[Entry]) -> None:
    """The score of each trial as it trained; the best stands out."""
    best = {e.number for e in ledger.best(1)}
    for e in sorted(entries, key=lambda e: e.number in best):
        points = [(row.percent, row.metrics.get(config.metric)) for row in e.evaluations]
        style = {"color": "tab:blue", "linewidth": 2} if e.number in best else {"color": "tab:gray", "alpha": 0.5}
        end = "o" if e.state == "finished" else "x"
        axes.plot(*zip(*points, strict=True), **style, marker=end, markevery=[-1], markersize=4)
    axes.set(xlabel="percent of the trial's training", ylabel=config.metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def draw_parallel(axes: Any, config: SweepConfig, ledger: Ledger, entries: list[Entry]) -> None:
    """Each trial a line over its fields, coloured by its score."""
    scores = np.array([e.score(config.metric) for e in entries], float)
    low, high = float(np.nanmin(scores)), float(np.nanmax(scores))
    columns, names = [], []
    for d in ledger.space:
        values = [e.fields.get(d.field) for e in entries]
        names.append(d.field.rpartition(".")[2])
        if d.listed:
            places = [d.values.index(v) if v in d.values else 0 for v in values]
            columns.append(np.array(places) / max(1, len(d.values) - 1))
            ends = [short(d.values[0]), short(d.values[-1])]
        else:
            scale = np.log if d.kind == "loguniform" else np.asarray
            bottom, top = scale(np.array(d.values, float))
            columns.append((scale(np.array(values, float)) - bottom) / (top - bottom))
            ends = [short(d.values[0]), short(d.values[1])]
        for y, text, place in ((-0.03, ends[0], "top"), (1.03, ends[1], "bottom")):
            axes.text(len(columns) - 1, y, text, ha="center" if columns[1:] else "right", va=place, fontsize="x-small")
    names.append(config.metric)
    columns.append((scores - low) / ((high - low) or 1))
    axes.text(len(columns) - 1, -0.03, short(low), ha="center", va="top", fontsize="x-small")
    axes.text(len(columns) - 1, 1.03, short(high), ha="center", va="bottom", fontsize="x-small")
    colours = plt.get_cmap("viridis")
    order = np.argsort(scores if config.mode == "max" else -scores)
    for i in order:
        shade = columns[-1][i] if config.mode == "max" else 1 - columns[-1][i]
        faint = 0.9 if entries[i].state == "finished" else 0.3
        axes.plot(range(len(columns)), [c[i] for c in columns], color=colours(shade), alpha=faint)
    axes.set(yticks=[], ylim=(-0.12, 1.12))
    axes.set_xticks(range(len(columns)), names, rotation=25, ha="right", fontsize="small")
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    for x in range(len(columns)):
        axes.vlines(x, 0, 1, color="black", linewidth=0.5)


def importances(ledger: Ledger) -> dict[str, float] | None:
    """Field -> share of the score's variation that it explains, by fANOVA (Hutter et al., 2014); None for too few.

    Trials that were stopped early count by their last score: those that came to their end are too alike to tell.
    """
    scored = optuna.create_study(direction=ledger.study.direction)
    for trial, entry in zip(ledger.study.get_trials(deepcopy=False), ledger.entries(), strict=True):
        if entry.state in ("finished", "stopped early"):
            value = entry.score(ledger.metric)
            scored.add_trial(create_trial(params=trial.params, distributions=trial.distributions, value=value))
    trials = scored.get_trials(deepcopy=False)
    if len(trials) < FEWEST or len({trial.value for trial in trials}) == 1:
        return None
    shares = get_param_importances(scored, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(share) for name, share in shares.items()}


def draw_importance(axes: Any, config: SweepConfig, ledger: Ledger) -> None:
    """Bars, the most important on top."""
    shares = importances(ledger)
    axes.set_title(f"importance for {config.metric}", fontsize="medium")
    if shares is None:
        axes.text(0.5, 0.5, f"fewer than {FEWEST} trials,\nor all alike", ha="center", va="center")
        axes.set_axis_off()
        return
    names = sorted(shares, key=lambda name: shares[name])
    axes.barh(names, [shares[name] for name in names], color="tab:blue")
    axes.set(xlim=(0, 1), xlabel="share")
    axes.tick_params(axis="y", labelsize="small")


def publish_best(config: SweepConfig, best: Entry) -> str:
    """Copy the best trial's run into `best/`, with its config and metrics; returns a line for the user."""
    folder = config.folder / BEST
    aside = folder.with_name(f".{BEST}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    assert best.checkpoint is not None
    tune.Checkpoint(best.checkpoint).to_directory(str(aside))
    for name in ("checkpoints", ".launcher", ".lock"):
        path = aside / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_json(aside / "metrics.json", best.evaluations[-1].metrics)
    write_text(aside / "fields.yaml", yaml.safe_dump(best.fields, sort_keys=False))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    values = "  ".join(f"{name} {short(value)}" for name, value in best.fields.items())
    return (
        f"best: trial {best.number}, {config.metric} {score_of(best, config.metric)}, {values}; published in {folder}"
    )


def command(config: SweepConfig, entry: Entry) -> str:
    """The command that repeats a trial outside of Ray."""
    resources = config.resources
    launch = f"python -m launch --num_processes {resources.workers}" if resources.workers > 1 else "python -m launch"
    if not resources.gpus:  # sums on CPU depend on the number of threads, which Ray sets to a trial's cores
        launch = f"OMP_NUM_THREADS={max(1, int(resources.cpus))} {launch}"
    base = [f"--config={config.base}"] if config.base else []
    argv = [*base, "--trackers=[]", *arguments(config.fields | entry.fields), f"--name={config.name}-{entry.number}"]
    return f"{launch} finetune/main.py {config.task} " + " ".join(shlex.quote(word) for word in argv)


def top_lines(config: SweepConfig, ledger: Ledger) -> list[str]:
    """A comment and a command for each of the best trials."""
    lines = []
    for entry in ledger.best(config.top):
        lines.append(f"# trial {entry.number}: {config.metric} {score_of(entry, config.metric)}")
        if entry.changed:
            lines.append("# population-based training changed its fields on the way: this repeats the last ones alone")
        lines.append(command(config, entry))
    return lines


def write_html(config: SweepConfig, ledger: Ledger, picture: Path | None) -> None:
    """One file with the picture in it and the trials as a table, to be opened without a network."""
    fields = [d.field for d in ledger.space]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("trial", "state", config.metric, *fields, "error"))
    finished = ledger.best(len(ledger.entries()))
    rows = []
    for e in [*finished, *(e for e in ledger.entries() if e.state != "finished")]:
        values = [score_of(e, config.metric), *(short(e.fields.get(name)) for name in fields), e.error or ""]
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in (e.number, e.state, *values))
        rows.append(f"<tr>{cells}</tr>")
    data = base64.b64encode(picture.read_bytes()).decode() if picture else ""
    image = f'<p><img alt="scores and fields" src="data:image/png;base64,{data}"></p>' if picture else ""
    commands = html.escape("\n".join(command(config, e) for e in finished[:3]))
    title = html.escape(f"{config.name}: {config.task}, {config.metric}")
    page = (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font-family:sans-serif;margin:2em}img{max-width:100%}table{border-collapse:collapse}"
        "td,th{border-bottom:1px solid #ccc;padding:.2em .7em;text-align:left}pre{white-space:pre-wrap}</style>"
        f"<h1>{title}</h1>{image}<h2>The best again, without Ray</h2><pre>{commands}</pre>"
        f"<h2>Trials</h2><table><tr>{head}</tr>{''.join(rows)}</table>\n"
    )
    write_text(config.folder / REPORT, page)
