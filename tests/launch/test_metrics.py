"""The metrics file of a resumed run, and rates over a window."""

import errno
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.run.metrics import Throughput, forget_after
from tests.rows import read_metrics
from vim_backbone import UserError
from vim_backbone.files import json_line, write_json


def test_metrics_after_the_resumed_step_are_forgotten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": s, "loss": s / 10}) for s in range(1, 6)]
    file.write_text("\n".join(rows) + '\n{"step": 6, "lo')  # killed while writing
    forget_after(file, 3)
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3]


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


ROWS = st.one_of(
    st.builds(lambda step, loss: {"step": step, "loss": loss}, st.integers(0, 9), st.floats()),
    st.sampled_from(
        [[], {}, "x", None, 3, {"step": None}, {"step": "4"}, {"step": True}, {"loss": 1.0}, {"step": 1.5}]
    ),
)


@given(rows=st.lists(ROWS), half=st.binary(max_size=8).filter(lambda b: not b.strip().isdigit()))
def test_odd_rows_are_left_out_and_the_rest_is_json(rows, half):
    with TemporaryDirectory() as place:
        file = Path(place) / "metrics.jsonl"
        file.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + half)
        forget_after(file, 4)
        good = [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int and row["step"] <= 4]
        wanted = [row | {"loss": row["loss"] if math.isfinite(row["loss"]) else None} for row in good]
        assert strict(file.read_text()) == wanted


def test_lines_that_are_no_rows_are_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n[]\n\xff\xfe\n{"step": 2}\n{"st')
    assert forget_after(file, 9) == [f"2 lines of {file} are no rows of metrics and are left out"]
    assert forget_after(file, 9) == []


def test_a_folder_in_place_of_the_metrics_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl: Is a directory; move it away"):
        forget_after(tmp_path / "metrics.jsonl", 1)


def test_a_full_disk_leaves_the_history(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n')

    def full(path, text, encoding):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="the disk is full"):
        forget_after(file, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_nan_is_null(tmp_path):
    write_json(tmp_path / "a.json", {"AP": float("nan"), "more": [1.5, (float("inf"), {"x": -float("inf")})]})
    assert strict((tmp_path / "a.json").read_text().replace("\n", "")) == [
        {"AP": None, "more": [1.5, [None, {"x": None}]]}
    ]
    assert json_line({"loss": float("nan"), "step": 3}) == '{"loss": null, "step": 3}\n'


def test_rates_are_those_since_they_were_last_read(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.0, 6.0, 6.0])  # begin, wait from 1 to 3, read at 4; begin again, read at 6
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Throughput()
    assert speed.waiting(iter(["batch"])) == "batch"
    speed.images, speed.tokens = 8, 400
    assert speed.read() == pytest.approx({"images_per_second": 2.0, "tokens_per_second": 100.0, "data_wait_share": 0.5})
    assert speed.read() == {"images_per_second": 0.0, "tokens_per_second": 0.0, "data_wait_share": 0.0}
