"""Triton's interpreter without what it does over and over: a third of its time."""

import importlib.util
import os
from dataclasses import replace

import pytest


@pytest.fixture(autouse=True, scope="session")
def brisk_interpreter():
    """It patches the language anew at each call of a function by a kernel, and checks each whole number for overflow.

    That none can overflow, at any size, is read off the compiler (test_triton_offsets.py).
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    if not (hasattr(interpreter, "_patch_lang") and hasattr(options, "sanitize_overflow")):
        yield  # another Triton, at its own pace
        return
    patch_language = interpreter._patch_lang
    patched = {}

    def once(function):
        """The kernel's own call comes first, and is the one whose scope is restored."""
        place = id(function.__globals__)
        if place in patched:
            return patched[place]
        scope = patch_language(function)
        restore, outermost = scope.restore, not patched

        def restore_all():
            restore()
            patched.clear()

        if outermost:
            scope.restore = restore_all
        patched[place] = scope
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        builder = interpreter.interpreter_builder
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield
