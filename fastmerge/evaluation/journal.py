"""What an evaluation keeps: keyed results on disk, digests, files written whole."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastmerge.errors import OutputError
from fastmerge.limits import MAX_JOURNAL_BYTES
from fastmerge.output.working import check_ours, open_ours


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
        """``path`` None keeps the results in memory only. Raises OutputError, OSError."""
        self._path = path
        self._known: dict[str, Any] = {}
        if path is None or not os.path.lexists(path):
            return
        with open(open_ours(path), "r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_JOURNAL_BYTES:
                raise OutputError(f"{path}: {size} bytes, over {MAX_JOURNAL_BYTES}; not a run's")
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                if not isinstance(entry["key"], str):
                    raise TypeError
                self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise OutputError(
                    f"{path}: line {number} is damaged; delete that line, whose result is then "
                    "measured again"
                ) from None

    def get(self, key: str) -> Any:
        """The value recorded under ``key``, or None."""
        return self._known.get(key)

    def holds(self, prefix: str) -> bool:
        """Whether any key begins so."""
        return any(key.startswith(prefix) for key in self._known)

    def put(self, key: str, value: Any) -> None:
        """Records a JSON-able value."""
        self._known[key] = value
        if self._path is None:
            return
        with open(open_ours(self._path), "ab") as file:
            file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def check_own(out: Path, name: str) -> None:
    """Raises OutputError where the folder of a run, or what it keeps there under ``name``, is not
    ours: others' results would decide what is merged. Links above the folder are the user's own.
    """
    if os.path.lexists(out):
        place = Path(os.path.realpath(out))
        check_ours(place, os.lstat(place), folder=True)
        if os.path.lexists(place / name):
            check_ours(place / name, os.lstat(place / name))


def write_atomically(path: Path, data: str | bytes) -> None:
    """The whole file or the old one, never a part, and never through a link that lies there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
