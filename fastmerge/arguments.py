"""What the arguments of public functions must be; everything else is one line of FastmergeError.

``where`` is the argument's name, as the caller wrote it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastmerge.errors import FastmergeError, brief, first_sentences, is_whole, near_miss

C = TypeVar("C", bound=Callable[..., Any])


def a_path(value: Any, where: str) -> Path:
    """A path that a file system can have: text or `os.PathLike` of text, not empty, no NUL, no
    surrogate but those of bytes; ``~`` is the home, as in a shell and in a reference to a model.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise FastmergeError(f"{where}: must be a path, not {brief(value)}")
    text = os.fspath(value)
    try:
        is_path = text != "" and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise FastmergeError(f"{where}: {brief(text)} is no path")
    return expanded(Path(text), where)


def is_url(path: Path) -> bool:
    """Whether it has the form of a URL, of whose two slashes a Path has made one."""
    return ":/" in str(path)


def expanded(path: Path, where: str) -> Path:
    """The path with the home that ``~`` means."""
    try:
        return path.expanduser()
    except RuntimeError:
        user = path.parts[0]
        raise FastmergeError(
            f"{where}: {path}: no user {user} with a home here; write it out"
        ) from None


def a_text(value: Any, where: str) -> str:
    """Text that UTF-8 can say: no lone surrogates."""
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise FastmergeError(f"{where}: must be text, not {brief(value)}")
    return value


def one_of(value: Any, words: Sequence[str], where: str) -> str:
    """One of ``words``."""
    if not isinstance(value, str) or value not in words:
        shown = f"'{value}'" if isinstance(value, str) else brief(value)
        close = near_miss(value, words) if isinstance(value, str) else None
        hint = f" (did you mean '{close}'?)" if close else ""
        raise FastmergeError(f"{where}: unknown {shown}; use {', '.join(words)}{hint}")
    return value


def a_flag(value: Any, where: str) -> bool:
    """True or False, Python's or NumPy's; no text, which would be true whatever it says."""
    if not isinstance(value, (bool, np.bool_)):
        raise FastmergeError(f"{where}: must be True or False, not {brief(value)}")
    return bool(value)


def a_size(value: Any, where: str, least: int = 1) -> int:
    """A number of bytes of at least ``least``."""
    if not is_whole(value) or value < 1:
        raise FastmergeError(f"{where}: {brief(value)} is not a number of bytes of 1 or more")
    if value < least:
        raise FastmergeError(f"{where}: {value} is less than the {least} bytes it takes")
    return int(value)


def a_function(value: C | None, where: str) -> C | None:
    """Something to call, or None."""
    if value is not None and not callable(value):
        raise FastmergeError(f"{where}: must be a function, not {brief(value)}")
    return value


def a_list(value: Any, where: str) -> list[Any]:
    """The items of a list, a tuple, an array of one axis or more, or of any other iterable but text
    and mappings.
    """
    if not isinstance(value, (str, bytes, dict)):
        try:
            return list(value)
        # ValueError: a closed file; RuntimeError: torch's nested tensors.
        except (TypeError, ValueError, RuntimeError):
            pass
    raise FastmergeError(f"{where}: must be a list, not {brief(value)}")


def a_mapping(value: Any, where: str) -> Mapping[Any, Any]:
    """A dictionary or the like."""
    if type(value) is not dict and not isinstance(value, Mapping):
        raise FastmergeError(f"{where}: must be a mapping of names to values, not {brief(value)}")
    return value


def plain(value: Any, where: str) -> Any:
    """Numbers and arrays of NumPy's and torch's as Python's own numbers and lists of them."""
    if isinstance(value, type) or not hasattr(value, "tolist"):
        return value
    try:
        return value.tolist()
    # torch's, of sparse, nested, packed and meta tensors
    except (RuntimeError, TypeError, ValueError) as error:
        kind = type(value).__name__
        raise FastmergeError(
            f"{where}: a {kind} that has no numbers to read ({first_sentences(str(error))}); pass "
            "a list of numbers, outside torch.func's transforms (vmap, grad)"
        ) from error
