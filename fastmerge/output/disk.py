"""Files and folders of ours on the disk: written whole, and there before anybody is told."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmerge.errors import ModelError
from fastmerge.limits import MAX_FILE_BYTES
from fastmerge.models.header import open_regular

_COPIED_BYTES = 1 << 20


def write_files(folder: Path, files: Mapping[str, bytes | Path]) -> dict[str, dict[str, Any]]:
    """Writes new files into ``folder``, by name, with ``/`` between folders: content, or a file to
    copy. They are on the disk (fsync) then. Each one's bytes' number and sha256.
    """
    written, folders = {}, {folder}
    for name, content in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        folders |= {f for f in place.parents if f.is_relative_to(folder)}
        written[name] = write_file(place, content)
    for each in folders:
        sync_folder(each)
    return written


def facts_of(content: bytes | Path) -> dict[str, Any]:
    """What `write_file` would return."""
    digest, size = hashlib.sha256(), 0
    for piece in [content] if isinstance(content, bytes) else _pieces(content):
        digest.update(piece)
        size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_file(path: Path, content: bytes | Path) -> dict[str, Any]:
    """Writes a new file; returns its bytes' number and sha256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for piece in [content] if isinstance(content, bytes) else _pieces(content):
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _pieces(path: Path) -> Iterator[bytes]:
    """Of a file, no more than `side_files` takes: it may have grown since it was seen."""
    with open_regular(path) as file:
        left = MAX_FILE_BYTES
        while piece := file.read(_COPIED_BYTES):
            left -= len(piece)
            if left < 0:
                raise ModelError(f"{path}: grew to more than {MAX_FILE_BYTES >> 20} MiB")
            yield piece


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path, *, ignore_errors: bool = False) -> None:
    """`shutil.rmtree`, out of which an interrupt comes as such: where one strikes as it closes a
    folder, it closes that again, and what comes out is that error ("Bad file descriptor"), errors
    ignored or not.
    """
    try:
        shutil.rmtree(path, ignore_errors=ignore_errors)
    except OSError as error:
        before: BaseException | None = error
        while before is not None:
            if isinstance(before, KeyboardInterrupt):
                raise before from None
            before = before.__context__
        if not ignore_errors:
            raise
