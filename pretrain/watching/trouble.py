"""Trouble that a run's numbers show, named while it happens with the field that would help."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pretrain.config import PretrainConfig

WAITING = 0.2
"""Share of the time spent waiting for data from which on it is named."""
ROWS = 20
"""Rows of metrics that are looked back on."""
FLAT_ROWS, FLAT_SHARE = 40, 0.1
"""The loss is called flat over so many rows, or over this share of the run where that is more."""
ALIKE = 2.0
"""RankMe below which the features of all pictures are multiples of one another, or nearly so."""
EVALUATION = 0.02
"""Share of the time that evaluations may take."""
Row = Mapping[str, Any]


class Troubles:
    """Reads the rows of metrics as they come, and says once when a trouble begins."""

    def __init__(self, config: PretrainConfig, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        window = max(FLAT_ROWS, round(FLAT_SHARE * total_steps / config.log_every))
        self.rows: deque[Row] = deque(maxlen=window)
        """Of training, the latest."""
        self.evaluations: list[Row] = []
        self.begun: set[str] = set()
        """Troubles that have been said and go on."""

    def after(self, row: Row, bad_steps: int = 0) -> list[str]:
        """Lines on what begins with this row; `bad_steps`: among the last 100."""
        if "loss" in row:
            self.rows.append(row)
            troubles = {
                "waiting": self.waiting(),
                "clipped": self.clipped(),
                "flat": self.flat(),
                "bad": self.bad(bad_steps),
            }
        else:
            self.evaluations.append(row)
            troubles = {"collapse": self.collapse(), "overfitting": self.overfitting()}
        lines = [line for name, line in troubles.items() if line and name not in self.begun]
        self.begun -= troubles.keys()
        self.begun |= {name for name, line in troubles.items() if line}
        return lines

    def latest(self, column: str, count: int) -> list[float]:
        """The last so many values of a column; none before there are as many rows."""
        rows = list(self.rows)[-count:]
        values = [row[column] for row in rows if isinstance(row.get(column), int | float)]
        return values if len(values) == count else []

    def waiting(self) -> str | None:
        """The data come too slowly."""
        share = statistics.median(self.latest("data_wait_share", ROWS // 2) or [0.0])
        if share <= WAITING:
            return None
        more = ", or set data.resize torch" if self.config.data.resize != "torch" else ""
        return f"{share:.0%} of the time is spent waiting for data: raise data.workers{more} (docs/data.md)"

    def clipped(self) -> str | None:
        """Most gradients are cut."""
        optim = self.config.optim
        if not optim.clip_grad or list(self.rows)[-ROWS:][0]["step"] <= optim.warmup_steps:
            return None
        norms = self.latest("grad_norm", ROWS)
        cut = sum(norm > optim.clip_grad for norm in norms)
        if cut <= len(norms) / 2:
            return None
        return (
            f"the gradient was clipped in {cut} of the last {len(norms)} rows (norm {statistics.median(norms):.3g}, "
            f"optim.clip_grad {optim.clip_grad:g}): lower optim.base_lr, or raise optim.clip_grad"
        )

    def flat(self) -> str | None:
        """The loss does not fall although the rate is high: not by one standard error from half to half of a window."""
        optim, count = self.config.optim, self.rows.maxlen or 0
        loss, rate = self.latest("loss", count), self.latest("lr", count)
        if not loss or not rate:
            return None
        first, last = self.rows[0], self.rows[-1]
        peak = optim.peak(round(self.config.mean_batch_size))
        if first["step"] <= optim.warmup_steps or rate[-1] < peak / 2 or first.get("stage") != last.get("stage"):
            return None
        half = count // 2
        noise = statistics.stdev(b - a for a, b in pairwise(loss)) / 2**0.5  # a trend is no noise
        fall = statistics.fmean(loss[:half]) - statistics.fmean(loss[-half:])
        if fall > noise * (2 / half) ** 0.5:
            return None
        return (
            f"the loss is flat at {statistics.fmean(loss[-half:]):.4g} since step {first['step']}, with a learning "
            f"rate of {rate[-1]:.2g}: try another optim.base_lr (now {optim.base_lr:g}), or more optim.warmup_steps"
        )

    def bad(self, count: int) -> str | None:
        """Steps that are not taken."""
        if count < 3:
            return None
        help_ = ["lower optim.base_lr"]
        help_ += ["set optim.clip_grad 1"] if not self.config.optim.clip_grad else []
        help_ += ["start anew with model.mixer_norm true"] if not self.config.architecture().mixer_norm else []
        help_ += ["take precision fp32"] if self.config.precision == "bf16" else []
        return f"{count} of the last 100 steps were bad and not taken: {' or '.join(help_)}"

    def collapse(self) -> str | None:
        """The features of all pictures become alike. Those of fresh weights, which soon change, are no measure."""
        settled = self.config.optim.warmup_steps
        ranks = [row["rank_me"] for row in self._of_stage("rank_me") if row["step"] > settled]
        if not ranks or (ranks[-1] >= max(ranks) / 2 and ranks[-1] >= ALIKE):
            return None
        fall = f"fell from {max(ranks):.1f} to" if ranks[-1] < max(ranks) / 2 else "is"
        return (
            f"the features collapse: RankMe {fall} {ranks[-1]:.1f}; lower optim.base_lr, and start again or go on from "
            "an earlier checkpoint (keep_every keeps them)"
        )

    def overfitting(self) -> str | None:
        """The loss of held-out pictures rises while that of training falls."""
        rows = self._of_stage("held_out_loss")
        losses = [row["held_out_loss"] for row in rows]
        if len(losses) < 3:
            return None
        least = min(losses)
        if min(losses[-2:]) - least <= 0.02 * abs(least):
            return None
        at = rows[losses.index(least)]["step"]
        return (
            f"the loss of held-out pictures rises, from {least:.4g} at step {at} to {losses[-1]:.4g}: the run "
            "overfits its pictures; take more pictures, fewer epochs, or a smaller data.min_scale"
        )

    def _of_stage(self, column: str) -> Sequence[Row]:
        stage = self.evaluations[-1].get("stage")
        return [
            row for row in self.evaluations
            if row.get("stage") == stage and math.isfinite(row.get(column) or math.nan)
        ]  # fmt: skip
