"""A whole folder takes its name: by one rename, or in exchange for the model that had it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastmerge.errors import OutputError
from fastmerge.output.disk import remove_tree, sync_folder
from fastmerge.output.names import exchange
from fastmerge.output.working import WorkingFolder, inode


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
    if exchange(path, target):
        sync_folder(target.parent)
        _check_shown(folder, target)
        if inode(path) == old:
            remove_tree(path)  # the old model
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
            remove_tree(aside)
    sync_folder(target.parent)
    _check_shown(folder, target)


def _check_shown(folder: WorkingFolder, target: Path) -> None:
    if inode(target) != folder.inode:
        raise OutputError(
            f"{target}: somebody exchanged the folder while it was written; what is there now is "
            "not the merge; choose an output where nobody else may write"
        )
