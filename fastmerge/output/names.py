"""Names that change in one step, where kernel and file system can (renameat2)."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_NO_REPLACE, _EXCHANGE = 1, 2  # linux/fs.h
_AT_FDCWD = -100


def exchange(a: Path, b: Path) -> bool:
    """Swaps two names; False where that cannot be done in one step. Raises OSError."""
    return _rename(a, b, _EXCHANGE)


def take_name(a: Path, b: Path) -> bool:
    """Renames ``a`` to ``b``, which nothing may be called; False where that cannot be done in one
    step, as on NFS. Raises FileExistsError, OSError.
    """
    return _rename(a, b, _NO_REPLACE)


def _rename(a: Path, b: Path, flags: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(b))
