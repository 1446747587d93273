"""Which implementation of the ops runs: chosen by device, or asked for by argument, context, call or environment."""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

BACKENDS = {
    "reference": "vim_kernels.reference",
    "triton": "vim_kernels.triton_backend",
    "cpu": "vim_kernels.cpu_backend",
    "torch": "vim_kernels.torch_backend",
    "export": "vim_kernels.export",
}
"""Backend -> its package; `contract` says what is in it."""

MODULES = ("reference", "export")
"""Backends that are one module, without rooms: whole ops, which autograd differentiates."""

FASTEST_FIRST = {"cuda": ("triton", "reference"), "cpu": ("cpu", "torch")}
"""Device type -> backends to try when the user asked for none."""

TAKES_PARTS = ("triton",)
"""Backends whose `bidirectional_scan` takes a part of a sequence: `contract.Part`."""

_process_choice: str | None = None
_context_choice: ContextVar[str | None] = ContextVar("vim_kernels_backend", default=None)
_warned: set[str] = set()


def set_backend(name: str | None) -> None:
    """Use backend `name` from now on in this process; None returns to the choice by device."""
    global _process_choice
    _process_choice = _checked(name, "set_backend") if name else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend `name` inside the `with` block, in this thread or task."""
    token = _context_choice.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _context_choice.reset(token)


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Backend name -> None where it can run on `device`, else the reason why not."""
    return {name: package(name).unavailable(torch.device(device)) for name in BACKENDS}


@functools.cache
def function(backend: str, room: str, name: str) -> Callable[..., Any]:
    """A function of a backend's room."""
    return getattr(importlib.import_module(f"{BACKENDS[backend]}.{room}"), name)


def choose(argument: str | None, device: torch.device) -> str:
    """Backend that runs an op on `device`.

    Order: argument, context, `set_backend`, VIM_KERNELS_BACKEND, device. `torch.compile` keeps the choice made while it
    traced. Raises ValueError for an unknown backend and RuntimeError for one that was asked for and cannot run.
    """
    environment = os.environ.get("VIM_KERNELS_BACKEND") or None
    for name, source in (
        (argument, "backend="),
        (_context_choice.get(), "use_backend"),
        (_process_choice, "set_backend"),
        (environment, "VIM_KERNELS_BACKEND"),
    ):
        if name:
            if reason := package(_checked(name, source)).unavailable(device):
                backends = available_backends(device).items()
                usable = [name for name, why in backends if why is None and name != "export"]
                raise RuntimeError(f"backend {name!r} ({source}) cannot run on {device}: {reason}; available: {usable}")
            return name
    for name in FASTEST_FIRST.get(device.type, ("reference",)):
        reason = package(name).unavailable(device)
        if reason is None:
            return name
        _warn_once(f"vim_kernels: backend {name!r} is not used on {device.type}: {reason}")
    return "reference"


# what torch.compiler.assume_constant_result does; that one imports the whole compiler, half of the time of an import
choose._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def package(name: str) -> ModuleType:
    """The package or module of a backend."""
    return importlib.import_module(BACKENDS[name])


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose from {sorted(BACKENDS)}")
    return name


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
