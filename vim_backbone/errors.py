"""The one class of errors that a user can cause and mend."""

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of characters that are not shown as such."""


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


def escaped(name: str) -> str:
    r"""A name of a file as one line of text that can be printed and written as UTF-8.

    Control and formatting characters, and bytes that are no UTF-8, become \x1b, \u202e, \xe9 and the like.
    """
    if name.isprintable():  # none is hidden: a tenth of the time, of names by the million
        return name
    return "".join(_escape(c) if unicodedata.category(c) in HIDDEN else c for c in name)


def _escape(character: str) -> str:
    byte = ord(character) - 0xDC00  # as Python holds a byte that is no UTF-8 (PEP 383)
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()
