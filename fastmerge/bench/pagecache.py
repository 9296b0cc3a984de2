"""Model files in memory, and out of it, seen to be so."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmerge.models.adapter import WEIGHTS, is_adapter
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.output.disk import remove_tree

_WARM, _COLD = 0.99, 0.01  # shares of the pages
HOW_COLD = "posix_fadvise(DONTNEED), then mincore"


@dataclass(frozen=True)
class Residency:
    """The share of some files' pages that is in the page cache. ``seen``: whether the kernel says
    so; of files that are another user's, and not ours to write, it says that all is there.
    """

    share: float
    seen: bool

    @property
    def is_warm(self) -> bool:
        return self.share >= _WARM

    @property
    def is_cold(self) -> bool:
        return self.seen and self.share <= _COLD

    @property
    def why_not_cold(self) -> str:
        if not self.seen:
            return "the files are another user's, of which the kernel does not say what is cached"
        return (
            f"{self.share:.0%} of the pages stayed in memory (tmpfs, or in use by another process)"
        )


def files_of(model: Path) -> list[Path]:
    """Those that a merge reads, of a model or an adapter: a downloaded folder may hold the weights
    a second time, as `consolidated.safetensors`.
    """
    return [model / WEIGHTS] if is_adapter(model) else list(Checkpoint.open(model).files)


def bytes_of(model: Path) -> int:
    return sum(path.stat().st_size for path in files_of(model))


def residency(paths: Iterable[Path]) -> Residency:
    """What mincore says of every page."""
    libc = ctypes.CDLL(None, use_errno=True)
    present = pages = 0
    seen = True
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        seen = seen and _tells(path)
        with open(path, "rb") as stream:
            mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        count = -(-size // mmap.PAGESIZE)
        flags = np.zeros(count, np.uint8)
        address, answer = (ctypes.c_void_p(x.ctypes.data) for x in (mapped, flags))
        if libc.mincore(address, ctypes.c_size_t(size), answer):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(path))
        present += int((flags & 1).sum())
        pages += count
    return Residency(present / max(pages, 1), seen)


def _tells(path: Path) -> bool:
    """Linux 5.2 and later answer the owner, and who may write the file."""
    return path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK)


def warm(models: Sequence[Path]) -> Residency:
    """Reads every weight file once; what was made a moment ago is written back first."""
    paths = [path for model in models for path in files_of(model)]
    for path in paths:
        with open(path, "rb", buffering=0) as stream:
            os.fdatasync(stream.fileno())
            while stream.read(1 << 22):
                pass
    return residency(paths)


def evict(paths: Sequence[Path]) -> Residency:
    """Asks the kernel to forget the files' pages, and looks whether it did. What lies below it (a
    disk's own cache, a host's) is not its to forget.
    """
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(file)  # pages not yet written would stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    return residency(paths)


def clear(outputs: Iterable[Path]) -> None:
    """Old outputs are gone, and with them what another program left to be written back: a removed
    file's pages are dropped. (What the floor and fastmerge wrote is on the disk.)
    """
    for path in outputs:
        # Leftovers: an interrupted merge would be continued.
        for old in (path, *path.parent.glob(f".{path.name}.*")):
            if old.is_dir():
                remove_tree(old)
            else:
                old.unlink(missing_ok=True)


def settle(inputs: Sequence[Path], outputs: Iterable[Path]) -> Residency:
    """`clear`, and the inputs in the page cache."""
    clear(outputs)
    return warm(inputs)
