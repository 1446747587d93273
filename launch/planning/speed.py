"""Expected speed from the measured kernels of speeds.csv: milliseconds of forward and backward pass on one device.

Rows of kind `scan` are one layer's scan in both directions; a `step` is a whole backbone, which gives what the rest of
it costs. Taken from docs/kernels.md; put new measurements there and here.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from launch.planning.memory import Task
from vim_backbone import VimConfig
from vim_backbone.errors import UserError

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
    found = [
        Row(
            kind=row["kind"],
            batch=int(row["batch"]),
            tokens=int(row["tokens"]),
            channels=int(row["channels"]),
            depth=int(row["depth"]),
            milliseconds=float(row["milliseconds"]),
        )
        for row in rows
        if row["device"] == device
    ]
    if not found:
        known = ", ".join(sorted({row["device"] for row in rows}))
        raise UserError(f"no speeds of {device!r} were measured: choose from {known}")
    return found


def seconds_a_picture(task: Task, rows: list[Row]) -> float:
    """Seconds for the forward and backward pass of one picture, without communication or waiting for data."""
    decoder = VimConfig(d_model=task.decoder_width, depth=task.decoder_depth)
    again = 4 / 3 if task.recompute else 1.0  # the backward pass costs about twice the forward one
    encoder = again * _seconds(task.encoder, task.visible, rows)
    return encoder + _seconds(decoder, task.patches + task.special, rows)


def _seconds(config: VimConfig, tokens: int, rows: list[Row]) -> float:
    """Of the blocks: the scan at the speed of the nearest shape measured, the rest by its multiply-adds."""
    step = next(row for row in rows if row.kind == "step")
    beside = step.milliseconds - step.work * _scan_rate(step.tokens, step.channels, rows)
    rate = beside / (step.batch * step.tokens * step.depth * _products(step.channels, config.d_state))
    work = tokens * config.depth
    scan = work * config.d_inner * _scan_rate(tokens, config.d_inner, rows)
    return (scan + work * _products(config.d_inner, config.d_state) * rate) / 1e3


def _scan_rate(tokens: int, channels: int, rows: list[Row]) -> float:
    """Milliseconds a token and channel."""

    def distance(row: Row) -> float:
        return max(row.tokens / tokens, tokens / row.tokens) * max(row.channels / channels, channels / row.channels)

    nearest = min((row for row in rows if row.kind == "scan"), key=distance)
    return nearest.milliseconds / nearest.work


def _products(channels: int, states: int) -> float:
    """Multiply-adds of a token in one block: in_proj and out_proj, x_proj and dt_proj of both directions."""
    rank = channels / 32
    return 1.5 * channels**2 + 2 * channels * (2 * rank + 2 * states)
