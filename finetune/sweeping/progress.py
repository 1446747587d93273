"""The table of a running sweep; lines where there is no terminal."""

import sys
import time

from rich.live import Live
from rich.table import Table

from finetune.sweeping.ledger import Entry, Ledger
from launch.run.progress import user_console

ROWS = 30
SECONDS = 0.5
"""Between two drawings of the table."""


class Progress:
    """Use as a context around the sweep."""

    def __init__(self, metric: str, trials: int) -> None:
        self.metric = metric
        self.trials = trials
        self.console = user_console()
        self._live = Live(console=self.console, auto_refresh=False) if sys.stderr.isatty() else None
        self._ledger: Ledger | None = None
        self._last_draw = 0.0
        self._states: dict[int, str] = {}

    def __getstate__(self) -> dict[str, object]:
        """Nothing, as of the ledger."""
        return {}

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self.tick(now=True)
            self._live.stop()

    def say(self, line: str) -> None:
        """Print one line above the table."""
        self.console.print(line, markup=False)

    def show(self, ledger: Ledger) -> None:
        """Something changed; without a terminal each trial gets a line when it is over."""
        self._ledger = ledger
        if self._live is not None:
            return
        entries = ledger.entries()
        over = sum(entry.state not in ("waiting", "running") for entry in entries)
        for entry in entries:
            if self._states.get(entry.number) != entry.state and entry.state not in ("waiting", "running"):
                self.say(f"{over}/{self.trials}  {line_of(entry, self.metric)}")
            self._states[entry.number] = entry.state

    def tick(self, now: bool = False) -> None:
        """Draw the table, if it is time to."""
        if self._live is None or self._ledger is None or not (now or time.monotonic() - self._last_draw > SECONDS):
            return
        self._live.update(table(self._ledger, self.metric, self.trials), refresh=True)
        self._last_draw = time.monotonic()


def table(ledger: Ledger, metric: str, trials: int) -> Table:
    """The trials that run and the best of the others."""
    entries = ledger.entries()
    best = ledger.best(1)
    title = f"{sum(e.state not in ('waiting', 'running') for e in entries)} of {trials} trials are over"
    grid = Table(title=title + (f"; best {metric} {best[0].score(metric):.4f}" if best else ""))
    fields = [d.field for d in ledger.space]
    for heading in ("trial", "state", "done", metric, *fields):
        grid.add_column(heading)
    running = [e for e in entries if e.state == "running"]
    others = ledger.best(ROWS) + [e for e in reversed(entries) if e.state in ("stopped early", "failed")]
    for entry in (running + others)[:ROWS]:
        percent = entry.evaluations[-1].percent if entry.evaluations else 0
        values = [short(entry.fields.get(field)) for field in fields]
        grid.add_row(str(entry.number), entry.state, f"{percent:.0f} %", score_of(entry, metric), *values)
    return grid


def line_of(entry: Entry, metric: str) -> str:
    """One trial in one line."""
    fields = "  ".join(f"{name} {short(value)}" for name, value in entry.fields.items())
    why = f" ({entry.error})" if entry.error else ""
    return f"trial {entry.number} {entry.state}{why}  {metric} {score_of(entry, metric)}  {fields}"


def score_of(entry: Entry, metric: str) -> str:
    """The score, or a dash."""
    score = entry.score(metric)
    return "-" if score is None else f"{score:.4f}"


def short(value: object) -> str:
    """A value in a few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return text if len(text) <= 28 else "…" + text[-27:]
