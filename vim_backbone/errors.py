"""The one class of errors that a user can cause and mend."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Something a user asked for cannot be done. One line: what was wrong, the value got, what to do."""


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """A hint that ends an error line: the valid name most like the wrong one, else all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(wrong, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"


def require(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raise UserError "NAME is VALUE: REMEDY" unless the condition holds."""
    if not condition:
        raise UserError(f"{name} is {value!r}: {remedy}")


def first_line(error: BaseException) -> str:
    """The first line of what an error of another package says, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
