"""No 32-bit number of a Triton kernel can overflow on rows of millions of tokens: read off what the compiler takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from tests.kernels.triton_offsets import CHANNELS, TOKENS, overflows

GRID = (TOKENS // 32, 40, 1)
KERNEL = """
tt.func public @kernel(%x_ptr: !tt.ptr<bf16> loc("x_ptr"), %rows: i32 loc("rows"), %channels: i32 loc("channels")) {
  %c32_i32 = arith.constant 32 : i32 loc(#loc1)
  %pid = tt.get_program_id x : i32 loc(#loc2)
  %start = arith.muli %pid, %c32_i32 : i32 loc(#loc3)
  %range = tt.make_range {end = 32 : i32, start = 0 : i32} : tensor<32xi32> loc(#loc4)
  %starts = tt.splat %start : i32 -> tensor<32xi32> loc(#loc5)
  %row = arith.addi %starts, %range : tensor<32xi32> loc(#loc6)
"""
NARROW = """
  %stride = tt.splat %channels : i32 -> tensor<32xi32>
  %at = arith.muli %row, %stride : tensor<32xi32>
"""
WIDE = """
  %row_1 = arith.extsi %row : tensor<32xi32> to tensor<32xi64>
  %stride = arith.extsi %channels : i32 to i64
  %stride_1 = tt.splat %stride : i64 -> tensor<32xi64>
  %at = arith.muli %row_1, %stride_1 : tensor<32xi64>
"""


def test_a_product_of_tokens_and_channels_is_seen_where_it_has_32_bits():
    assert TOKENS * CHANNELS > 2**31
    assert overflows(KERNEL + NARROW + "}", GRID) == ["%at = arith.muli %row, %stride : tensor<32xi32>"]
    assert overflows(KERNEL + WIDE + "}", GRID) == []


def test_a_product_in_a_branch_of_a_loop_is_seen():
    loop = """
  %c0 = arith.constant 0 : i32
  %sum = scf.for %i = %c0 to %rows step %c32_i32 iter_args(%kept = %c0) -> (i32)  : i32 {
    %is = arith.cmpi slt, %i, %rows : i32
    %best = scf.if %is -> (i32) {
      scf.yield %i : i32
    } else {
      scf.yield %c0 : i32
    }
    %next = arith.muli %best, %channels : i32
    scf.yield %next : i32
  }
"""
    assert overflows(KERNEL + loop + "}", GRID) == ["%next = arith.muli %best, %channels : i32"]
    assert overflows(KERNEL + loop.replace("scf.yield %i ", "scf.yield %c32_i32 ") + "}", GRID) == []


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_shipped_kernel_overflows(target):
    """In a process of its own: in this one kernels may be interpreted. NVIDIA's targets share the representation."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_offsets", target],
        capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({report["kernel"] for report in reports}) >= 20
    assert [report for report in reports if report["overflows"]] == []
