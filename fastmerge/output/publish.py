"""A whole folder takes its name: by one rename, or in exchange for the model that had it."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastmerge.errors import OutputError
from fastmerge.output.disk import sync_folder
from fastmerge.output.working import WorkingFolder, inode

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100


def publish(
    folder: WorkingFolder,
    path: Path,
    target: Path,
    aside: Path,
    setting_aside: Callable[[int], None],
) -> None:
    """Gives ``folder``, which is at ``path``, the name ``target`` and the mode that folders have
    there; what had the name is removed. ``setting_aside`` is told its inode first: a run after a
    kill removes nothing else. Where two names cannot be exchanged, it gets the name ``aside`` in
    between. Raises OutputError, OSError.
    """
    folder.share()
    old = inode(target)
    if not target.exists() or not any(target.iterdir()):
        path.rename(target)  # replaces an empty folder
        sync_folder(target.parent)
        _check_shown(folder, target)
        return
    setting_aside(old)
    if _exchange(path, target):
        sync_folder(target.parent)
        _check_shown(folder, target)
        if inode(path) == old:
            shutil.rmtree(path)  # the old model
    else:
        try:
            target.rename(aside)
            path.rename(target)
        except BaseException:
            with suppress(OSError):  # else the next run does it
                if inode(aside) == old and not os.path.lexists(target):
                    aside.rename(target)
            raise
        sync_folder(target.parent)
        _check_shown(folder, target)
        if inode(aside) == old:
            shutil.rmtree(aside)
    sync_folder(target.parent)
    _check_shown(folder, target)


def _check_shown(folder: WorkingFolder, target: Path) -> None:
    if inode(target) != folder.inode:
        raise OutputError(
            f"{target}: somebody exchanged the folder while it was written; what is there now is "
            "not the merge; choose an output where nobody else may write"
        )


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step; False where kernel or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = (os.fsencode(a), os.fsencode(b))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(b))
