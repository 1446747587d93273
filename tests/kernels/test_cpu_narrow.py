"""The CPU kernels compiled for narrower processors than this one, and run: a green suite on one holds on the others."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="the CPU kernels are Numba's")

import llvmlite.binding as llvm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # half a minute on a free core, nearly all of it compilation
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="narrower sets of the x86 family"),
]
TARGETS = {  # processor, features as Numba names them, what a host must have, widest registers
    "AVX2": ("x86-64-v3", "+avx2,+fma", ("avx2", "fma"), "y"),
    "SSE2": ("x86-64", "+sse2", (), "x"),
}
TESTS = "cpu and (test_scan or test_mixer or test_conv or test_norm or test_low_precision or test_bad_dt or vector)"
PROGRAM = """
import re, sys
import pytest
from vim_kernels.cpu_backend.scan_backward import scan_backward
from vim_kernels.cpu_backend.scan_forward import scan_forward
from vim_kernels.cpu_backend.vector import instruction_set

code = pytest.main([*sys.argv[1:], "-q", "-p", "no:xdist", "-p", "no:cacheprovider"])
(forward,), (backward,) = (kernel.inspect_asm().values() for kernel in (scan_forward, scan_backward))
print(instruction_set(), max(re.findall("%([xyz])mm", forward)), max(re.findall("%([xyz])mm", backward)))
sys.exit(code)
"""


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_equal_the_reference_on(target, tmp_path):
    processor, features, needed, widest = TARGETS[target]
    host = llvm.get_host_cpu_features()
    if not all(host[name] for name in needed):
        pytest.skip(f"this processor has no {target}")
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "NUMBA_CPU_NAME": processor,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
    }
    files = [str(root / "tests/kernels" / name) for name in ("test_backends.py", "test_cpu_vector.py")]
    command = [sys.executable, "-c", PROGRAM, *files, "-k", TESTS]
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    *_, counts, registers = ran.stdout.strip().splitlines()
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert " passed" in counts
    assert registers == f"{target} {widest} {widest}"
