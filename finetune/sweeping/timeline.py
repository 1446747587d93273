"""When each trial of a sweep ran, and where: a bar for each over the devices, from the times that its record has."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from finetune.sweeping.config import SweepConfig
from finetune.sweeping.ledger import Entry
from finetune.sweeping.places import Place

UNITS = {"s": 1, "min": 60, "h": 3600}
MOST_OF_A_UNIT = 300
"""Of a unit of time on the axis, before the next larger one takes its place."""
LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Of red, green and blue (ITU-R BT.709)."""
NO_SCORE = (0.8, 0.8, 0.8, 1.0)
"""Colour of a trial whose score is no finite number."""


class Span(NamedTuple):
    """A trial on one device, from its start there to its last evaluation."""

    began: float
    """Unix time."""
    ended: float
    place: Place
    number: int
    """Of the trial."""
    evaluations: list[float]
    """Unix times."""
    last: bool
    """Whether the trial ended here, and did not go on after a loss or a resume."""


def spans_of(entries: Iterable[Entry]) -> list[Span]:
    """All that the record has the times of; a trial of several devices or of several starts has more than one."""
    found = []
    for entry in entries:
        starts: dict[float, list[Any]] = {}
        for row in entry.evaluations:
            if row.places:
                starts.setdefault(row.began, []).append(row)
        for began, rows in starts.items():
            times = [row.ended for row in rows]
            last = began == max(starts)
            found += [Span(began, max(times), place, entry.number, times, last) for place in set(rows[-1].places)]
    return sorted(found)


def lanes_of(spans: list[Span]) -> list[tuple[Place, list[Span]]]:
    """Spans that do not overlap, in as few lanes of each device as they need; the devices in order."""
    lanes: dict[Place, list[list[Span]]] = {}
    for span in spans:
        of_place = lanes.setdefault(span.place, [])
        free = next((lane for lane in of_place if lane[-1].ended <= span.began), None)
        if free is None:
            of_place.append([span])
        else:
            free.append(span)
    return [(place, lane) for place in sorted(lanes) for lane in lanes[place]]


def about(config: SweepConfig, entries: list[Entry]) -> str:
    """What ran, on what, how many at a time, and for how long, in a line; what the record does not have is left out."""
    spans = spans_of(entries)
    states = Counter(e.state for e in entries)
    line = f"{config.name}: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    if not spans:
        return line
    places = {span.place for span in spans}
    models = Counter(place.model or place.device for place in places)
    line += " on " + " and ".join(f"{count} x {model}" for model, count in models.items())
    resources = config.resources
    each = f"{resources.gpus:g} GPU" if resources.gpus else f"{resources.cpus:g} CPU"
    times = f"{resources.workers} x " if resources.workers > 1 else ""
    seconds = max(span.ended for span in spans) - spans[0].began
    return f"{line}, {times}{each} a trial; {seconds:.0f} s"


def draw_timeline(axes: Any, config: SweepConfig, entries: list[Entry]) -> None:
    """A row for each device and each trial that it held at a time; bars have the colour of the score.

    A line across a bar is an evaluation; the mark at its end says whether the trial finished, as in the curves.
    """
    spans = spans_of(entries)
    start, stop = spans[0].began, max(span.ended for span in spans)
    unit = next((u for u, seconds in UNITS.items() if stop - start <= MOST_OF_A_UNIT * seconds), "h")
    lanes = lanes_of([_since(start, UNITS[unit], span) for span in spans])
    by_number = {e.number: e for e in entries}
    scores = {e.number: e.score(config.metric) for e in entries}
    finite = [score for score in scores.values() if score is not None and math.isfinite(score)]
    scale = Normalize(min(finite, default=0), max(finite, default=1))
    colours = ScalarMappable(scale, "viridis" if config.mode == "max" else "viridis_r")
    shades: dict[int, Any] = dict.fromkeys(scores, NO_SCORE)
    shades |= {number: colours.to_rgba(np.array(score)) for number, score in scores.items() if score in finite}
    for y, (_, lane) in enumerate(lanes):
        for span in lane:
            shade = shades[span.number]
            axes.barh(y, span.ended - span.began, left=span.began, height=0.8, color=shade, edgecolor="white")
            axes.vlines(span.evaluations[:-1], y - 0.4, y + 0.4, color="white", linewidth=0.7)
            ink = "white" if np.dot(shade[:3], LUMINANCE) < 0.5 else "black"
            axes.text((span.began + span.ended) / 2, y, str(span.number), ha="center", va="center", color=ink)
            if span.last:
                mark = "o" if by_number[span.number].state == "finished" else "x"
                axes.plot(span.ended, y, mark, color="black", markersize=5, clip_on=False)
    hosts = len({place.host for place, _ in lanes})
    names = [f"{place.host} {place.device}" if hosts > 1 else place.device for place, _ in lanes]
    axes.set_yticks(range(len(lanes)), [name if name not in names[:y] else "" for y, name in enumerate(names)])
    for y in range(1, len(lanes)):
        if names[y] != names[y - 1]:
            axes.axhline(y - 0.5, color="gray", linewidth=0.5)
    axes.set(xlabel=f"{unit} since the first trial began", ylim=(len(lanes) - 0.5, -0.5), xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.figure.colorbar(colours, ax=axes, label=config.metric, fraction=0.03, pad=0.02)


def _since(start: float, unit: int, span: Span) -> Span:
    """The span with its times in units since the start."""
    began, ended, *evaluations = ((time - start) / unit for time in (span.began, span.ended, *span.evaluations))
    return span._replace(began=began, ended=ended, evaluations=evaluations)
