"""Compiles the Triton kernels ahead of time, for devices that are not there, and reads what the compiler made of them.

`python -m tests.kernels.triton_aot [TARGET ...]` prints registers and spills, and of the kernels in LOOPS_READ the
instructions of every loop, for each shipped configuration.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from vim_kernels.triton_backend import (
    chunks,
    conv_backward,
    conv_forward,
    mixer_backward,
    mixer_forward,
    norm_backward,
    norm_forward,
    plan,
    pointwise,
    pooled_backward,
    pooled_forward,
    scan_backward,
    scan_forward,
    tiled_scan_backward,
    tiled_scan_forward,
)
from vim_kernels.triton_backend.launch import OPTIONS
from vim_kernels.triton_backend.layouts import backward_layouts, block_of, forward_layouts

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
SIXTEEN_BIT = {
    "u_ptr", "dt_ptr", "z_ptr", "out_ptr", "ungated_ptr", "dy_ptr", "du_ptr", "ddt_ptr", "dout_ptr", "dz_ptr", "x_ptr",
    "dx_ptr", "states_ptr", "dbc_ptr", "parts_ptr", "low_ptr", "projections_ptr",
    "dprojected_ptr", "normed_ptr", "dnormed_ptr", "xz_ptr", "dxz_ptr", "pooled_ptr", "dpooled_ptr", "dsum_ptr",
}  # fmt: skip
LOOPS_READ = {
    "scan_forward_kernel", "chunk_state_kernel", "tiled_scan_forward_kernel", "tiled_scan_backward_kernel",
    "conv_backward_kernel",
}  # fmt: skip
"""Kernels whose machine code is read: the tool takes a third of a second for each."""
INTERVAL = {"cuda": plan.INTERVAL // 2, "hip": plan.INTERVAL}
"""Of 16-bit tokens; the states saved are bfloat16 on NVIDIA and float32 on AMD."""
INT32 = {
    "table_ptr", "sequence_ptr", "segment_ptr", "cu_seqlens_ptr", "starts_ptr", "order_ptr", "cu_lines_ptr",
    "line_of_ptr", "cu_runs_ptr",
}  # fmt: skip
INT64 = {
    "u_direction", "bc_direction", "chunk_direction", "slot_direction", "total_direction", "block_stride",
    "part_stride", "line_direction",
}  # fmt: skip
MULTIPLE_OF_16 = {
    "channels",
    "x_stride",
    "xz_stride",
    "z_stride",
    "dz_stride",
    "dx_stride",
    "out_stride",
    "dt_stride",
    "scratch_stride",
} | INT64


class Case(NamedTuple):
    """A kernel with one set of compile-time constants."""

    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int = 1

    @property
    def name(self) -> str:
        return self.kernel.__name__


class Compiled(NamedTuple):
    """What the compiler reports."""

    registers: int
    spills: int  # bytes of stack and local memory
    loops: list[Counter]  # NVIDIA, of LOOPS_READ: instructions of every loop, innermost first


def cases(column: str) -> list[Case]:
    """Every kernel as the launchers call it, with the sizes that `column` of the tables ships."""
    forward, state = plan.FORWARD[column], plan.STATE[column]
    backward, mixer = plan.BACKWARD[column], plan.MIXER[column]
    found = []
    for directions, save, packed, chunked in ((2, False, False, False), (2, True, True, True), (1, True, False, True)):
        constants = {
            "DIRECTIONS": directions, "REVERSE": False, "PACKED": packed, "GATE": True, "SAVE": save, "HAS_D": True,
            "HAS_H0": chunked, "STORE_FINAL": directions == 1, "SCALE": 0.5, "N": 16, "BLOCK": forward.block,
            "INTERVAL": INTERVAL[column], "AHEAD": forward.ahead,
        }  # fmt: skip
        found.append(Case(scan_forward.scan_forward_kernel, constants, forward.warps))
    for adjoint in (False, True):
        constants = {"REVERSE": False, "ADJOINT": adjoint, "PACKED": adjoint, "N": 16, "BLOCK": state.block}
        constants["AHEAD"] = state.ahead
        found.append(Case(chunks.chunk_state_kernel, constants, state.warps))
    constants = {"REVERSE": False, "PACKED": False, "HAS_INITIAL": True, "STORE_FINAL": True, "N": 16}
    sizes = {"BLOCK": plan.CARRY_BLOCK, "CHUNKS": plan.CARRY_CHUNKS}
    found.append(Case(chunks.carry_kernel, constants | sizes, 4))
    found.append(Case(chunks.chunk_table_kernel, {"INTERVAL": INTERVAL[column], "BLOCK": 128}, 4))
    for packed, adjoint, gaps in ((False, False, False), (True, True, False), (True, False, True)):
        constants = {
            "REVERSE": False, "PACKED": packed, "HAS_D": True, "HAS_ADJOINT": adjoint, "STORE_DH0": adjoint,
            "SOFTPLUS": True, "GAPS": gaps, "N": 16, "BLOCK": backward.block, "INTERVAL": INTERVAL[column],
            "GROUP": backward.group,
        }  # fmt: skip
        found.append(Case(scan_backward.scan_backward_kernel, constants, backward.warps))
    hardware = {"HARDWARE": column == "cuda"}
    convolution = plan.CONVOLUTION
    constants = {
        "PACKED": True, "WIDTH": 4, "GROUPS": convolution.groups, "STEPS": convolution.steps,
        "BLOCK": convolution.block,
    }  # fmt: skip
    found.append(Case(conv_forward.mixer_conv_forward_kernel, constants | hardware, convolution.warps))
    more = [(plan.MIXER_WIDE, 64, 128, True), (plan.FEW_ROWS, 64, 128, False)] if column == "cuda" else []
    for sizes, rank, columns, gaps in ((mixer, 16, 64, False), (mixer, 16, 64, True), *more):
        constants = {
            "GAPS": gaps, "STORE_LOW": True, "STATES": 16, "RANK_BLOCK": rank, "COLUMNS": columns, "ROWS": sizes.rows,
            "BLOCK": sizes.block, "EVEN": True, "DOT": tl.bfloat16, "PRECISION": "ieee",
        }  # fmt: skip
        found.append(Case(mixer_forward.projections_forward_kernel, constants | hardware, sizes.warps, sizes.stages))
    constants = {"N": 16, "STATES": 16, "WIDTH": 4, "RANK": 12, "COLUMNS": 64, "HAS_BIAS": True, "BLOCK": 64}
    found.append(Case(mixer_forward.weight_layout_kernel, constants, 4))
    found += _mixer_backward_cases(column)
    if column == "cuda":
        found += _tiled_cases()
    return found + _token_cases(column) + _pooled_cases(column)


def _mixer_backward_cases(column: str) -> list[Case]:
    rows, sums, gradients = plan.PROJECTIONS_BACKWARD[column], plan.PROJECTION_SUMS[column], plan.GRADIENTS
    found = []
    for even in (True, False):
        constants = {"STATES": 16, "RANK_BLOCK": 16, "EVEN": even, "DOT": tl.bfloat16, "PRECISION": "ieee"}
        tile = {"COLUMNS": 64, "ROWS": rows.rows, "BLOCK": rows.block, "AHEAD": plan.PARTS_AHEAD}
        found.append(Case(mixer_backward.projections_backward_kernel, constants | tile, rows.warps, rows.stages))
        if column == "cuda":
            few = plan.FEW_ROWS
            tile = {"COLUMNS": 64, "ROWS": few.rows, "BLOCK": few.block, "AHEAD": plan.PARTS_AHEAD}
            found.append(Case(mixer_backward.projections_backward_kernel, constants | tile, few.warps, few.stages))
        tile = {"ROWS": sums.rows, "BLOCK": sums.block}
        found.append(Case(mixer_backward.projection_sums_kernel, constants | tile, sums.warps, sums.stages))
    constants = {"N": 16, "STATES": 16, "WIDTH": 4, "RANK": 12, "RANK_BLOCK": 16, "SKIP_WITH_TAPS": True}
    constants |= {"PARTS": gradients.rows, "BLOCK": gradients.block}
    found.append(Case(mixer_backward.mixer_gradients_kernel, constants, gradients.warps, gradients.stages))
    return found


def _tiled_cases() -> list[Case]:
    found = []
    for _, sizes in plan.TILED_FORWARD:
        for directions, save, packed, chunked, states_only, adjoint in (
            (2, False, False, False, False, False),
            (2, True, True, True, False, False),
            (1, True, False, True, False, False),
            (2, False, True, False, True, False),
            (2, False, True, False, True, True),
        ):
            constants = {
                "DIRECTIONS": directions, "REVERSE": False, "PACKED": packed, "GATE": adjoint or not states_only,
                "SAVE": save, "HAS_D": not states_only, "HAS_H0": chunked,
                "STORE_FINAL": directions == 1 or states_only,
                "STATES_ONLY": states_only, "ADJOINT": adjoint, "SCALE": 0.5, "N": 16,
                "BLOCK": block_of(sizes.states_thread, sizes.channels_thread, sizes.warps, 16),
                "INTERVAL": INTERVAL["cuda"], "TILE": sizes.tile, "STEP": sizes.step,
                **forward_layouts(directions, sizes.states_thread, sizes.channels_thread, sizes.warps, sizes.tile, 16),
            }  # fmt: skip
            found.append(Case(tiled_scan_forward.tiled_scan_forward_kernel, constants, directions * sizes.warps))
    backward = plan.TILED_BACKWARD
    for packed, adjoint, gaps in ((False, False, False), (True, True, False), (True, False, True)):
        block = block_of(backward.states_thread, backward.channels_thread, backward.warps, 16)
        constants = {
            "REVERSE": False, "PACKED": packed, "HAS_D": True, "HAS_ADJOINT": adjoint, "STORE_DH0": adjoint,
            "SOFTPLUS": True, "GAPS": gaps, "GATE": not adjoint, "SCALE": 0.5, "N": 16, "BLOCK": block,
            "INTERVAL": INTERVAL["cuda"], "GROUP": backward.step,
            **backward_layouts(backward.states_thread, backward.channels_thread, backward.warps, 16),
        }  # fmt: skip
        found.append(Case(tiled_scan_backward.tiled_scan_backward_kernel, constants, backward.warps))
    return found


def _token_cases(column: str) -> list[Case]:
    tile = {"ROWS": 32, "BLOCK": 64}
    conv = {"SIGN": 1, "SILU": True, "HAS_BIAS": True, "PACKED": True, "WIDTH": 4}
    sizes, hardware = plan.CONVOLUTION_BACKWARD[column], {"HARDWARE": column == "cuda"}
    backward = {"DIRECTIONS": 2, "GROUPS": sizes.groups, "STEPS": sizes.steps, "BLOCK": sizes.block, **conv, **hardware}
    norm = {"ROWS": 16, "BLOCK": 256}
    return [
        Case(conv_forward.conv_forward_kernel, conv | tile, 4),
        Case(conv_backward.conv_backward_kernel, backward, sizes.warps),
        Case(pointwise.softplus_forward_kernel, {"HAS_BIAS": True, "SOFTPLUS": True, **tile}, 4),
        Case(pointwise.gate_backward_kernel, {"GATE": True, "SCALE": 0.5, **tile}, 4),
        Case(norm_forward.add_rms_norm_forward_kernel, {"HAS_RESIDUAL": True, **norm}, 4),
        Case(norm_backward.add_rms_norm_backward_kernel, {"HAS_DTOTAL": True, **norm}, 4),
    ]


def _pooled_cases(column: str) -> list[Case]:
    def shared(packed: bool, sizes: plan.PooledSizes) -> dict[str, Any]:
        return {
            "ORDERED": packed, "PACKED": packed, "WIDTH": 4, "LINES": sizes.lines, "STEPS": sizes.steps,
            "BLOCK": sizes.block, "HARDWARE": column == "cuda",
        }  # fmt: skip

    found, convolution = [], plan.POOLED_CONVOLUTION_BACKWARD[column]
    for packed in (False, True):
        sizes = plan.POOLED_LINES[column]
        found.append(Case(pooled_forward.pooled_lines_kernel, shared(packed, sizes), sizes.warps))
        steps = plan.run_length(convolution, 4)
        constants = {"GROUPS": convolution.groups, "STEPS": steps, "BLOCK": convolution.block}
        constants |= {"ORDERED": packed, "PACKED": packed, "WIDTH": 4, "HARDWARE": column == "cuda"}
        kernel = pooled_backward.pooled_convolution_backward_kernel
        found.append(Case(kernel, constants, convolution.warps))
        for norm in (False, True):
            sizes, constants = (plan.POOLED_NORM if norm else plan.POOLED_OUTPUT)[column], {"NORM": norm}
            found.append(Case(pooled_forward.pooled_output_kernel, constants | shared(packed, sizes), sizes.warps))
            sizes = (plan.POOLED_NORM if norm else plan.POOLED_OUTPUT_BACKWARD)[column]
            kernel = pooled_backward.pooled_output_backward_kernel
            found.append(Case(kernel, constants | shared(packed, sizes), sizes.warps))
    return found


def source_of(case: Case, target: str, *, wide: bool = True) -> ASTSource:
    """What the compiler takes; `wide`: strides that can need 64 bits have them."""
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else _kind(n, wide) for n in names}
    if target.startswith("gfx") and "states_ptr" in signature:
        signature["states_ptr"] = "*fp32"
    constants = {(names.index(k),): v for k, v in case.constants.items()}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n in MULTIPLE_OF_16
    }
    kind = GluonASTSource if isinstance(case.kernel, GluonJITFunction) else ASTSource
    return kind(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_case(case: Case, target: str) -> Compiled:
    """Compile for a device that need not be there."""
    source = source_of(case, target)
    kernel = triton.compile(
        source, target=TARGETS[target], options={"num_warps": case.warps, "num_stages": case.stages, **OPTIONS}
    )
    if "cubin" in kernel.asm:
        return _read_cubin(kernel.asm["cubin"], loops=case.name in LOOPS_READ)
    report = kernel.asm["amdgcn"]
    registers, *spilled = (
        int(re.search(rf"\.{field}:\s+(\d+)", report).group(1))  # pyright: ignore[reportOptionalMemberAccess]
        for field in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    return Compiled(registers, sum(spilled), [])


def _kind(argument: str, wide: bool) -> str:
    if argument in INT32:
        return "*i32"
    if argument.endswith("_ptr"):
        return "*bf16" if argument in SIXTEEN_BIT else "*fp32"
    if argument == "eps":
        return "fp32"
    return "i64" if wide and argument in INT64 else "i32"


def _read_cubin(cubin: bytes, *, loops: bool) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        usage = _tool("cuobjdump", "-res-usage", path)
        code = _tool("nvdisasm", "-c", path) if loops else ""
    sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(sizes["REG"], sizes["STACK"] + sizes["LOCAL"], _loops(code))


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([os.path.join(NVIDIA_TOOLS, name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _loops(code: str) -> list[Counter]:
    """Instructions between every backward branch and its label, shortest loop first."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found.group(1).strip())
    spans = set()
    for i, text in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\((\.L_\S+)\)", text)
        if branch and labels.get(branch.group(1), i) < i:
            spans.add((labels[branch.group(1)], i + 1))
    return [Counter(_opcode(text) for text in instructions[a:b]) for a, b in sorted(spans, key=lambda s: s[1] - s[0])]


def _opcode(text: str) -> str:
    words = text.split()
    return words[1 if words[0].startswith("@") else 0].split(".")[0]


def main() -> None:
    """Print one line of JSON a kernel."""
    for target in sys.argv[1:] or TARGETS:
        for case in cases("hip" if target.startswith("gfx") else "cuda"):
            found = compile_case(case, target)
            flags = {k: v for k, v in case.constants.items() if isinstance(v, (bool, int))}
            if "state" in case.constants:
                flags["states_thread"], flags["channels_thread"] = case.constants["state"].size_per_thread[-2:]
            print(json.dumps({"target": target, "kernel": case.name, "flags": flags, **found._asdict()}))  # noqa: T201


if __name__ == "__main__":
    main()
