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
from numba.core import compiler
from numba.core.registry import cpu_target

from vim_kernels.cpu_backend import scan_backward, scan_forward
from vim_kernels.cpu_backend.records import SCAN, SCAN_GRADIENT

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
TARGETS = {  # triple, processor, features as Numba names them
    "AVX-512": (X86, "skylake-avx512", "+avx2,+avx512dq,+avx512f,+fma"),
    "AVX2": (X86, "haswell", "+avx2,+fma"),
    "SSE2": (X86, "x86-64", "+sse2"),
    "NEON": (ARM, "neoverse-n1", "+neon"),
}
WIDEST = {"AVX-512": "z", "AVX2": "y", "SSE2": "x", "NEON": "v"}
FUSED = {
    "AVX-512": r"\tvfn?m(?:add|sub)\w+ps\t.*%zmm",
    "AVX2": r"\tvfn?m(?:add|sub)\w+ps\t.*%ymm",
    "NEON": r"\tfml[as]\tv\d+\.4s",
}
PRODUCT = {"SSE2": r"\tmulps\t.*%(\w)mm", "NEON": r"\tfmul\t(\w)\d+"}
TABLE = {"AVX-512": r"\tvperm[it]2ps\t", "AVX2": r"\tvperm(?:d|ps)\t"}
"""The permutation that looks up fractions of the exponential."""
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
    """LLVM code of one loop as Numba makes it for that processor, lowered for it, with no native code in between.

    Functions that the loop calls are compiled for this machine and stay calls; `_fetch_ahead` is the only one.
    """
    triple, processor, features = TARGETS[target]
    context = cpu_target.target_context
    monkeypatch.setattr(context.codegen(), "magic_tuple", lambda: TARGETS[target])
    function, records = LOOPS[loop]
    integers = len(inspect.signature(function.py_func).parameters) - len(records)
    arguments = (*map(numba.from_dtype, records), *[types.int64] * integers)
    flags = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    result = compiler.compile_extra(cpu_target.typing_context, context, function.py_func, arguments, None, flags, {})
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features, opt=3)
    code = re.sub(r'target triple = ".*"', f'target triple = "{triple}"', result.library.get_llvm_str())
    code = re.sub(r'target datalayout = ".*"', f'target datalayout = "{machine.target_data}"', code)
    module = llvm.parse_assembly(code)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return machine.emit_assembly(module)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("target", TARGETS)
def test_loops_use_the_widest_vectors(target, loop, monkeypatch):
    text = assembly(loop, target, monkeypatch)
    assert set(re.findall(PRODUCT.get(target, r"\tvmulps\t.*%(\w)mm"), text)) == {WIDEST[target]}
    assert len(re.findall(FUSED.get(target, r"\tmulps\t"), text)) >= 6
    assert "fmaf" not in text  # the C library's, one lane at a time: on SSE2 a product and a sum instead
    for one, table in TABLE.items():
        assert bool(re.search(table, text)) == (target == one and loop != "walk back")
    assert ("vscalefps" in text) == (target == "AVX-512" and loop != "walk back")


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
    assert {path for path, _ in calls} >= {"scan_forward.py", "scan_backward.py", "conv_backward.py"}
    assert {name for _, name in calls} <= SCALARS
