"""Which implementation of the ops runs: chosen by device, or asked for by argument, context, call or environment."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

from vim_kernels import reference
from vim_kernels.dispatch.call import FastOps
from vim_kernels.dispatch.contract import FAST_MODULES

_OPS: dict[str, ModuleType | FastOps] = {"reference": reference, **{name: FastOps(name) for name in FAST_MODULES}}
"""Backend name -> its four functions, and `unavailable(device)`: why it cannot run there, or None."""

FASTEST_FIRST = {"cuda": ("triton", "reference"), "cpu": ("cpu", "torch")}
"""Device type -> backends to try when the user asked for none."""

_process_choice: str | None = None
_context_choice: ContextVar[str | None] = ContextVar("vim_kernels_backend", default=None)
_told: set[str] = set()


def set_backend(name: str | None) -> None:
    """Use backend `name` from now on in this process; None returns to the choice by device."""
    global _process_choice
    _process_choice = _known(name, "set_backend") if name else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend `name` inside the `with` block, in this thread or task."""
    token = _context_choice.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _context_choice.reset(token)


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Backend name -> None where it can run on `device`, else the reason why not."""
    return {name: ops.unavailable(torch.device(device)) for name, ops in _OPS.items()}


def resolve(argument: str | None, device: torch.device) -> ModuleType | FastOps:
    """What runs an op on `device`, with the functions of `vim_kernels.reference`.

    Order: argument, context, `set_backend`, VIM_KERNELS_BACKEND, device. `torch.compile` keeps the choice made while it
    traced. Raises ValueError for an unknown backend and RuntimeError for one that was asked for and cannot run.
    """
    return _OPS[_choose(argument, device)]


def _choose(argument: str | None, device: torch.device) -> str:
    environment = os.environ.get("VIM_KERNELS_BACKEND") or None
    for name, source in (
        (argument, "backend="),
        (_context_choice.get(), "use_backend"),
        (_process_choice, "set_backend"),
        (environment, "VIM_KERNELS_BACKEND"),
    ):
        if name:
            if reason := _OPS[_known(name, source)].unavailable(device):
                usable = [n for n, why in available_backends(device).items() if why is None]
                raise RuntimeError(f"backend {name!r} ({source}) cannot run on {device}: {reason}; available: {usable}")
            return name
    for name in FASTEST_FIRST.get(device.type, ("reference",)):
        reason = _OPS[name].unavailable(device)
        if reason is None:
            return name
        _tell_once(f"vim_kernels: backend {name!r} is not used on {device.type}: {reason}")
    return "reference"


# what torch.compiler.assume_constant_result does; that one imports the whole compiler, half of the time of an import
_choose._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _known(name: str, source: str) -> str:
    if name not in _OPS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose from {sorted(_OPS)}")
    return name


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
