"""A performance gate without a GPU: what the compiler makes of every shipped kernel, for every supported device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from tests.kernels.triton_aot import TARGETS

REGISTERS = {"scan_forward_kernel": 168, "chunk_state_kernel": 168}
TILED_REGISTERS = 168
"""Of the tiled forward kernel on the paths that a model takes, both directions at once: three warps a scheduler."""
SPILLS = {"tiled_scan_backward_kernel": 176}
"""Bytes, with Triton 3.9; 48 with 3.6. Four tokens a group spill a little, and are faster than two that do not."""


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
    for found in compiled:
        assert found["spills"] <= SPILLS.get(found["kernel"], 0), found
        both_at_once = found["kernel"] == "tiled_scan_forward_kernel" and found["flags"]["DIRECTIONS"] == 2
        assert found["registers"] <= (TILED_REGISTERS if both_at_once else REGISTERS.get(found["kernel"], 255)), found


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
    found = [c for c in compiled if c["kernel"] == kernel]
    assert found
    return found


def test_tiled_forward_loop_does_not_shuffle(compiled):
    """The loop over tiles, all of it unrolled: its barriers do not grow with the tokens."""
    for found in tiled(compiled, "tiled_scan_forward_kernel"):
        flags, loop = found["flags"], found["loops"][0]
        exponentials = flags["TILE"] * flags["states_thread"] * flags["channels_thread"]
        assert loop["MUFU"] >= exponentials, found
        assert "SHFL" not in loop, found
        assert loop.get("BAR", 0) <= 3, found
        assert sum(loop.values()) <= 13 * exponentials, found


def test_tiled_backward_loops_do_not_shuffle(compiled):
    """Two loops of four tokens: states computed again, tokens walked back. Sums go through shared memory."""
    for found in tiled(compiled, "tiled_scan_backward_kernel"):
        flags, (again, back, *_) = found["flags"], found["loops"]
        elements = flags["GROUP"] * flags["states_thread"] * flags["channels_thread"]
        assert again["MUFU"] == elements, found
        assert elements < back["MUFU"] <= 1.1 * elements, found
        assert "SHFL" not in again | back, found
        assert back["BAR"] <= 2, found
        assert sum(again.values()) <= 5 * elements, found
        assert sum(back.values()) <= 19 * elements, found


def test_backward_of_the_convolution_reads_every_row_once(compiled):
    """Its loop over blocks of rows has two ways, one for blocks with a border of sequences in them."""
    if "gfx" in compiled[0]["target"]:
        pytest.skip("the loops are read off NVIDIA's machine code")
    (found,) = (c for c in compiled if c["kernel"] == "conv_backward_kernel")
    flags, loop = found["flags"], found["loops"][-1]
    seen = flags["STEPS"] + 2 * (flags["WIDTH"] - 1)
    gradients = flags["DIRECTIONS"] * (flags["STEPS"] + flags["WIDTH"] - 1)
    assert loop["LDG"] <= 2 * (seen + gradients) + seen + 2, found  # and the sequences of the rows, of both ends
    assert not {"SHFL", "BAR"} & loop.keys(), found
    elements = loop["MUFU"] // (2 * 2 * gradients) * flags["STEPS"]  # a thread; two instructions a sigmoid
    assert sum(loop.values()) <= 2 * 100 * elements, found
