"""What a merge keeps beside its target: ours alone, whoever else may write to the parent.

Whoever can write there can plant a link, a pipe, a hard link or a folder of weights under the names
that a merge will use, or exchange names while it runs. So what is found is used only if it belongs
to us, and the folder is worked in through its descriptor, whatever happens to its name.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import tempfile
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

from fastmerge.errors import OutputError
from fastmerge.output.disk import remove_tree

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40  # on the way to a file: Linux follows no more


class WorkingFolder:
    """A folder of ours, open; ``inside`` is a path to it that no renaming leads astray.

    Made private (mode 0700): nobody but us puts anything into it. ``loose``: it was found as one
    that others may write to.
    """

    def __init__(self, path: Path, through: Path | None = None) -> None:
        """Opens what is there: at ``path``, or ``through`` the open folder that it lies in. Raises
        OutputError for what is no folder of ours, OSError.
        """
        found = os.lstat(through or path)
        check_ours(path, found, folder=True)
        self.path = path
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(through or path, flags)
        status = os.fstat(self._descriptor)
        self.inode = status.st_ino
        self.loose = is_loose(status)
        self.inside = Path(f"/proc/self/fd/{self._descriptor}")
        if not os.path.samestat(found, status):
            self.close()
            raise OutputError(f"{path}: was exchanged while it was opened; run again")

    @classmethod
    def make(cls, path: Path) -> WorkingFolder:
        path.mkdir(mode=0o700)
        made = cls(path)
        if os.listdir(made.inside):
            made.close()
            raise OutputError(f"{path}: was exchanged while it was made; run again")
        return made

    def check(self, name: str) -> None:
        """Raises OutputError if the file ``name`` in it could be anything but a file of ours, with
        ``/`` between folders: no link leads to it. OSError.
        """
        *folders, _ = accumulate(Path(name).parts, os.path.join)
        for folder in folders:
            check_ours(self.path / folder, os.lstat(self.inside / folder), folder=True)
        check_ours(self.path / name, os.lstat(self.inside / name))

    def share(self) -> None:
        """Gives it the mode that any new folder has here: with the umask, an ACL, a group's bit."""
        probe = self.inside / "mode"
        probe.mkdir()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.rmdir()
        if mode != stat.S_IMODE(os.fstat(self._descriptor).st_mode):  # FAT has none to set
            os.fchmod(self._descriptor, mode)

    def named(self, error: OSError) -> OSError:
        """The same error with the folder's name in the place of ``inside``."""
        inside, name = str(self.inside), str(error.filename)
        if name == inside or name.startswith(f"{inside}/"):
            return OSError(error.errno, error.strerror, f"{self.path}{name[len(inside) :]}")
        return error

    def remove(self) -> None:
        """With all that is in it, if its name still leads to it."""
        if inode(self.path) == self.inode:
            remove_tree(self.path)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):  # of a folder that was only looked at nothing is lost
                os.close(descriptor)


def beside(target: Path, what: str) -> Path:
    """What a merge keeps beside its target, hidden: its "partial" folder, "journal", ..."""
    return target.with_name(f".{target.name}.fastmerge-{what}")


def inode(path: Path) -> int:
    """Of a folder; 0 where there is none, or a link to one."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return 0
    return status.st_ino if stat.S_ISDIR(status.st_mode) else 0


def open_ours(path: Path) -> int:
    """A descriptor of the file at ``path``, made if need be, to read and to append to.

    Raises OutputError for what is no regular file of ours with that one name, OSError.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            found = os.lstat(path)
            check_ours(path, found)
            descriptor = os.open(path, flags | os.O_NONBLOCK)
        except FileNotFoundError:
            try:
                return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                continue
        if os.path.samestat(found, os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)


def is_loose(status: os.stat_result) -> bool:
    """Whether others may write to it: then nothing is known of what is in it."""
    return bool(status.st_mode & OTHERS_WRITE)


def check_ours(path: Path, status: os.stat_result, *, folder: bool = False) -> None:
    wanted = stat.S_ISDIR if folder else stat.S_ISREG
    if stat.S_ISLNK(status.st_mode):
        fault = f"a link ({os.readlink(path)})"
    elif not wanted(status.st_mode):
        fault = "not a folder" if folder else "not a regular file"
    elif not folder and status.st_nlink > 1:
        fault = "a file with other names (hard links)"
    elif _is_others(path, status):
        fault = f"another user's (uid {status.st_uid})"
    else:
        return
    raise OutputError(
        f"{path}: {fault}, where a merge keeps its own work; remove it if nobody needs it, or "
        "choose another output"
    )


def check_not_others(path: Path, status: os.stat_result) -> None:
    """Raises OutputError for another user's file, link or whatever it is."""
    if _is_others(path, status):
        raise OutputError(
            f"{path}: another user's (uid {status.st_uid}); remove it if nobody needs it, or "
            "choose another output"
        )


def check_links(path: Path) -> None:
    """Raises OutputError where somebody else decides where ``path`` leads. OSError.

    What it names itself may be a link of ours or of root's that nobody else can have exchanged. Of
    links on the way to it those of other users are refused where everybody may write:
    fs.protected_symlinks, which not every machine has set, nor any in a folder that is not sticky.
    What does not exist is nobody's.
    """
    left = list(reversed((path if path.is_absolute() else Path.cwd() / path).parts[1:]))
    at, followed = Path("/"), 0
    while left:
        name = left.pop()
        if name == "..":
            at = at.parent
            continue
        place = at / name
        try:
            status = os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            return
        if not stat.S_ISLNK(status.st_mode):
            at = place
            continue
        around, to, followed = os.stat(at), Path(os.readlink(place)), followed + 1
        everybody = bool(around.st_mode & stat.S_IWOTH)
        theirs = status.st_uid not in (0, os.geteuid())
        if left:  # on the way: whoever has the folder may say where it leads
            theirs = theirs and everybody and status.st_uid != around.st_uid
        else:
            theirs = theirs and not _is_given_to(at, status.st_uid)
        fault = ""
        if theirs:
            where = " where everybody may write" * everybody
            fault = f"of another user's (uid {status.st_uid}){where}"
        elif not left and _may_exchange(at, around):
            fault = f"that others may exchange (they may write to {at})"
        if fault:
            raise OutputError(
                f"{place}: a link ({to}) {fault}; name the folder that is meant, or choose another "
                "output"
            )
        if followed > _MOST_LINKS:
            return  # a circle: whoever opens it is told
        if to.is_absolute():
            at, to = Path("/"), to.relative_to("/")
        left.extend(reversed(to.parts))


def _may_exchange(folder: Path, status: os.stat_result) -> bool:
    """Whether others may give the name of a link of ours in the folder to another one."""
    if status.st_uid not in (0, os.geteuid()) and not _is_given_to(folder, status.st_uid):
        return True
    if status.st_mode & stat.S_ISVTX or not is_loose(status):
        return False
    return bool(status.st_mode & stat.S_IWOTH) or not _is_ours_alone(folder, status.st_gid)


def _is_ours_alone(folder: Path, group: int) -> bool:
    """Whether we alone are who the mode of a folder calls its ``group``: with umask 002 users have
    one each, of their own name.
    """
    try:
        us, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    others = {user.pw_uid for user in pwd.getpwall() if user.pw_gid == group} - {us.pw_uid}
    is_own = (found.gr_gid, found.gr_name) == (us.pw_gid, us.pw_name)
    return is_own and not others and set(found.gr_mem) <= {us.pw_name} and not _has_acl(folder)


def _has_acl(folder: Path) -> bool:
    """Then the bits of the group are those of everybody whom the list names."""
    try:
        return "system.posix_acl_access" in os.listxattr(folder)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return False


def _is_given_to(folder: Path, uid: int) -> bool:
    """Whether a new file of ours in the folder, if we may make one, is that user's."""
    return os.access(folder, os.W_OK | os.X_OK) and uid == _owner_here(folder)


def _is_others(path: Path, status: os.stat_result) -> bool:
    return status.st_uid != os.geteuid() and status.st_uid != _owner_here(path.parent)


def _owner_here(folder: Path) -> int:
    """Whose a new file in the folder is: not ours where a server or a mount gives all to one."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid
