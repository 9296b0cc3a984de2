"""The lock of a target, and what survives a kill."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmerge.errors import OutputError
from fastmerge.models.header import as_value
from fastmerge.output.place import explain
from fastmerge.output.working import is_loose, open_ours

_FAILED = {"failed": True}


def _is_head(line: Any) -> bool:
    return isinstance(line, dict) and {"job", "boot", "folder"} <= line.keys()


def is_entry(line: Any) -> bool:
    """Whether a line of a journal names a tensor and what it came to, as a run writes it."""
    if not (isinstance(line, list) and len(line) == 2 and isinstance(line[0], str)):
        return False
    result = line[1]
    return (
        isinstance(result, dict)
        and isinstance(result.get("checksum", ""), str)
        and type(result.get("nonfinite", 0)) is int
        and ("rounding" in result) == ("size" in result)
        and all(type(result.get(name, 0.0)) is float for name in ("rounding", "size"))
    )


def locked(path: Path) -> int:
    """A descriptor of the file at ``path``, made if need be, whose lock (flock) this process has
    until it closes it or is killed. Raises BlockingIOError where another has it, OSError.
    """
    while True:
        descriptor = open_ours(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have removed the file after we opened it.
            if os.path.lexists(path) and os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


class Journal:
    """The lock of a target, and its finished tensors: a JSON line about the job, one per tensor.

    Appended with plain writes: a killed process loses none of them; a torn last line is ignored.
    Nothing is synced, so entries do not outlive the boot that they were written in.
    ``loose``: others may write to what was found, so its entries prove nothing.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.job = ""
        self.entries = 0
        self.failed = False  # the run it tells of ended with an error of its own
        self.begun = False  # this process owns what the partial folder holds
        self.aside = 0  # the inode of the old model, moved aside to make room for the new one
        try:
            self._descriptor = locked(path)
            self.loose = is_loose(os.fstat(self._descriptor))
        except BlockingIOError:
            raise OutputError(f"{target}: another merge is writing it now ({path})") from None
        except OSError as error:
            raise explain(error, target) from error

    def _entries(self) -> tuple[dict[str, Any], list[Any], int]:
        """The job, the entries that are whole, and the bytes of both; sets ``failed`` and
        ``aside``. A power cut may leave blocks that were never written: what follows the first
        damaged line counts for nothing.
        """
        text = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        found: list[Any] = []
        size = 0
        for line in text.split(b"\n")[:-1]:
            try:
                entry = as_value(line)
            except ValueError:
                break
            if not (is_entry(entry) if found else _is_head(entry)):
                self.failed = entry == _FAILED
                if found and isinstance(entry, dict) and isinstance(entry.get("aside"), int):
                    self.aside = entry["aside"]
                break
            found.append(entry)
            size += len(line) + 1
        return found[0] if found else {}, found[1:], size

    def folder(self) -> int:
        """The inode of the folder that the journal is about; 0 for an empty journal."""
        found = self._entries()[0].get("folder")
        return found if isinstance(found, int) else 0

    def read(self, inode: int) -> dict[str, dict[str, Any]]:
        """The tensors listed, if of this boot and of the folder with this inode; else none."""
        head, entries, size = self._entries()
        if head.get("boot") != boot_id() or head["folder"] != inode:
            return {}
        os.ftruncate(self._descriptor, size)
        self.job, self.entries = head["job"], len(entries)
        return dict(entries)

    def begin(self, job: str, inode: int) -> None:
        os.ftruncate(self._descriptor, 0)
        self.job, self.entries, self.begun = job, 0, True
        self._append([json.dumps({"job": job, "boot": boot_id(), "folder": inode})])

    def fail(self) -> None:
        """Notes that the run ended with an error: another job need not be kept from this place."""
        self._append([json.dumps(_FAILED)])

    def set_aside(self, inode: int) -> None:
        """Notes that the old model is about to get another name: a later run gives it back."""
        self._append([json.dumps({"aside": inode})])

    def add(self, results: Mapping[str, dict[str, Any]]) -> None:
        self._append([json.dumps(item) for item in results.items()])
        self.entries += len(results)

    def _append(self, lines: list[str]) -> None:
        data = "".join(line + "\n" for line in lines).encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self, *, remove: bool) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            if remove:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def boot_id() -> str:
    """This start of the machine: what a lock or a number of a process means holds for one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
