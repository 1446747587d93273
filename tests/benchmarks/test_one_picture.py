"""One picture as one sequence: values of a long row beside float64, rows of the benchmark, its plot."""

import csv
import math
import sys

import pytest
import torch

from benchmarks import one_picture
from benchmarks.long_rows import long_mixer, packed_row_errors, random_weights
from tests.kernels.oracle import mixer_core
from tests.launch.real import ROOT, TWO_GPUS, begin, environment, finish, free_port
from vim_kernels import ScanWeights


def test_the_reference_of_long_rows_is_the_loop_over_tokens():
    generator = torch.Generator().manual_seed(3)
    forward, backward = (random_weights(6, 3, 2, generator, longest=300.0) for _ in range(2))
    xz = torch.randn(1, 77, 12, generator=generator)
    channels = torch.tensor([0, 5, 2])
    arrays = [ScanWeights._make(None if w is None else w.numpy() for w in each) for each in (forward, backward)]
    expected = mixer_core(xz[0, :, :6].numpy(), xz[0, :, 6:].numpy(), *arrays)[:, channels.numpy()]
    got = long_mixer(xz, forward, backward, channels)
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-6, atol=1e-7)  # weights are float32 there


def test_a_row_of_a_hundred_thousand_tokens_is_right_from_end_to_end():
    """Packed between two short ones, and alone; memories go to 100,000 tokens."""
    errors = packed_row_errors(100_000, (5, 300), 8, torch.float32, "cpu", n=4)
    assert len(errors) == 7
    assert max(errors.values()) < 3e-5, errors


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the benchmark at a small size; its rows."""

    def main(*argv):
        sizes = ["--device", "cpu", "--depth", "1", "--each", "0", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["one_picture", *sizes, *argv])
        one_picture.main()
        assert capsys.readouterr().out
        (table,) = tmp_path.glob("*.csv")
        assert table.with_suffix(".png").exists()
        return list(csv.DictReader(table.open()))

    return main


def test_each_net_has_a_row_at_each_size(run):
    rows = run("--sizes", "32", "64", "--tile", "32", "--slice", "10")
    assert [(row["net"], row["tokens"]) for row in rows] == [
        ("row", "5"), ("vit", "5"), ("row", "17"), ("sliced", "17"), ("tiles", "17"), ("vit", "17"),
    ]  # fmt: skip
    first, last = (next(row for row in rows if row["net"] == "row" and row["tokens"] == n) for n in ("5", "17"))
    slope = math.log(float(last["ms"]) / float(first["ms"])) / math.log(17 / 5)
    assert float(last["slope"]) == pytest.approx(slope, rel=1e-3)


def test_training_has_a_row_for_each_scan(run):
    rows = run("--train", "64", "--levels", "products", "--decoder-width", "16")
    assert [(row["net"], row["made again"]) for row in rows] == [
        ("step, full", "products"), ("step, pooled", "products"),
    ]  # fmt: skip
    assert all(float(row["ms"]) > 0 and float(row["GB"]) > 0 for row in rows)


def test_what_would_take_too_long_is_known_before():
    assert one_picture.expected_seconds({"ms": 500.0, "tokens": 100}, 400, 2.0) == pytest.approx(8.0)


DEVICES = ["cpu", pytest.param("cuda", marks=TWO_GPUS)]


def ranks_without_memory(device, where, net):
    """Exit code, what was printed and the rows of two processes, of which one has too little memory at 96 pixels."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
            "-m", "tests.benchmarks.ranks", "--ranks", "--device", device, "--depth", "1", "--each", "0",
            "--sizes", "64", "96", "--out", str(where)]  # fmt: skip
    env = environment(device, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}", OUT_OF_MEMORY=f"{net}:1")
    code, printed = finish(begin(argv, ROOT, env, device))
    rows = list(csv.DictReader((where / "one_picture.csv").open()))
    return code, printed, [(row["net"], row["pixels"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_too_large_for_one_process_is_left_out_by_all(device, tmp_path):
    code, printed, rows = ranks_without_memory(device, tmp_path, "row")
    assert code == 0, printed[-3000:]
    assert "row at 96 px: out of memory" in printed
    assert rows == [("row", "64"), ("ranks", "64"), ("ranks", "96")]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_stretch_too_large_for_one_process_ends_all(device, tmp_path):
    code, printed, rows = ranks_without_memory(device, tmp_path, "ranks")
    assert code != 0
    assert "ranks at 96 px: out of memory on process 1" in printed
    assert rows == [("row", "64"), ("ranks", "64"), ("row", "96")]
