"""The CPU kernels' inner loops compiled, not run, for other processors: each must get the widest vectors it has."""

import ast
import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="the CPU kernels are Numba's")

import llvmlite.binding as llvm
import numba
from numba import types

from vim_kernels.cpu_backend import scan_backward, scan_forward, vector
from vim_kernels.cpu_backend.records import SCAN, SCAN_GRADIENT

TARGETS = {  # triple, processor, has the AVX-512 instructions, fused multiply-add of its widest vectors, multiplication
    "AVX-512": ("x86_64-unknown-linux-gnu", "skylake-avx512", True, r"\tvfn?madd\w+ps\t.*%zmm", r"\tvmulps\t.*%(\w)mm"),
    "AVX2": ("x86_64-unknown-linux-gnu", "haswell", False, r"\tvfn?madd\w+ps\t.*%ymm", r"\tvmulps\t.*%(\w)mm"),
    "NEON": ("aarch64-unknown-linux-gnu", "neoverse-n1", False, r"\tfml[as]\tv\d+\.4s", r"\tfmul\t(\w)\d+"),
}
WIDEST = {"AVX-512": "z", "AVX2": "y", "NEON": "v"}
LOOPS = {
    "recur": (scan_forward._recur, (SCAN,)),
    "recompute": (scan_backward._recompute, (SCAN, SCAN_GRADIENT)),
    "walk back": (scan_backward._walk_back, (SCAN, SCAN_GRADIENT)),
}


DECORATORS = {"device", "kernel", "serial_kernel"}
SCALARS = {"float32"}


@pytest.fixture(scope="module", autouse=True)
def _all_targets():
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def assembly(loop, target, monkeypatch):
    """Numba's LLVM code of one loop, generated as if it ran on that processor, lowered for it."""
    triple, processor, avx512, *_ = TARGETS[target]

    def know(self, context):
        self.avx512, self.fma = avx512, True

    monkeypatch.setattr(vector.Target, "__init__", know)
    function, records = LOOPS[loop]
    integers = len(inspect.signature(function.py_func).parameters) - len(records)
    compiled = numba.njit(nogil=True, error_model="numpy")(function.py_func)
    compiled.compile((*map(numba.from_dtype, records), *[types.int64] * integers))
    (code,) = compiled.inspect_llvm().values()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, opt=3)
    code = re.sub(r'target triple = ".*"', f'target triple = "{triple}"', code)
    code = re.sub(r'target datalayout = ".*"', f'target datalayout = "{machine.target_data}"', code)
    return machine.emit_assembly(llvm.parse_assembly(code))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("target", TARGETS)
def test_loops_use_the_widest_vectors(target, loop, monkeypatch):
    text = assembly(loop, target, monkeypatch)
    fused, product = TARGETS[target][3:]
    assert set(re.findall(product, text)) == {WIDEST[target]}
    assert len(re.findall(fused, text)) >= 8
    assert "fmaf" not in text  # the C library's, one lane at a time
    assert ("vscalefps" in text and "vperm" in text) == (target == "AVX-512" and loop != "walk back")


def test_kernels_make_no_array():
    """They work on bare addresses: an array of a kernel's own is freed after its last mention, before its last use."""
    folder = Path(scan_forward.__file__).parent
    calls = {
        (path.name, node.func.attr)
        for path in folder.glob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and {ast.unparse(d) for d in function.decorator_list} & DECORATORS
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("np.")
    }
    assert {path for path, _ in calls} >= {"scan_forward.py", "scan_backward.py", "conv_forward.py", "conv_backward.py"}
    assert {name for _, name in calls} <= SCALARS
