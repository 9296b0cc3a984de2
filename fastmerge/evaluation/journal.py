"""What an evaluation keeps: keyed results on disk, digests, files written whole."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fastmerge.errors import OutputError


def digest(value: Any) -> str:
    """A short sha256 of a plain value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Journal:
    """Keyed results in a file of JSON lines, each line on disk before the next result is computed.

    What a killed run was writing at the end is a line without its end, and dropped.
    """

    def __init__(self, path: Path | None) -> None:
        """``path`` None keeps the results in memory only."""
        self._path = path
        self._known: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
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
        with self._path.open("ab") as file:
            file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def write_atomically(path: Path, data: str | bytes) -> None:
    """The whole file or the old one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)
