"""Files that a schedule names, whole: of a stranger's schedule they may be anything."""

from __future__ import annotations

from pathlib import Path

from fastmerge.errors import FastmergeError, RecipeError
from fastmerge.limits import MAX_DATA_BYTES
from fastmerge.models.header import open_regular


def bytes_of(path: Path, where: str, limit: int = MAX_DATA_BYTES) -> bytes:
    """The file's bytes. Raises RecipeError, which begins with ``where``, for what cannot be read,
    is no regular file or has more than ``limit`` bytes.
    """
    found = bytearray()
    try:
        with open_regular(path) as file:
            while len(found) <= limit and (piece := file.read(1 << 20)):
                found += piece
    except FastmergeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{where}: {path}: cannot be read ({reason})") from error
    if len(found) > limit:
        raise RecipeError(f"{where}: {path}: over {limit} bytes; give a smaller file")
    return bytes(found)


def text_of(path: Path, where: str, limit: int = MAX_DATA_BYTES) -> str:
    """The file's text, its line ends as in any text. Raises RecipeError, also where it is not
    UTF-8.
    """
    try:
        text = bytes_of(path, where, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: {path}: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
