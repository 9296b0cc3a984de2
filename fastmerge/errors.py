"""The one exception that a user's mistake raises.

Every message is one line that names the file, tensor or key at fault and the fix. The command line
prints it and exits with code 2; anything else that escapes is a defect in fastmerge.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any


class FastmergeError(Exception):
    """Bad input or an impossible request; the message is one line and names the remedy."""

    def __init__(self, message: str) -> None:
        # File and tensor names are other people's: no line break or escape sequence gets through.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def nearest(word: str, known: object, *, limit: int = 12) -> str:
    """A hint for an unknown ``word``: the nearest known one, else the first ``limit`` of them."""
    import difflib

    names = sorted(str(name) for name in known)  # type: ignore[attr-defined]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names[:limit])}{', ...' if len(names) > limit else ''}"


def is_whole(value: Any) -> bool:
    """Whether it is an integer: Python's or NumPy's, but no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)
