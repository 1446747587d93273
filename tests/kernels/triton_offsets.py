"""How large 32-bit whole numbers of the Triton kernels can become on rows of millions of tokens: none may overflow.

`python -m tests.kernels.triton_offsets [TARGET ...]` prints, for each shipped configuration, the operations whose
result can reach 2^31, read off the compiler's first representation (TTIR, of Gluon kernels TTGIR). Sizes are bounded
by the names of the arguments and by the grids. What a kernel loads is the number of a token, and so is what a loop
counts up; a product of two counts of tokens is one again, as the number of a chunk and its size.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import BaseBackend

from tests.kernels.triton_aot import INT64, TARGETS, Case, cases, source_of
from vim_kernels.triton_backend.launch import OPTIONS

LIMIT = 2**31
TOKENS = 2**23
"""Of all sequences: a picture of 46,000 x 46,000 pixels in patches of 16."""
CHANNELS = 2560
"""d_inner of Vim-H."""
FEWEST = 16
"""Tokens between two saved states, and channels of a block, at least."""
SIZES = {
    "channels": CHANNELS, "x_stride": 2 * CHANNELS, "xz_stride": 2 * CHANNELS, "z_stride": 2 * CHANNELS,
    "dz_stride": 2 * CHANNELS, "dx_stride": 2 * CHANNELS, "out_stride": 2 * CHANNELS, "dt_stride": 2 * CHANNELS,
    "state_stride": CHANNELS, "scratch_stride": 32 * 16 * 64, "parts": CHANNELS // FEWEST,
    "slots_per_sequence": TOKENS // FEWEST, "chunks_per_sequence": TOKENS // FEWEST, "chunks": TOKENS // FEWEST,
    "projection_programs": 32, "convolution_programs": 256,
}  # fmt: skip
"""What the arguments reach; others are numbers of tokens."""
COUNTS = {"slots_per_sequence", "chunks_per_sequence", "chunks"}
BLOCKS, ROWS, FEW, TWO = CHANNELS // FEWEST, TOKENS, 1024, 2
GRIDS = {
    "chunk_table_kernel": (ROWS // 128, 1, 1), "weight_layout_kernel": (BLOCKS, TWO, 1),
    "projections_forward_kernel": (ROWS // FEWEST, TWO, 1), "projections_backward_kernel": (ROWS // FEWEST, TWO, 1),
    "projection_sums_kernel": (BLOCKS, 32, TWO), "mixer_gradients_kernel": (BLOCKS, FEW, TWO),
    "conv_forward_kernel": (ROWS // 32, BLOCKS, 1), "mixer_conv_forward_kernel": (ROWS // 32, BLOCKS, 1),
    "conv_backward_kernel": (256, BLOCKS, 1), "carry_kernel": (BLOCKS, FEW, 32),
    "softplus_forward_kernel": (ROWS // 32, BLOCKS, 1), "gate_backward_kernel": (ROWS // 32, BLOCKS, 1),
    "add_rms_norm_forward_kernel": (ROWS, 1, 1), "add_rms_norm_backward_kernel": (ROWS // FEWEST, 1, 1),
    "pooled_output_backward_kernel": (BLOCKS, FEW, 1), "pooled_convolution_backward_kernel": (BLOCKS, FEW, 1),
}  # fmt: skip
"""Programs along the axes; of the other kernels blocks of channels, chunks or blocks of lines, and directions."""
CHUNKED = (BLOCKS, TOKENS // FEWEST, TWO)


class _TextError(Exception):
    """Carries the representation out of the compiler, before it does the rest."""


def text_of(case: Case, target: str) -> str:
    """A kernel in the compiler's words, with strides of 32 bits, as Triton takes them up to 2^31 - 1."""
    backend = next(kind for kind in BaseBackend.__subclasses__() if kind.supports_target(TARGETS[target]))
    add_stages = backend.add_stages

    def stop_early(self: Any, stages: dict[str, Any], *options: Any) -> None:
        add_stages(self, stages, *options)
        first = "ttir" if "ttir" in stages else "ttgir"
        make = stages[first]

        def stop(module: Any, metadata: Any) -> None:
            raise _TextError(str(make(module, metadata)))

        stages[first] = stop

    backend.add_stages = stop_early
    try:
        options = {"num_warps": case.warps, "num_stages": case.stages, **OPTIONS}
        compiled = triton.compile(source_of(case, target, wide=False), target=TARGETS[target], options=options)
    except _TextError as text:
        return str(text)
    finally:
        backend.add_stages = add_stages
    return compiled.asm["ttir" if "ttir" in compiled.asm else "ttgir"]  # compiled before, with strides of 32 bits


class Size(NamedTuple):
    """Largest absolute value, and whether it counts tokens, or blocks of them."""

    most: int
    tokens: bool = False


COUNT = Size(TOKENS, True)
NAME = r"%[\w\-]+"


def overflows(text: str, grid: tuple[int, int, int]) -> list[str]:
    """Operations on 32-bit whole numbers whose result can reach 2^31 either way."""
    sizes: dict[str, Size] = {}
    found: dict[str, None] = {}
    blocks: list[tuple[str, ...]] = []  # the results of those that a line is in
    for line in text.splitlines():
        line = line.strip() if "tt.func" in line else re.sub(r"\s*loc\(.*", "", line).strip()
        if line.startswith("}") and not line.endswith("{"):
            blocks.pop()
        _read(line, sizes, grid, found, blocks)
    return list(found)


def _read(
    line: str,
    sizes: dict[str, Size],
    grid: tuple[int, int, int],
    found: dict[str, None],
    blocks: list[tuple[str, ...]],
) -> None:
    """Take in one line: sizes of what it defines."""
    if "tt.func" in line:
        for name in re.findall(r"%(\w+): i32", line):
            known = Size(LIMIT - 1) if name in INT64 else Size(SIZES[name]) if name in SIZES else COUNT
            sizes[f"%{name}"] = known._replace(tokens=name in COUNTS or known == COUNT)
    definition = re.match(rf"({NAME})(:\d+)? = (.*)", line)
    name, many, operation = definition.groups() if definition else ("", None, line)
    results = tuple(f"{name}#{number}" for number in range(int(many[1:]))) if many else (name,)
    if loop := re.match(rf"scf\.for ({NAME}) = \S+ to (\S+) step", operation):
        sizes[loop[1]] = sizes.get(loop[2], COUNT)
        # what is counted up in a loop
        carried = re.findall(rf"({NAME}) = {NAME}(?:#\d+)?[,)]", operation.partition("iter_args")[2])
        sizes.update(dict.fromkeys((*carried, *results), COUNT))
    elif operation.startswith("scf.yield"):
        given = re.findall(rf"{NAME}(?:#\d+)?", operation.partition(" : ")[0])
        for result, value in zip(blocks[-1], given, strict=False):
            sizes[result] = max(sizes.get(result, Size(0)), sizes.get(value, COUNT))
    elif definition and not many and _is_number(operation):
        size = _size(operation, sizes, grid)
        if size.most >= LIMIT:
            found[f"{name} = {operation}"] = None
            size = Size(LIMIT - 1)  # named once, not again by all that follows
        sizes[name] = size
    if line.endswith("{") and not line.startswith("}"):
        blocks.append(results)


def _is_number(operation: str) -> bool:
    """Whether the result is a 32-bit whole number, or a tile of them."""
    kinds = re.findall(r"(?:x|^|, )(i\d+|f\d+|bf16|!tt)", re.split(r" (?:->|:|to) ", operation)[-1])
    return kinds[-1:] == ["i32"] and not operation.startswith(("tt.addptr", "arith.cmpi"))


def _size(operation: str, sizes: dict[str, Size], grid: tuple[int, int, int]) -> Size:
    """Of the result of an operation."""
    before = operation.partition(" : ")[0]
    kind = re.split(r"[ (]", operation)[0].strip('"')
    operands = [sizes.get(each, COUNT) for each in re.findall(rf"{NAME}(?:#\d+)?", before)]
    counts, values = any(each.tokens for each in operands), [each.most for each in operands]
    if kind == "arith.constant":
        return Size(max((abs(int(number)) for number in re.findall(r"-?\d+", before)), default=1))
    if kind in ("tt.get_program_id", "tt.get_num_programs"):
        programs = grid["xyz".index(operation.split()[1])]
        return Size(programs - ("id" in kind), programs > FEW)
    if kind == "tt.make_range":
        return Size(int(re.search(r"end = (\d+)", operation)[1]) - 1)  # pyright: ignore[reportOptionalSubscript]
    if kind == "arith.muli":
        both = operands[0].tokens and operands[1].tokens  # as the number of a chunk and its size
        return COUNT if both else Size(values[0] * values[1], counts)
    if kind in ("arith.addi", "arith.subi"):
        return Size(sum(values), counts)
    if kind in ("arith.divsi", "arith.ceildivsi"):
        return Size(max(1, values[0] // values[1]) if not operands[1].tokens else values[0], operands[0].tokens)
    if kind in ("arith.minsi", "arith.remsi"):
        return min(operands)
    if kind in ("arith.extui", "tt.elementwise_inline_asm"):
        return Size(1)
    if kind == "arith.select":
        return max(operands[1:])
    if kind in ("arith.trunci", "tt.load"):
        return COUNT
    return max(operands, default=COUNT)  # moved, or the largest of some


def reports(target: str) -> Iterator[dict[str, Any]]:
    """Kernel, its flags, and the operations that overflow, of every shipped configuration."""
    for case in cases("hip" if target.startswith("gfx") else "cuda"):
        flags = {k: v for k, v in case.constants.items() if isinstance(v, (bool, int))}
        found = overflows(text_of(case, target), GRIDS.get(case.name, CHUNKED))
        yield {"target": target, "kernel": case.name, "flags": flags, "overflows": found}


def main() -> None:
    """Print one line of JSON a kernel."""
    for target in sys.argv[1:] or TARGETS:
        for report in reports(target):
            print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
