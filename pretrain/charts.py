"""Curves over the steps of runs as SVG that follows the page's colours, light or dark."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#3b82c4", "#e07b39", "#3a9d5d", "#c9485b", "#8a63d2", "#a0764f", "#d16ba5", "#7f7f7f")
INK = "#010203"
"""Colour of lines and letters while they are drawn; the page's own stands in for it."""
MOST_POINTS = 500
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif", "font.size": 9,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


class Curve(NamedTuple):
    """A metric of one run."""

    steps: list[int]
    values: list[float]
    marks: list[int]
    """Steps at which something happened, drawn as dotted lines."""


def thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, as means over neighbours where there are more than can be seen."""
    steps, values = np.array(curve.steps, float), np.array(curve.values, float)
    if len(steps) <= MOST_POINTS:
        return steps, values
    parts = [np.array_split(each, MOST_POINTS) for each in (steps, values)]
    steps, values = (np.array([part.mean() for part in each]) for each in parts)
    return steps, values


def chart(title: str, curves: Sequence[Curve], dashed: Sequence[Curve] = (), logarithmic: bool = False) -> str:
    """One drawing of all runs' curves (SVG without a header), each in its colour, and dashed of a second column.

    `logarithmic` takes effect for positive values beyond a factor of 30.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5))
        axis = figure.add_axes((0.13, 0.2, 0.84, 0.68))
        for style, some in (("-", curves), ("--", dashed)):
            for number, curve in enumerate(some):
                steps, values = thinned(curve)
                colour, marker = COLOURS[number % len(COLOURS)], "." if len(steps) < 3 else None
                axis.plot(steps, values, color=colour, linewidth=1.4, linestyle=style, marker=marker)
        for number, curve in enumerate(curves):
            for step in curve.marks:
                axis.axvline(step, color=COLOURS[number % len(COLOURS)], linewidth=0.9, linestyle=":")
        positive = [value for curve in curves for value in curve.values if value > 0]
        everything = sum(len(curve.values) for curve in curves)
        if logarithmic and len(positive) == everything and max(positive) > 30 * min(positive):
            axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.set_xlabel("step")
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(alpha=0.15, color=INK)
        axis.patch.set_alpha(0)
        figure.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    drawing = re.sub(r' (width|height)="[\d.]+pt"', "", drawing, count=2)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    return drawing.replace("<svg", f'<svg role="img" aria-label="{title} over the steps"', 1)
