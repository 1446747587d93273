"""The metrics file of a resumed run, and rates over a window."""

import json

import pytest

from launch.run.metrics import Throughput, forget_after
from tests.rows import read_metrics


def test_metrics_after_the_resumed_step_are_forgotten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": s, "loss": s / 10}) for s in range(1, 6)]
    file.write_text("\n".join(rows) + '\n{"step": 6, "lo')  # killed while writing
    forget_after(file, 3)
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3]


def test_rates_are_those_since_they_were_last_read(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.0, 6.0, 6.0])  # begin, wait from 1 to 3, read at 4; begin again, read at 6
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Throughput()
    assert speed.waiting(iter(["batch"])) == "batch"
    speed.images, speed.tokens = 8, 400
    assert speed.read() == pytest.approx({"images_per_second": 2.0, "tokens_per_second": 100.0, "data_wait_share": 0.5})
    assert speed.read() == {"images_per_second": 0.0, "tokens_per_second": 0.0, "data_wait_share": 0.0}
