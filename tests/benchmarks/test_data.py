"""The benchmark of reading: its pictures, what counts as waiting, and a row of every reader."""

import argparse

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from benchmarks import data, decoders
from benchmarks.machine import write_csv
from benchmarks.pictures import FORMATS, instances, mosaic, write_maps, write_pictures


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_have_the_size_and_format_asked_for(tmp_path, kind):
    first, second = write_pictures(tmp_path, kind, 0.06, 2)
    with Image.open(first) as image:
        assert image.format.lower() == kind
        assert image.size == (300, 200)
    assert first.parent.name != second.parent.name
    assert np.array_equal(np.asarray(mosaic(0.06, 1)), np.asarray(mosaic(0.06, 1)))
    assert not np.array_equal(np.asarray(mosaic(0.06, 0)), np.asarray(mosaic(0.06, 1)))


def test_labels_fit_the_pictures(tmp_path):
    with Image.open(write_maps(tmp_path, 0.06, 1, 8)[0]) as image:
        assert image.size == (300, 200)
        assert set(np.unique(np.asarray(image))) <= set(range(8))
    for entry in instances(300, 200, 0):
        x, y, w, h = entry["bbox"]
        assert 0 <= x < x + w <= 300
        assert 0 <= y < y + h <= 200


def test_waiting_is_what_the_next_batch_takes_once_the_first_are_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(data.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(data.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(data, "cpu_seconds", lambda: 2 * now[0])

    def batches():
        for number in range(7):
            now[0] += 50.0 if number < 3 else 3.0
            yield number

    took = data.consume(batches(), 3, 4, step_seconds=7.0)
    assert took == pytest.approx((40.0, 12.0, 80.0))


@pytest.mark.parametrize("reader", data.READERS)
def test_every_reader_gives_a_row(tmp_path, reader):
    options = argparse.Namespace(pixels=32, skip=0, steps=2, step=None)
    paths = write_pictures(tmp_path, "jpeg", 0.06, 4)
    row = data.measure(reader, data.Case("jpeg", 0.06, paths, tmp_path, 2, 0, 0), options)
    assert row["images/s"] > 0
    waits = data.measure(
        reader, data.Case("jpeg", 0.06, paths, tmp_path, 2, 0, 0), argparse.Namespace(**vars(options) | {"step": 1.0})
    )
    assert 0 < waits["waiting"] < 1


def test_times_stand_beside_decoding_and_the_plot_has_a_line_for_each_reader(tmp_path, monkeypatch):
    rows = [
        {"format": kind, "megapixels": size, "reader": reader, "images/s a core": a_core, "megapixels/s a core": a_core}
        for kind in ("jpeg", "png") for size in (4.0, 0.2) for reader, a_core in (("decode", 100.0), ("timm", 25.0))
    ]  # fmt: skip
    assert [row["time / decode"] for row in data.beside_decoding(rows)[:2]] == [1.0, 4.0]
    assert data.beside_decoding(rows[1:2])[0]["time / decode"] == ""
    saved = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **_: saved.append(figure))
    write_csv(tmp_path / "data.csv", rows, {"run": "data", "device": "a machine"})
    data.plot(tmp_path / "data.csv", tmp_path / "data.png")
    lines = [[(line.get_label(), list(line.get_xdata())) for line in axis.lines] for axis in saved[0].axes]
    assert lines == [[("decode", [0.2, 4.0]), ("timm", [0.2, 4.0])]] * 2
    plt.close("all")


def test_decoders_that_are_not_there_are_named(monkeypatch, capsys):
    def missing(name):
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(decoders, "import_module", missing)
    ways = decoders.decoders()
    assert list(ways["whole"]) == ["Pillow", "Pillow, as an array", "torchvision"]
    assert "simplejpeg: no simplejpeg here" in capsys.readouterr().out
