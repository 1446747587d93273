"""Kernels of the CPU backend outlive a damaged cache and a fork."""

import os
import subprocess
import sys

import pytest

from tests.launch.preloaded import Popen
from tests.waiting import LIMIT
from vim_kernels import available_backends

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="Numba is not installed")
MODULE = """
from numba.core import config
config.CACHE_DIR = {cache!r}
from vim_kernels.cpu_backend.jit import {decorator}

@{decorator}
def twice(x):
    return x + x

print(twice({value}))
"""
FORK = """
import os, warnings, torch
import vim_kernels
x = torch.rand(1, 8, 4)
weight = torch.rand(4, 3)
with vim_kernels.use_backend("cpu"):
    want = vim_kernels.causal_conv1d(x, weight)
process = os.fork()
if process:
    sys_exit = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert torch.equal(vim_kernels.causal_conv1d(x, weight), want)
    os._exit(sys_exit)
torch.set_num_threads(1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    got = vim_kernels.causal_conv1d(x, weight)
assert "forked after a kernel ran" in str(caught[0].message), caught
torch.testing.assert_close(got, want)
try:
    vim_kernels.causal_conv1d(x, weight, backend="cpu")
except RuntimeError as error:
    assert "spawn or forkserver" in str(error)
    os._exit(7)
"""


@pytest.mark.parametrize("decorator", ["kernel", "serial_kernel"])
def test_a_damaged_cache_is_made_anew(decorator, tmp_path):
    """Each time in a process of its own, which has compiled nothing."""
    script, cache = tmp_path / "kernels.py", tmp_path / "cache"
    cache.mkdir()
    script.write_text(MODULE.format(decorator=decorator, value=21, cache=str(cache)))

    def run():
        process = Popen([sys.executable, str(script)], tmp_path, dict(os.environ))
        printed, _ = process.communicate(LIMIT)
        return process.returncode, printed

    assert run() == (0, "42\n")
    for suffix in (".nbi", ".nbc"):
        for damage in (lambda b: b"", lambda b: b[:10], lambda b: b[: len(b) // 2], lambda b: b"no pickle at all"):
            files = [path for path in cache.rglob("*") if path.suffix == suffix]
            assert files
            whole = {path: path.read_bytes() for path in files}
            for path, content in whole.items():
                path.write_bytes(damage(content))
            assert run() == (0, "42\n")
            assert all(path.read_bytes() != damage(whole[path]) for path in files if path.exists())


def test_a_process_forked_after_a_kernel_goes_on():
    env = os.environ | {"VIM_KERNELS_BACKEND": ""}
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 7, done.stderr
