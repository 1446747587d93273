"""The benchmarks' parts that are not timing: plots of tables, memory, and peers that cannot run."""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from benchmarks import backbone, scan
from benchmarks.machine import read_csv, write_csv

H200 = Path(__file__).parents[2] / "docs" / "tables" / "scan-h200.csv"


@pytest.fixture
def figures(monkeypatch):
    """Figures that are saved, in order."""
    saved = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **_: saved.append(figure))
    yield saved
    plt.close("all")


def test_the_plot_of_the_scan_has_a_line_for_every_implementation(figures, tmp_path):
    scan.plot(H200, tmp_path / "scan.png")
    rows = read_csv(H200)
    for axis, which in zip(figures[0].axes, ("forward", "backward"), strict=True):
        for line in axis.lines:
            expected = [r for r in rows if r["what"] == line.get_label() and r["pass"] == which]
            assert list(line.get_ydata()) == [float(r["1e9 updates/s"]) for r in expected]
        assert {line.get_label() for line in axis.lines} == {r["what"] for r in rows}


def test_the_plot_of_the_backbone_keeps_sizes_and_models_apart(figures, tmp_path):
    rows = [{"pixels": p, "model": m, "ms": p * k} for k, m in ((1, "vim"), (2, "deit")) for p in (224, 512)]
    write_csv(tmp_path / "backbone.csv", rows, {"run": "forward pass", "device": "a machine"})
    backbone.plot(tmp_path / "backbone.csv", tmp_path / "backbone.png")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figures[0].axes[0].lines}
    assert lines == {"vim": ([224, 512], [224, 512]), "deit": ([224, 512], [448, 1024])}


def test_a_peer_that_cannot_run_is_named_with_its_reason(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no compiler here\nand much more")

    options = argparse.Namespace(device="cpu", dtype="fp32", backend="torch")
    monkeypatch.setattr(scan, "cases", lambda *_: {"scan x 2, associative_scan": broken})
    assert scan.rows_of("1x4x16", options, 1e9, ["associative_scan"]) == []
    assert "associative_scan: RuntimeError: no compiler here\n" in capsys.readouterr().out
    monkeypatch.setattr(scan, "cases", lambda *_: {"layer, torch": broken})
    with pytest.raises(RuntimeError):
        scan.rows_of("1x4x16", options, 1e9, [])


def test_memory_of_a_forward_pass_is_what_its_tensors_took():
    options = argparse.Namespace(
        model="vim_tiny", batch=1, less_memory=False, dtype="fp32", train=False, mask=0.0, device="cpu", backend="torch"
    )
    small, large = (1e6 * backbone.peak_megabytes("vim", options, pixels) for pixels in (64, 256))
    tokens = (256 // 16) ** 2 - (64 // 16) ** 2
    stream_and_xz = 4 * (192 + 2 * 384)  # bytes a token that are live while the scan runs
    assert stream_and_xz * tokens < large - small < 20 * stream_and_xz * tokens


def test_the_costliest_kernels_of_a_step_are_listed_first():
    options = argparse.Namespace(
        model="vim_tiny", batch=1, less_memory=False, dtype="fp32", train=True, mask=0.0, device="cpu", backend="torch"
    )
    head, *lines = backbone.costliest(backbone.Case("vim", options, 32), 5).strip().splitlines()
    spent = [float(line.split()[0]) for line in lines]
    assert len(spent) == 5
    assert spent == sorted(spent, reverse=True)
    assert 0 < sum(spent) < float(head.split()[0])
