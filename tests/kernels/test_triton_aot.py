"""A performance gate without a GPU: what the compiler makes of every shipped kernel, for every supported device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from tests.kernels.triton_aot import TARGETS

pytestmark = pytest.mark.slow
REGISTERS = {"scan_forward_kernel": 168, "chunk_state_kernel": 168}
TILED_REGISTERS = 168
"""Of the tiled forward kernel on the paths that a model takes, both directions at once: three warps a scheduler."""
SPILLS = {
    "tiled_scan_backward_kernel": 176,
    "pooled_convolution_backward_kernel": 8,
    "pooled_output_backward_kernel": 32,
}
"""Bytes, with Triton 3.9; 48 with 3.6. Four tokens a group spill a little, and are faster than two that do not.
The pooled kernels, with Triton 3.9: 8 on sm_90 and sm_100, where these sizes were the fastest measured; 29 scalar
registers on gfx942, where the norm's two sweeps have many flags."""


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    """Compiled in a process of its own: in this one the kernels may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_aot", request.param],
        capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_spills_and_registers_leave_room(compiled):
    assert len(compiled) >= 17
    for report in compiled:
        assert report["spills"] <= SPILLS.get(report["kernel"], 0), report
        both_at_once = report["kernel"] == "tiled_scan_forward_kernel" and report["flags"]["DIRECTIONS"] == 2
        assert report["registers"] <= (TILED_REGISTERS if both_at_once else REGISTERS.get(report["kernel"], 255)), (
            report
        )


def test_core_forward_loops_neither_shuffle_nor_wait(compiled):
    if "gfx" in compiled[0]["target"]:
        pytest.skip("the loops are read off NVIDIA's machine code")
    scans = [(c["kernel"], c["loops"][0]) for c in compiled if c["kernel"] in REGISTERS]
    assert scans
    for kernel, loop in scans:
        assert loop["MUFU"] >= 16, (kernel, loop)  # the loop over tokens, one exponential a state
        assert "SHFL" not in loop, (kernel, loop)
        assert "BAR" not in loop, (kernel, loop)
        assert sum(loop.values()) <= 13 * loop["MUFU"], (kernel, loop)


def tiled(compiled, kernel):
    """What became of a Gluon kernel, in all its configurations."""
    if "gfx" in compiled[0]["target"]:
        pytest.skip("Gluon kernels are for NVIDIA")
    report = [c for c in compiled if c["kernel"] == kernel]
    assert report
    return report


def test_tiled_forward_loop_does_not_shuffle(compiled):
    """The loop over tiles, all of it unrolled: its barriers do not grow with the tokens."""
    for report in tiled(compiled, "tiled_scan_forward_kernel"):
        flags, loop = report["flags"], report["loops"][0]
        exponentials = flags["TILE"] * flags["states_thread"] * flags["channels_thread"]
        assert loop["MUFU"] >= exponentials, report
        assert "SHFL" not in loop, report
        assert loop.get("BAR", 0) <= 3, report
        assert sum(loop.values()) <= 13 * exponentials, report


def test_tiled_backward_loops_do_not_shuffle(compiled):
    """Two loops of four tokens: states computed again, tokens walked back. Sums go through shared memory."""
    for report in tiled(compiled, "tiled_scan_backward_kernel"):
        flags, (again, back, *_) = report["flags"], report["loops"]
        elements = flags["GROUP"] * flags["states_thread"] * flags["channels_thread"]
        assert again["MUFU"] == elements, report
        assert elements < back["MUFU"] <= 1.1 * elements, report
        assert "SHFL" not in again | back, report
        assert back["BAR"] <= 2, report
        assert sum(again.values()) <= 5 * elements, report
        assert sum(back.values()) <= 19 * elements, report


def test_backward_of_the_convolution_reads_every_row_once(compiled):
    """Its loop over blocks of rows has two ways, one for blocks with a border of sequences in them."""
    if "gfx" in compiled[0]["target"]:
        pytest.skip("the loops are read off NVIDIA's machine code")
    (report,) = (c for c in compiled if c["kernel"] == "conv_backward_kernel")
    flags, loop = report["flags"], report["loops"][-1]
    rows = flags["STEPS"] + 2 * (flags["WIDTH"] - 1)
    gradients = flags["DIRECTIONS"] * (flags["STEPS"] + flags["WIDTH"] - 1)
    assert loop["LDG"] <= 2 * (rows + gradients) + rows + 2, report  # and the sequences of the rows, of both ends
    assert not {"SHFL", "BAR"} & loop.keys(), report
    elements = loop["MUFU"] // (2 * 2 * gradients) * flags["STEPS"]  # a thread; two instructions a sigmoid
    assert sum(loop.values()) <= 2 * 100 * elements, report
