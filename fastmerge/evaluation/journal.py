"""What an evaluation keeps: keyed results on disk, digests, files written whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fastmerge.errors import OutputError, brief
from fastmerge.limits import MAX_JOURNAL_BYTES
from fastmerge.models.header import as_value
from fastmerge.output.place import explain
from fastmerge.output.working import (
    check_links,
    check_not_others,
    check_ours,
    is_loose,
    open_ours,
)

R = TypeVar("R")


def digest(value: Any) -> str:
    """A short sha256 of a plain value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Journal:
    """Keyed results in a file of JSON lines, each line on disk before the next result is computed.

    What a killed run was writing at the end is a line without its end, and dropped. A run's folder
    may come out of an archive: only a regular file of our own user is read or written.
    """

    def __init__(self, path: Path | None) -> None:
        """``path`` None keeps the results in memory only. Raises FastmergeError."""
        self._path = path
        self._known: dict[str, Any] = {}
        if path is None or not os.path.lexists(path):
            return
        try:
            self._read(path)
        except OSError as error:
            raise explain(error, path) from error

    def _read(self, path: Path) -> None:
        with open_own(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_JOURNAL_BYTES:
                raise OutputError(f"{path}: {size} bytes, over {MAX_JOURNAL_BYTES}; not a run's")
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = as_value(line)
                if not isinstance(entry["key"], str):
                    raise TypeError
                self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise OutputError(
                    f"{path}: line {number} is damaged; delete that line, whose result is then "
                    "measured again"
                ) from None

    def get(self, key: str) -> Any:
        """The value recorded under ``key``, or None."""
        return self._known.get(key)

    def read(self, key: str, meaning: Callable[[Any], R]) -> R | None:
        """What ``meaning`` makes of the value recorded under ``key``, or None. Raises OutputError
        where it raises what a value does that no run wrote.
        """
        found = self._known.get(key)
        if found is None:
            return None
        try:
            return meaning(found)
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
            raise OutputError(
                f"{self._path or 'journal'}: the value of {brief(key)} is damaged; delete its "
                "line, and it is measured again"
            ) from None

    def holds(self, prefix: str) -> bool:
        """Whether any key begins so."""
        return any(key.startswith(prefix) for key in self._known)

    def put(self, key: str, value: Any) -> None:
        """Records a JSON-able value. Raises FastmergeError where it cannot be written."""
        self._known[key] = value
        if self._path is None:
            return
        try:
            with open_own(self._path) as file:
                file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise explain(error, self._path) from error


def open_own(path: Path) -> BinaryIO:
    """The file of a run, made if need be, to read and to append to. Raises OutputError for one that
    others can have written, OSError.
    """
    file = open(open_ours(path), "r+b")  # noqa: SIM115
    if is_loose(os.fstat(file.fileno())):
        file.close()
        raise _loose(path)
    return file


def write_own(path: Path, data: str | bytes) -> None:
    """`write_atomically` of a file of a run; OutputError or ResourceError where that fails."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise explain(OSError(error.errno, error.strerror, str(path)), path) from error


def check_own(out: Path, *names: str) -> None:
    """Raises OutputError where the folder of a run, or what it keeps there under ``names``, is not
    ours, or others may write to it: their results would decide what is merged. Links above the
    folder are the user's own.
    """
    check_links(out)
    if not os.path.lexists(out):
        return
    place = Path(os.path.realpath(out))
    status = os.lstat(place)
    check_ours(place, status, folder=True)
    found = [place / name for name in names if os.path.lexists(place / name)]
    if found and is_loose(status):
        raise _loose(place)
    for path in found:
        status = os.lstat(path)
        is_folder = stat.S_ISDIR(status.st_mode)
        check_ours(path, status, folder=is_folder)
        if not is_folder and is_loose(status):
            raise _loose(path)


def _loose(path: Path) -> OutputError:
    return OutputError(
        f"{path}: other users may write to it, so that nothing in it is certain; if all is as you "
        "left it: chmod go-w, else use another folder"
    )


def is_half_written(name: str) -> bool:
    """Whether a file of this name is what `write_atomically` leaves where it is killed."""
    return re.fullmatch(r"\..+\.[0-9a-f]{16}", name) is not None


def write_atomically(path: Path, data: str | bytes) -> None:
    """The whole file or the old one, never a part, and never through a link that lies there. Nobody
    but us may write to it. Raises OutputError for another user's, OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        if os.path.lexists(path):
            check_not_others(path, os.lstat(path))
        with open(os.open(temporary, flags, 0o644), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
