"""How the kernels are compiled: without the GIL, and cached on disk where a folder can be written."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

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
        return _forgiving(numba.njit(parallel=parallel, cache=True, **_OPTIONS)(function))
    except RuntimeError as error:  # Numba found no folder for its cache
        _tell_no_cache(str(error))
        return numba.njit(parallel=parallel, **_OPTIONS)(function)


def _forgiving(dispatcher: Any) -> Callable:
    """Compile anew what cannot be read from the cache: a crash or a full disk leaves files that are empty or cut."""
    cache = dispatcher._cache
    load, save = cache.load_overload, cache.save_overload

    def load_overload(*arguments: Any) -> Any:
        try:
            return load(*arguments)
        except Exception:  # unpickling damaged bytes may raise anything
            with contextlib.suppress(OSError):
                cache.flush()
            return None

    def save_overload(*arguments: Any) -> None:
        with contextlib.suppress(OSError):
            save(*arguments)

    cache.load_overload, cache.save_overload = load_overload, save_overload
    return dispatcher


def _tell_no_cache(reason: str) -> None:
    message = (
        "vim_kernels: the CPU kernels compile anew in every process (about 20 s), because their cache has no folder: "
        f"{reason}. Set NUMBA_CACHE_DIR to a folder that can be written."
    )
    warnings.warn(message, RuntimeWarning, stacklevel=4)
