"""Refusals about where the output goes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fastmerge.errors import (
    FastmergeError,
    ModelError,
    OutputError,
    ResourceError,
    argument,
    some_of,
)
from fastmerge.limits import MAX_DEPTH, MAX_HEADER_BYTES
from fastmerge.models.adapter import CONFIG
from fastmerge.models.folder import INDEX, SINGLE
from fastmerge.models.header import read_object
from fastmerge.models.links import hub_repository
from fastmerge.models.side_files import LINEAGE_FILE, OURS, is_known
from fastmerge.output.working import check_links

_LEGAL = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)[\w.-]*|\.gitattributes")
_MAX_NAME_BYTES = 220  # of the 255 that file systems take: the working folder's name is longer


# --- refusals ---


def check_output(
    target: Path, inputs: Iterable[Path], nbytes: int, *, overwrite: bool = False
) -> None:
    """Raises what `ModelWriter` would about the place of ``nbytes`` of output, but for unfinished
    merges, which need its lock; touches nothing.
    """
    real = real_target(target)
    check_place(real, inputs)
    check_target(real, overwrite)
    check_space(real.parent, nbytes)


def real_target(target: Path) -> Path:
    """``target`` with links followed; OutputError where no folder can have that name, or another
    user's link decides what it is.
    """
    try:
        check_links(target)
        real = Path(os.path.realpath(target))
        with suppress(FileNotFoundError):
            os.lstat(real)
    except ValueError as error:  # a character that no path can hold
        raise OutputError(f"{target}: no folder can be called that ({error})") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OutputError(f"{str(target)[:40]}...: the path is too long; shorten it") from None
        raise OutputError(f"{target}: cannot be used ({error.strerror or error})") from error
    return real


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
    repository = hub_repository(target)
    if repository is not None:
        raise OutputError(
            f"{target}: the output lies in the Hub's cache ({repository.name}), which the Hub's "
            "tools rewrite and delete; give a folder elsewhere"
        )
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the folder {target.parent} does not exist; create it")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the folder {target.parent} is not writable")
    if target.exists() and _is_mount(target):
        # The finished folder takes this name by a rename, which cannot replace a mount.
        raise OutputError(f"{target}: is where a disk is mounted; give a new folder inside it")
    for given in inputs:
        try:
            touched = _reads_from(target, Path(os.path.realpath(given)))
        except OSError as error:
            raise ModelError(f"{given}: cannot be read ({error.strerror or error})") from error
        if touched:
            raise OutputError(f"{target}: the output would replace the input {given}")


def _reads_from(target: Path, path: Path) -> bool:
    """Whether the input at ``path`` is, lies in or has a link into ``target``."""
    entries = path.iterdir() if path.is_dir() else ()
    reads = [Path(os.path.realpath(file)) for file in entries if file.is_symlink()]
    if path.is_relative_to(target) or any(file.is_relative_to(target) for file in reads):
        return True
    return target.exists() and target.samefile(path if path.is_dir() else path.parent)


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
        raise OutputError(
            f"{target}: exists; choose another output or add {argument('overwrite', True)}"
        )
    if not names & {SINGLE, INDEX, "config.json", CONFIG}:
        raise OutputError(
            f"{target}: not a model folder, so {argument('overwrite', True)} will not replace it: "
            f"it holds {some_of(sorted(names), 5)}; choose another output"
        )
    foreign = _foreign(target)
    if foreign:
        raise OutputError(
            f"{target}: holds {some_of(foreign, 5)}, which no merge wrote and "
            f"{argument('overwrite', True)} would delete; move that away, or choose another output"
        )


def _foreign(target: Path) -> list[str]:
    """What is in the folder that neither a merge wrote there nor every model's folder holds; a
    folder of such things counts once.
    """
    written = _written(target)
    found: dict[str, None] = {}
    for folder, folders, files in os.walk(target):
        inside = os.path.relpath(folder, target)
        prefix = "" if inside == "." else f"{inside}/"
        if prefix.count("/") > MAX_DEPTH:  # no model's: os.walk and rmtree recurse
            files, folders[:] = [*files, *folders], []
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(files + links):
            whole = prefix + name
            if whole in written or (not prefix and _is_models(name)):
                continue
            if not whole.startswith(".cache/huggingface/"):  # what its downloads leave behind
                top, _, rest = whole.partition("/")
                found[f"{top}/" if rest else top] = None
        if not folders and not files and prefix:
            found.setdefault(f"{prefix.split('/')[0]}/")
    return list(found)


def _is_models(name: str) -> bool:
    return name in OURS or is_known(name) or _LEGAL.fullmatch(name) is not None


def _written(target: Path) -> set[str]:
    """What the merge that made the folder says that it wrote."""
    path = target / LINEAGE_FILE
    if not path.is_file():
        return set()
    try:
        files = read_object(path, max_bytes=MAX_HEADER_BYTES).get("files")
    except ModelError:  # damaged: then nothing is known of what was written
        return set()
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def check_space(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
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
