"""Refusals about where the output goes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from fastmerge.errors import FastmergeError, OutputError, ResourceError
from fastmerge.models.folder import INDEX, SINGLE

_MAX_NAME_BYTES = 220  # of the 255 that file systems take: the working folder's name is longer


# --- refusals ---


def check_output(
    target: Path, inputs: Iterable[Path], nbytes: int, *, overwrite: bool = False
) -> None:
    """Raises what `ModelWriter` would about the place of ``nbytes`` of output, but for unfinished
    merges, which need its lock; touches nothing.
    """
    real = Path(os.path.realpath(target))
    check_place(real, inputs)
    check_target(real, overwrite)
    check_space(real.parent, nbytes)


def check_place(target: Path, inputs: Iterable[Path]) -> None:
    if not target.name or _holds_us(target):
        raise OutputError(f"{target}: is the current or the root folder; name one inside it")
    if target.is_symlink():  # links were followed: this one leads to itself
        raise OutputError(f"{target}: is a link that leads nowhere; remove it")
    if len(os.fsencode(target.name)) > _MAX_NAME_BYTES:
        raise OutputError(f"{target.name[:40]}...: the folder's name is too long; shorten it")
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise OutputError(f"{target}: the folder's name is not UTF-8; give another") from None
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the folder {target.parent} does not exist; create it")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the folder {target.parent} is not writable")
    if target.exists() and _is_mount(target):
        # The finished folder takes this name by a rename, which cannot replace a mount.
        raise OutputError(f"{target}: is where a disk is mounted; give a new folder inside it")
    for given in inputs:
        path = Path(os.path.realpath(given))
        # A folder of links into the target reads from the target all the same.
        reads = [Path(os.path.realpath(file)) for file in path.iterdir()] if path.is_dir() else []
        if path.is_relative_to(target) or any(file.is_relative_to(target) for file in reads):
            raise OutputError(f"{target}: the output would replace the input {given}")
        folder = path if path.is_dir() else path.parent
        if path.is_dir() and target.is_relative_to(folder):
            raise OutputError(f"{target}: the output lies inside the input {given}")
        if target.exists() and target.samefile(folder):
            raise OutputError(f"{target}: the output would replace the input {given}")


def _holds_us(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # it was removed under us
        return False


def _is_mount(folder: Path) -> bool:
    """Bind mounts included, which share their parent's device."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return os.path.ismount(folder)
    # Field 5 is the mount point, with spaces and such as \\040.
    points = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), line.split()[4]) for line in lines)
    return str(folder) in points


def check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target}: exists and is not a folder; choose another output")
    names = {entry.name for entry in target.iterdir()}
    if not names:
        return
    if not overwrite:
        raise OutputError(f"{target}: exists; choose another output or add --overwrite")
    if not names & {SINGLE, INDEX, "config.json"}:
        raise OutputError(f"{target}: not a model folder, so --overwrite will not replace it")


def check_space(folder: Path, needed: int) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise ResourceError(
            f"{folder}: no space left: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB free"
        )


def explain(error: OSError, target: Path, io: str = "auto") -> FastmergeError:
    where = error.filename or target
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{where}: no space left on the device; free some and run again")
    if error.errno == errno.EFBIG:
        return OutputError(f"{where}: larger than this file system or the process may write")
    if error.errno == errno.EINVAL and io == "direct":
        return OutputError(f"{where}: no direct I/O on this file system; use io: auto")
    return OutputError(f"{where}: cannot be written ({error.strerror or error})")
