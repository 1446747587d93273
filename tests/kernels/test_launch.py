"""The Triton launcher: a kernel is searched for once, and again where Triton would compile another."""

import pytest
import torch

from vim_kernels.triton_backend import launch as launcher


class Kernel:
    """Stands for a kernel of Triton, x, out, size, SCALE: notes what it and what it compiled are launched with."""

    arg_names = ("x", "out", "size", "SCALE")

    def __init__(self):
        self.searched, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.searched.append((grid, arguments, constants))
            return Compiled(self.launched)

        return run


class Compiled:
    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(launcher, "_compiled", {})


def test_the_second_launch_skips_the_search():
    kernel, x, out = Kernel(), torch.zeros(16), torch.zeros(16)
    other = torch.ones(16)
    launcher.launch(kernel, (4,), x, out, 16, SCALE=0.5, num_warps=2)
    launcher.launch(kernel, (8, 2), other, x, 16, SCALE=0.5, num_warps=2)
    assert len(kernel.searched) == 1
    ((grid, arguments),) = kernel.launched
    assert grid == (8, 2, 1)
    assert arguments[0] is other
    assert arguments[1] is x
    assert arguments[2:] == (16, 0.5), "with its constants, without the launch options"


def test_what_triton_would_compile_anew_is_searched_for():
    kernel, x = Kernel(), torch.zeros(64)
    cases = [
        ((x, x, 16), {"SCALE": 0.5, "num_warps": 2}),
        ((x.half(), x, 16), {"SCALE": 0.5, "num_warps": 2}),  # another type
        ((x[1:], x, 16), {"SCALE": 0.5, "num_warps": 2}),  # a pointer that 16 does not divide
        ((x, x, 1), {"SCALE": 0.5, "num_warps": 2}),  # Triton makes a constant of 1
        ((x, x, 17), {"SCALE": 0.5, "num_warps": 2}),  # and knows what 16 divides
        ((x, x, 16), {"SCALE": 1.0, "num_warps": 2}),
        ((x, x, 16), {"SCALE": 0.5, "num_warps": 4}),
    ]
    for arguments, constants in cases * 2:
        launcher.launch(kernel, (1,), *arguments, **constants)
    assert len(kernel.searched) == len(kernel.launched) == len(cases)
    launcher.launch(Kernel(), (1,), *cases[0][0], **cases[0][1])
    assert len(launcher._compiled) == len(cases) + 1, "another kernel"


def test_a_kernel_without_one_of_its_constants_is_no_launch():
    with pytest.raises(KeyError, match="SCALE"):
        launcher.launch(Kernel(), (1,), torch.zeros(4), torch.zeros(4), 4, num_warps=2)


def test_lengths_that_always_differ_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(launcher, "MOST_COMPILED", 10)
    kernel, x = Kernel(), torch.zeros(4)
    for size in range(100):
        launcher.launch(kernel, (1,), x, x, size, SCALE=1.0)
    assert len(launcher._compiled) <= 10
