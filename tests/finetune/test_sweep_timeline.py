"""When and where trials ran, from the record of a sweep to the bars of its picture."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from finetune.sweeping.config import ResourceConfig, SweepConfig
from finetune.sweeping.ledger import Ledger, TrialEvaluation
from finetune.sweeping.places import Place
from finetune.sweeping.space import read_space
from finetune.sweeping.timeline import about, draw_timeline, lanes_of, spans_of

SPACE = {"optim.base_lr": {"uniform": [0, 1]}}


@pytest.fixture
def ledger(tmp_path):
    record = Ledger(tmp_path, "max", "top1", read_space(SPACE, {"optim.base_lr": "a number"}))
    yield record
    record.close()


def config_of(**more):
    return SweepConfig(task="classification", metric="top1", space=SPACE, trials=9, **more)


def ran(ledger, began, ended, *devices, score=0.5):
    """A trial with two evaluations, at the middle and at the end of its time."""
    number = ledger.draw("random", 0)
    places = tuple(Place("here", device, "H100") for device in devices)
    for step, time in ((2, (began + ended) / 2), (4, ended)):
        evaluation = TrialEvaluation(step, 25 * step, {"top1": score}, time - began, began, time, places)
        ledger.note(number, evaluation, ledger.entry(number).fields, False)
    ledger.finish(number)


def test_the_time_line_has_each_trial_once_on_each_of_its_devices(ledger, tmp_path):
    for began, ended, *devices in (
        (0, 10, "GPU 1"), (1, 5, "GPU 0"), (2, 9, "GPU 1"), (6, 8, "GPU 0"), (12, 20, "GPU 0", "GPU 1"),
    ):  # fmt: skip
        ran(ledger, 1000.0 + began, 1000.0 + ended, *devices)
    ran(ledger, 1009.0, 1010.0, "GPU 1", score=math.nan)
    ledger.close()
    entries = Ledger(tmp_path, "max", "top1", ledger.space).entries()  # as another process reads it
    lanes = [(place.device, [span.number for span in lane]) for place, lane in lanes_of(spans_of(entries))]
    assert lanes == [("GPU 0", [1, 3, 4]), ("GPU 1", [0, 4]), ("GPU 1", [2, 5])]

    figure = Figure()
    config = config_of(resources=ResourceConfig(gpus=0.5), name="n")
    draw_timeline(figure.subplots(), config, entries)
    axes = figure.axes[0]
    bars = sorted((bar.get_y() + 0.4, bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert np.allclose(bars, [(0, 1, 5), (0, 6, 8), (0, 12, 20), (1, 0, 10), (1, 12, 20), (2, 2, 9), (2, 9, 10)])
    assert [bar.get_facecolor() for bar in axes.patches if bar.get_x() == 9] == [(0.8, 0.8, 0.8, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["GPU 0", "GPU 1", ""]
    assert about(config, entries) == "n: 1 failed, 5 finished on 2 x H100, 0.5 GPU a trial; 20 s"


def test_the_time_line_shows_where_a_trial_went_on(ledger):
    number = ledger.draw("random", 0)
    for step, began, host in ((1, 0.0, "a"), (2, 100.0, "b"), (4, 100.0, "b")):
        place = Place(host, "CPU", "")
        evaluation = TrialEvaluation(step, 25 * step, {"top1": 0.5}, 1.0, began, began + 10 * step, (place,))
        ledger.note(number, evaluation, {}, False)
    spans = spans_of(ledger.entries())
    assert [(s.place.host, s.began, s.ended, s.evaluations, s.last) for s in spans] == [
        ("a", 0, 10, [10], False), ("b", 100, 140, [120, 140], True),
    ]  # fmt: skip
    assert len(lanes_of(spans)) == 2


def test_a_record_without_times_has_no_time_line(ledger):
    ledger.note(ledger.draw("random", 0), TrialEvaluation(4, 100.0, {"top1": 0.5}, 1.0), {}, False)
    assert spans_of(ledger.entries()) == []
    assert about(config_of(name="n"), ledger.entries()) == "n: 1 running"
