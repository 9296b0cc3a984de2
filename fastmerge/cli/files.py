"""Files that a user names for what a command finds."""

from __future__ import annotations

import os
from pathlib import Path

from fastmerge.errors import OutputError
from fastmerge.evaluation.journal import write_own
from fastmerge.output.working import check_links, check_not_others


def check_file(path: Path | None, option: str) -> None:
    """OutputError where a file could not be written at the end: before minutes of work."""
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{option}: {path}: is a folder; give a file")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{option}: {path}: no folder {path.parent}; create it")
    if not os.access(path if _is_device(path) else parent, os.W_OK):
        raise OutputError(f"{option}: {path}: cannot be written")
    _checked(path)


def write_result(path: Path, data: bytes) -> None:
    """The file whole or as it was; into a pipe or a device as it comes. OutputError for another
    user's, and where nobody reads a pipe.
    """
    real = _checked(path)
    if not _is_device(path):
        write_own(real, data)
        return
    try:
        # Of a pipe that nobody reads: an error, where a plain open waits for ever.
        with open(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY), "wb") as file:
            os.set_blocking(file.fileno(), True)
            file.write(data)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _checked(path: Path) -> Path:
    """Where a user's own link leads."""
    check_links(path)
    if path.exists() and not (_is_device(path) and path.stat().st_uid == 0):  # /dev/stdout
        check_not_others(path, path.stat())
    return Path(os.path.realpath(path))
