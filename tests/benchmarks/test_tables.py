"""The benchmarks' parts that are not timing: plots of tables, memory, and peers that cannot run."""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from benchmarks import backbone, finetune_step, pretrain_step, scan
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


STEP = argparse.Namespace(
    device="cpu",
    dtype="fp32",
    decoder_width=64,
    mask=0.75,
    steps=1,
    nets=pretrain_step.NETS,
    kernels=True,
    recompute="products",
)


def test_a_step_of_pretraining_is_measured_for_every_net_and_split_into_kernels():
    case = pretrain_step.Case.read("vim_tiny:32:2:8:2")
    rows, kernels = pretrain_step.measure(case, "plain", STEP)
    assert [row["model"] for row in rows] == list(pretrain_step.NETS)
    vim, half, same = (row["M parameters"] for row in rows)
    assert half < vim < same
    assert all(row["pictures/s"] == pytest.approx(2e3 / row["ms"]) for row in rows)
    weights_and_averages = 3 * 4 * vim / 1e3  # GB
    assert weights_and_averages < rows[0]["GB"] < 2 * weights_and_averages
    for net in pretrain_step.NETS:
        own = {row["kernels"]: row["ms"] for row in kernels if row["model"] == net}
        assert own.pop("all") == pytest.approx(sum(own.values()), abs=0.01)
        assert ("scan backward" in own) == (net == "vim")
        assert {"products", "optimizer"} <= own.keys()


def test_the_vit_beside_trains_under_autocast():
    case = pretrain_step.Case.read("vim_tiny:32:2:8:2")
    trainer = pretrain_step.Trainer(
        "vit, half depth", case, "plain", argparse.Namespace(**vars(STEP) | {"dtype": "bf16"})
    )
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)


def test_the_floor_of_a_step_counts_the_scans_exponentials_and_the_products():
    case = pretrain_step.Case.read("vim_tiny:64:3:16:5")
    work = pretrain_step.work_of(case, STEP)
    encoder, decoder = 3 * (4 + 1) * 5, 3 * (16 + 1) * 2  # tokens and blocks: a quarter of 16 patches is seen
    assert work.exponentials == 2 * 2 * 16 * (encoder * 384 + decoder * 128)
    model = pretrain_step.build("vim", case, 64)
    multiplied = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")
    wanted = 0
    for tokens, blocks, depth in ((encoder, model.encoder.layers, 5), (decoder, model.decoder_layers, 2)):
        wanted += sum(getattr(b.mixer, name).weight.numel() for b in blocks for name in multiplied) * tokens // depth
    assert work.flop == 3 * 2 * wanted


def test_kernels_that_fit_no_group_stand_by_name_where_they_take_long():
    spent = [("tiled_backward_kernel", 3.0, 26), ("void gemm<1>", 6.0, 4), ("strange", 1.0, 2), ("little", 0.01, 7)]
    assert pretrain_step.grouped(spent) == [
        {"kernels": "products", "ms": 6.0, "launches": 4},
        {"kernels": "scan backward", "ms": 3.0, "launches": 26},
        {"kernels": "strange", "ms": 1.0, "launches": 2},
        {"kernels": "other", "ms": 0.01, "launches": 7},
        {"kernels": "all", "ms": 10.01, "launches": 39},
    ]


def test_the_plot_of_training_steps_has_a_bar_for_every_model_beside_vim(figures, tmp_path):
    table = [("a", "vim", 4.0, 2.0), ("a", "vit", 3.0, 3.0), ("b", "vim", 1.0, 1.0), ("b", "vit", 5.0, 0.5)]
    rows = []
    for case in ("a", "b"):
        own = [{"case": case, "mode": "plain", "model": m, "ms": ms, "GB": gb} for c, m, ms, gb in table if c == case]
        rows += pretrain_step.beside_vim(own, {"exp ms": 1.0})
    write_csv(tmp_path / "step.csv", rows, {"run": "a step", "device": "a machine"})
    pretrain_step.plot(tmp_path / "step.csv", tmp_path / "step.png")
    bars = [[bar.get_height() for bar in axis.patches] for axis in figures[0].axes]
    assert bars == [[0.75, 5.0], [1.5, 0.5]]


def test_steps_of_tasks_are_prepared_together_and_a_case_that_fails_has_a_row(monkeypatch, capsys, tmp_path):
    words = ["--tasks", "classification", "--sizes", "64", "20", "--depth", "2", "--rounds", "1", "--processes", "4",
             "--kinds", "inference", "--nets", "vit", "vim", "--out", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["finetune_step", *words])
    finetune_step.main()
    rows = read_csv(tmp_path / "finetune_step.csv")
    assert [(row["pixels"], row["net"]) for row in rows] == [
        ("64", "vim"),
        ("64", "vit"),
        ("20", "vim"),
        ("20", "vit"),
    ]
    vim, vit = (float(row["pictures / s"]) for row in rows[:2])
    assert float(rows[1]["time / vim"]) == pytest.approx(vim / vit, rel=0.02, abs=0.01)
    assert {row["pictures / s"] for row in rows[2:]} == {"failed"}  # patches of 16 in 20 pixels
    assert capsys.readouterr().out.count("failed") == 10
