"""Expected speed from the measured kernels of speeds.csv: milliseconds of forward and backward pass on one device.

Rows of kind `scan` are one layer's scan in both directions; a `step` is a whole backbone, which gives what the rest of
it costs. Taken from docs/kernels.md; put new measurements there and here.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.planning.memory import Stack
from vim_backbone import VimConfig
from vim_backbone.errors import UserError
from vim_backbone.memory import Recompute

RELATIVE: dict[Recompute, float] = {"none": 0.943, "inputs": 1.0, "states": 1.097, "products": 1.150}
"""Time of a step beside that at `inputs`, which the table was measured at: 78.9, 83.7, 91.8 and 96.3 ms, Vim-B at 1024
pixels, docs/results-h100-2026-11-26.md."""
TABLE = Path(__file__).with_name("speeds.csv")


@dataclass(frozen=True)
class Row:
    """One measurement."""

    kind: str
    batch: int
    tokens: int
    channels: int
    depth: int
    milliseconds: float

    @property
    def work(self) -> float:
        """Tokens times channels times layers, which the time of a scan goes with."""
        return self.batch * self.tokens * self.channels * self.depth


def measured(device: str, table: Path = TABLE) -> list[Row]:
    """Rows of a device. Raises UserError naming the devices that there are."""
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = ("batch", "tokens", "channels", "depth")
    matching = [
        Row(row["kind"], *(int(row[size]) for size in sizes), milliseconds=float(row["milliseconds"]))
        for row in rows
        if row["device"] == device
    ]
    if not matching:
        devices = ", ".join(sorted({row["device"] for row in rows}))
        raise UserError(f"no speeds of {device!r} were measured: choose from {devices}")
    return matching


def seconds_a_picture(stacks: Iterable[Stack], rows: list[Row]) -> float:
    """Seconds for the forward and backward pass of one picture, without communication or waiting for data."""
    return sum(_seconds(stack, rows) * RELATIVE[stack.recompute] for stack in stacks)


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

    def distance(row: Row) -> float:
        return max(row.tokens / tokens, tokens / row.tokens) * max(row.channels / channels, channels / row.channels)

    nearest = min((row for row in rows if row.kind == "scan"), key=distance)
    return nearest.milliseconds / nearest.work


def _products(config: VimConfig, apart: bool = False) -> float:
    """Multiply-adds of a token in one block: in_proj and out_proj, x_proj and dt_proj of both directions.

    Where these are apart, in_proj and out_proj have each token twice; each direction still scans it once.
    """
    e, rank = config.d_inner, config.dt_rank
    return (1 + apart) * 3 * config.d_model * e + 2 * e * (2 * rank + 2 * config.d_state)
