"""Expected speed from what was measured, speeds.csv: milliseconds of forward and backward pass on one device.

A row of kind `full` or `pooled` is a whole compiled step of pretraining with this scan, its tokens, channels and layers
of encoder + decoder. Where a device has none, its rows of kind `scan`, one layer's scan in both directions, and
`step`, a whole backbone, which gives what the rest of it costs, are put together. Taken from docs/results-*.md; put new
measurements there and here.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.planning.memory import Stack
from vim_backbone import VimConfig
from vim_backbone.errors import UserError
from vim_backbone.memory import Recompute

RELATIVE: dict[Recompute, float] = {"none": 0.943, "inputs": 1.0, "states": 1.097, "products": 1.150}
"""Time of a step beside that at `inputs`, which the table was measured at: 78.9, 83.7, 91.8 and 96.3 ms, Vim-B at 1024
pixels, docs/results-h100-2026-11-26.md."""
TABLE = Path(__file__).with_name("speeds.csv")


@dataclass(frozen=True)
class Layers:
    """Layers alike: what the time of their blocks goes with."""

    tokens: int
    channels: int
    depth: int

    def work(self) -> tuple[float, float]:
        """Tokens times channels times layers, as of a scan, and multiply-adds of the products, of one picture."""
        layers = self.tokens * self.depth
        return layers * self.channels, layers * _products(VimConfig(d_model=self.channels // 2, depth=1, expand=2))


@dataclass(frozen=True)
class Row:
    """One measurement, of one or more stacks of layers."""

    kind: str
    batch: int
    stacks: tuple[Layers, ...]
    milliseconds: float

    @property
    def tokens(self) -> int:
        """Of the first stack."""
        return self.stacks[0].tokens

    @property
    def channels(self) -> int:
        """Of the first stack."""
        return self.stacks[0].channels

    @property
    def depth(self) -> int:
        """Of the first stack."""
        return self.stacks[0].depth

    @property
    def work(self) -> float:
        """Tokens times channels times layers, which the time of a scan goes with."""
        return self.batch * sum(stack.work()[0] for stack in self.stacks)


def measured(device: str, table: Path = TABLE) -> list[Row]:
    """Rows of a device. Raises UserError naming the devices that there are."""
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    matching = []
    for row in rows:
        if row["device"] == device:
            sizes = [[int(size) for size in row[name].split("+")] for name in ("tokens", "channels", "depth")]
            stacks = tuple(Layers(*each) for each in zip(*sizes, strict=True))
            matching.append(Row(row["kind"], int(row["batch"]), stacks, float(row["milliseconds"])))
    if not matching:
        devices = ", ".join(sorted({row["device"] for row in rows}))
        raise UserError(f"no speeds of {device!r} were measured: choose from {devices}")
    return matching


def seconds_a_picture(stacks: Iterable[Stack], rows: list[Row]) -> float:
    """Seconds for the forward and backward pass of one picture, without communication or waiting for data."""
    stacks = list(stacks)
    steps = [row for row in rows if row.kind == stacks[0].config.scan]
    if not steps:
        return sum(_seconds(stack, rows) * RELATIVE[stack.recompute] for stack in stacks)
    weights = _weights(steps)
    nearest = min(steps, key=lambda row: _distance(row, stacks[0].tokens, stacks[0].config.d_inner))
    ours = sum(_cost(stack, weights) * RELATIVE[stack.recompute] for stack in stacks)
    theirs = sum(scan * weights[0] + products * weights[1] for scan, products in (s.work() for s in nearest.stacks))
    return nearest.milliseconds / nearest.batch / 1e3 * ours / theirs


def _weights(steps: list[Row]) -> list[float]:
    """Milliseconds of a token and channel and of a multiply-add, of least squares of the relative errors of the steps.

    The nearest step then gives the level; these tell how steps of other widths and lengths differ from it.
    """
    work = [[row.batch * sum(part) / row.milliseconds for part in zip(*(s.work() for s in row.stacks), strict=True)]
            for row in steps]  # fmt: skip
    unit = torch.tensor(work, dtype=torch.float64)
    scale = unit.mean(0)
    return (
        torch.linalg.lstsq(unit / scale, torch.ones(len(steps), 1, dtype=torch.float64)).solution[:, 0] / scale
    ).tolist()


def _cost(stack: Stack, weights: list[float]) -> float:
    """Milliseconds of a stack of one picture, at these weights."""
    work = stack.tokens * stack.config.depth
    return work * (stack.config.d_inner * weights[0] + _products(stack.config, stack.apart) * weights[1])


def _seconds(stack: Stack, rows: list[Row]) -> float:
    """Of the blocks: the scan at the speed of the nearest shape measured, the rest by its multiply-adds."""
    step = next(row for row in rows if row.kind == "step")
    beside = step.milliseconds - step.work * _scan_rate(step.tokens, step.channels, rows)
    config = stack.config
    measured_config = VimConfig(d_model=step.channels // config.expand, depth=step.depth, d_state=config.d_state)
    rate = beside / (step.batch * step.tokens * step.depth * _products(measured_config))
    work = stack.tokens * config.depth
    scan = work * config.d_inner * _scan_rate(stack.tokens, config.d_inner, rows)
    return (scan + work * _products(config, stack.apart) * rate) / 1e3


def _scan_rate(tokens: int, channels: int, rows: list[Row]) -> float:
    """Milliseconds a token and channel."""
    nearest = min((row for row in rows if row.kind == "scan"), key=lambda row: _distance(row, tokens, channels))
    return nearest.milliseconds / nearest.work


def _distance(row: Row, tokens: int, channels: int) -> float:
    return max(row.tokens / tokens, tokens / row.tokens) * max(row.channels / channels, channels / row.channels)


def _products(config: VimConfig, apart: bool = False) -> float:
    """Multiply-adds of a token in one block: in_proj and out_proj, x_proj and dt_proj of both directions.

    Where these are apart, in_proj and out_proj have each token twice; each direction still scans it once.
    """
    e, rank = config.d_inner, config.dt_rank
    return (1 + apart) * 3 * config.d_model * e + 2 * e * (2 * rank + 2 * config.d_state)
