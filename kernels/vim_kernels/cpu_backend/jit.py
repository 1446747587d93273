"""How the kernels are compiled: without the GIL, and cached on disk where a folder can be written."""

import warnings
from collections.abc import Callable

import numba

_OPTIONS = {"nogil": True, "error_model": "numpy"}


def device(function: Callable) -> Callable:
    """Compile a function that only kernels call; it is cached as part of them."""
    return numba.njit(**_OPTIONS)(function)


def kernel(function: Callable) -> Callable:
    """Compile a function called from Python, which spreads its tasks over threads with `numba.prange`."""
    return _cached(function, parallel=True)


def serial_kernel(function: Callable) -> Callable:
    """Compile a function called from Python, too short for threads."""
    return _cached(function, parallel=False)


def _cached(function: Callable, *, parallel: bool) -> Callable:
    try:
        return numba.njit(parallel=parallel, cache=True, **_OPTIONS)(function)
    except RuntimeError as error:  # Numba found no folder for its cache
        _tell_no_cache(str(error))
        return numba.njit(parallel=parallel, **_OPTIONS)(function)


def _tell_no_cache(reason: str) -> None:
    message = (
        "vim_kernels: the CPU kernels compile anew in every process (about 20 s), because their cache has no folder: "
        f"{reason}. Set NUMBA_CACHE_DIR to a folder that can be written."
    )
    warnings.warn(message, RuntimeWarning, stacklevel=4)
