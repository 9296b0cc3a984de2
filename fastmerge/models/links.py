"""Where the files of a model's folder may really lie. The folder is a stranger's."""

from __future__ import annotations

import errno
import os
from pathlib import Path, PosixPath

from fastmerge.errors import ModelError

_INNER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def hub_repository(path: Path) -> Path | None:
    """The ``models--org--name`` folder of huggingface_hub's cache that the snapshot at ``path``, or
    a folder in it, lies in: its files are links into ``blobs`` there.
    """
    for folder in (path, *path.parents):
        above = folder.parent
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            return above.parent
    return None


class Resolved(PosixPath):
    """A path in which no link was left when it was looked at, opened only if none is in it since:
    who may write to a folder can exchange a file that was checked, or a folder, for a link.
    """

    def descriptor(self, flags: int) -> int:
        """`os.open`, of no link; ModelError where one has come into it, OSError."""
        folder = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in self.parts[1:-1]:
                # In this order an interrupt never closes one twice, which may be another's by then.
                outer, folder = folder, os.open(part, _INNER, dir_fd=folder)
                os.close(outer)
            return os.open(self.name, flags | os.O_NOFOLLOW, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise ModelError(
                    f"{self}: was exchanged for a link since it was checked; give the model a "
                    "folder where nobody else may write"
                ) from None
            raise OSError(error.errno, error.strerror, str(self)) from error
        finally:
            os.close(folder)


class Home:
    """One model's folder, and where links in it may lead: into it, or to the blobs of its own
    repository in the Hub's cache.
    """

    def __init__(self, folder: Path) -> None:
        self.root = Path(os.path.realpath(folder))
        self._places = [self.root]
        repository = hub_repository(self.root)
        if repository is not None:
            self._places.append(repository / "blobs")

    def inside(self, path: str | Path) -> Resolved:
        """Where ``path`` really lies. Raises ModelError if it leads out of the folder or nowhere.

        Links above the folder are the user's own.
        """
        place = Resolved(os.path.realpath(path))
        link = os.path.islink(path)
        if link and not place.exists():
            raise ModelError(
                f"{path}: a link to nothing ({os.readlink(path)}); mend the link, or download the "
                "file again"
            )
        if not any(place.is_relative_to(home) for home in self._places):
            leads_to = os.readlink(path) if link else place
            raise ModelError(
                f"{path}: a link out of the model's folder ({leads_to}); put the file itself there "
                "(cp -L)"
            )
        return place
