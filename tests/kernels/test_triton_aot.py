"""A performance gate without a GPU: what the compiler makes of every shipped kernel, for every supported device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from tests.kernels.triton_aot import TARGETS

REGISTERS = {"scan_forward_kernel": 168, "chunk_state_kernel": 168, "tiled_forward_kernel": 208}
SPILLS = {"tiled_backward_kernel": 144}
"""Bytes. Four tokens a group spill a little, and are a seventh faster on an H200 than two that do not."""


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
        assert found["registers"] <= REGISTERS.get(found["kernel"], 255), found


def test_forward_loops_neither_shuffle_nor_wait(compiled):
    loops = [(c["kernel"], loop) for c in compiled if "gfx" not in c["target"] for loop in c["loops"][:1]]
    scans = [(kernel, loop) for kernel, loop in loops if kernel in REGISTERS]
    assert bool(scans) == ("gfx" not in compiled[0]["target"])
    for kernel, loop in scans:
        assert loop["MUFU"] >= 16, (kernel, loop)  # the loop over tokens, one exponential a state
        assert "SHFL" not in loop, (kernel, loop)
        assert loop.get("BAR", 0) <= (kernel == "tiled_forward_kernel"), (kernel, loop)  # one a group of tokens
        assert sum(loop.values()) <= 13 * loop["MUFU"], (kernel, loop)
