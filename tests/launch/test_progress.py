"""What is left is counted from steady steps, not from those that compile; nothing is left at the end."""

import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.run import progress
from launch.run.progress import Pace, ProgressReport


@given(
    st.floats(1e-3, 1e3),
    st.lists(st.floats(4, 1e4), min_size=1, max_size=4),
    st.integers(5, 300),
)
def test_slow_first_steps_are_left_out(steady, slow, count):
    pace = Pace()
    for seconds in [steady * factor for factor in slow] + [steady] * count:
        pace.add(seconds)
    assert pace.seconds() == pytest.approx(steady)


@given(st.lists(st.floats(1e-3, 1e3), max_size=3))
def test_too_few_steps_promise_nothing(seconds):
    pace = Pace()
    for value in seconds:
        pace.add(value)
    assert pace.seconds() is None


def test_a_change_of_pace_shows():
    pace = Pace()
    for seconds in [1.0] * 200 + [2.0] * Pace.WINDOW:
        pace.add(seconds)
    assert pace.seconds() == pytest.approx(2.0)


def printed(monkeypatch, durations, terminal, start=0):
    """All that a report prints when its items take so many seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=160, soft_wrap=True, highlight=False)
    with ProgressReport(console, "step", start + len(durations), start) as report:
        for done, seconds in enumerate(durations, start=start + 1):
            now[0] += seconds
            report.update(done, "loss 1.0")
            if terminal:
                report._bar.refresh()
    return file.getvalue()


def test_lines_without_a_terminal(monkeypatch):
    lines = printed(monkeypatch, [60.0, *[6.0] * 9], terminal=False, start=5).splitlines()
    assert lines[0] == "step 6/15  loss 1.0"
    assert lines[2] == "step 10/15  loss 1.0  about 0:00:30 left"
    assert lines[-1] == "step 15/15  loss 1.0"
    steps = [int(line.split("/")[0].split()[1]) for line in lines]
    assert all(a < b for a, b in pairwise(steps))


def test_a_pipe_is_no_terminal_even_where_colours_are_forced(monkeypatch):
    """As in Jupyter, whose kernels set FORCE_COLOR."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", file)
    with ProgressReport(progress.user_console(), "step", 3) as report:
        for done in (1, 2, 3):
            report.update(done, "[loss] 1.0")
    assert file.getvalue() == "step 3/3  [loss] 1.0\n"


def test_a_bar_on_a_terminal(monkeypatch):
    text = printed(monkeypatch, [60.0, *[6.0] * 9], terminal=True)
    assert progress.COMPILING in text
    assert "about 0:00:30 left" in text
    assert "0:00:00 left" not in text
    assert "left" not in text[text.rindex("10/10") :]


def test_a_long_first_step_is_explained(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    file = io.StringIO()
    with ProgressReport(Console(file=file, force_terminal=False), "step", 3) as report:
        report._wait.join()
    assert file.getvalue() == f"{progress.COMPILING} ...\n"
