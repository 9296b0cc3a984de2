"""Writing: a model folder that is either absent or whole.

Everything goes into a hidden sibling of the target, ``.NAME.fastmerge-partial``, and takes the
target's name by one rename at the end. Beside it, ``.NAME.fastmerge-journal`` is the lock and lists
the tensors that are in the files for good: the same job, killed at any moment, goes on from there.
Both are private until then, and nobody else's are used.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fastmerge import _C
from fastmerge.errors import ModelError, OutputError, ResourceError
from fastmerge.limits import MAX_FILE_BYTES
from fastmerge.models.folder import INDEX
from fastmerge.models.header import open_regular
from fastmerge.output.checksum import Written, checksum_of, checksums_in_file
from fastmerge.output.journal import Journal
from fastmerge.output.layout import Layout, Slot
from fastmerge.output.place import check_place, check_space, check_target, explain, real_target
from fastmerge.output.working import WorkingFolder, inode

_MIN_CHUNK_BYTES = 4096  # what direct I/O needs on every common disk
_MAX_CHUNK_BYTES = 4 << 20  # large enough for a disk's full speed, small enough to hold many
# They wait for the disk and compute nothing. Writing 2 GB on one busy disk: 0.9 GB/s with one
# thread, 1.2 with two, 1.4 with four.
_IO_THREADS = 4
_COPIED_BYTES = 1 << 20
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100


class ModelWriter:
    """Writes one model folder; use it as a context manager.

    key: identifies the job (recipe, inputs, version); the layout is added to it here. An unfinished
    folder of the same job is continued; of another one it is refused if that was killed or
    interrupted, replaced if it failed; fresh=True discards any.
    overwrite: replace a model at ``target``, by an exchange of names when the new one is whole.
    inputs: the folders and files read from, which the target must not touch.
    side_bytes: what `finish` will be given beside the weights, for the check of the disk's space.
    io: "auto" (direct where the file system has it), "direct" or "buffered".
    staging_bytes: memory for output on its way to the disk, in 24 buffers or more of at most 4 MiB:
    enough for a window of 11 tensors in flight (csrc/io/staging.h says why).

    Raises FastmergeError, before the first byte of the output, for every refusal: target exists, or
    is one of the inputs; another merge at work; another job's unfinished folder; no space; no
    permission. Leaving the ``with`` block early keeps the unfinished folder if any tensor in it is
    worth keeping; an OSError on the way out, from a write, becomes a FastmergeError.
    """

    def __init__(
        self,
        target: Path,
        layout: Layout,
        *,
        key: str,
        overwrite: bool = False,
        fresh: bool = False,
        io: str = "auto",
        inputs: Iterable[Path] = (),
        side_bytes: int = 0,
        staging_bytes: int = 96 << 20,
        io_threads: int = _IO_THREADS,
    ) -> None:
        # A link is followed: what it points to is what is replaced.
        self.target = real_target(target)
        self.layout = layout
        check_place(self.target, inputs)
        self.partial = self.target.with_name(f".{self.target.name}.fastmerge-partial")
        self._overwrite = overwrite
        self._side_bytes = side_bytes
        self._old = self.target.with_name(f".{self.target.name}.fastmerge-old")
        self._files: list[_C.StagedFile] = []
        self._begun: set[int] = set()
        self._open: deque[Slot] = deque()
        self._sums: dict[str, _C.Checksum] = {}
        self._lock = threading.Lock()
        self._finished = self._worthless = False
        self._folder: WorkingFolder | None = None
        journal_path = self.target.with_name(f".{self.target.name}.fastmerge-journal")
        self._journal = Journal(journal_path, self.target)
        try:
            self._recover()
            check_target(self.target, overwrite)
            job = hashlib.sha256(f"{key}\n{layout.digest}".encode()).hexdigest()
            kept = self._reopen(job, fresh)
            kept = self._verified(kept, io_threads)
            self.resumed = frozenset(kept)
            self.results: dict[str, dict[str, Any]] = dict(kept)
            self._staging = self._start(job, kept, io, staging_bytes, io_threads)
        except BaseException as error:
            self._give_up()
            if isinstance(error, OSError):
                raise explain(self._named(error), self.target, io) from error
            raise

    # --- starting ---

    def _recover(self) -> None:
        """Tidies what a kill between the last renames left: one whole model, the new or the old."""
        ours, shown, old = self._journal.folder(), inode(self.target), inode(self._old)
        if shown and shown == ours and inode(self.partial):
            shutil.rmtree(self.partial)  # the old model, exchanged for the new one
        if os.path.lexists(self._old) and (not old or old != self._journal.aside):
            raise OutputError(
                f"{self._old}: not known to be the model that a merge moved aside; if it is, "
                f"rename it to {self.target}, else remove it"
            )
        if old and shown:
            shutil.rmtree(self._old)
        elif old:
            self._old.rename(self.target)

    def _reopen(self, job: str, fresh: bool) -> dict[str, dict[str, Any]]:
        """The tensors of an earlier run of this job that are in the files, and their results."""
        if not os.path.lexists(self.partial):
            return {}
        self._folder = WorkingFolder(self.partial)
        kept = {} if fresh else self._journal.read(self._folder.inode)
        if not kept:
            return {}
        if self._journal.job != job:
            if self._journal.failed:  # by itself: whoever mends the recipe has nothing to save
                return {}
            raise OutputError(
                f"{self.partial}: an unfinished merge of other inputs or another recipe "
                f"({len(kept)} tensors done); run that one again to finish it, or start over with "
                f"--fresh"
            )
        if self._folder.loose or self._journal.loose:
            raise OutputError(
                f"{self.partial}: an unfinished merge that other users could write to "
                f"({len(kept)} tensors done), so that nothing in it is certain; start over with "
                "--fresh"
            )
        slots, whole = self.layout.slots, set()
        for number, shard in enumerate(self.layout.shards):
            path = self._folder.inside / shard.name
            if os.path.lexists(path):
                self._folder.check(shard.name)
                if path.stat().st_size >= shard.size:
                    whole.add(number)
        return {
            name: result
            for name, result in kept.items()
            if name in slots and slots[name].shard in whole and "checksum" in result
        }

    def _verified(
        self, kept: Mapping[str, dict[str, Any]], threads: int
    ) -> dict[str, dict[str, Any]]:
        """Those of ``kept`` whose bytes in the files are still the ones that were written. Reads
        them all, at the disk's speed; ``damaged`` names the others, which are made anew.
        """
        found: dict[str, dict[str, Any]] = {}
        if kept and self._folder is not None:
            try:
                pool = _C.Pool(threads)
            except RuntimeError as error:
                raise _no_threads(self.target, threads, error) from error
            places: dict[str, dict[str, tuple[int, int]]] = {}  # by shard
            for slot in map(self.layout.slots.__getitem__, kept):
                own = places.setdefault(self.layout.shards[slot.shard].name, {})
                own[slot.name] = (slot.begin, slot.nbytes)
            for shard, own in places.items():
                for name, checksum in checksums_in_file(pool, self._folder.inside / shard, own):
                    if checksum is not None and checksum == kept[name]["checksum"]:
                        found[name] = kept[name]
        self.damaged = tuple(name for name in kept if name not in found)
        return found

    def _start(
        self, job: str, kept: Iterable[str], io: str, staging_bytes: int, io_threads: int
    ) -> _C.Staging:
        folder = self._folder
        if not kept or folder is None:
            if folder is not None:
                folder.close()
                folder.remove()
            check_space(self.target.parent, self.layout.file_bytes + self._side_bytes)
            folder = self._folder = WorkingFolder.make(self.partial)
            self._journal.begin(job, folder.inode)
        chunk = _MAX_CHUNK_BYTES
        while chunk > _MIN_CHUNK_BYTES and chunk * 24 > staging_bytes:
            chunk //= 2
        try:
            staging = _C.Staging(chunk, max(24, staging_bytes // chunk), io_threads)
        except RuntimeError as error:
            raise _no_threads(self.target, io_threads, error) from error
        for shard in self.layout.shards:
            path = folder.inside / shard.name
            resume = bool(kept) and path.exists()
            file = _C.StagedFile(staging, str(path), shard.size, io=io, resume=resume)
            self._files.append(file)
        for name in kept:
            slot = self.layout.slots[name]
            self._files[slot.shard].keep(slot.begin, slot.nbytes)
        return staging

    # --- working ---

    @property
    def direct(self) -> bool:
        """Whether the output bypasses the page cache."""
        return all(file.direct for file in self._files)

    @property
    def bytes_written(self) -> int:
        return self._staging.bytes_written

    def pending(self) -> list[str]:
        """The tensors still to be written, in file order."""
        return [name for name in self.layout.slots if name not in self.resumed]

    def sink(self, name: str) -> _C.Sink:
        """Where the tensor goes, once; as ``RAW`` bytes if its type has no kernels."""
        slot, sums = self._take(name)
        if slot.dtype.mergeable:
            count, code = slot.count, slot.dtype.code
        else:
            count, code = slot.nbytes, "RAW"
        return self._files[slot.shard].sink(slot.begin, count, code, checksum=sums)

    def parts(self, name: str) -> Callable[[int, int], _C.Sink]:
        """The tensor by its parts, instead of ``sink``: a function of (first byte, bytes) that
        gives a ``RAW`` sink; every byte once, in order or nearly.
        """
        slot, sums = self._take(name)
        file = self._files[slot.shard]
        return lambda begin, nbytes: file.sink(
            slot.begin + begin, nbytes, "RAW", checksum=sums, first=begin
        )

    def _take(self, name: str) -> tuple[Slot, _C.Checksum]:
        slot = self.layout.slots[name]
        self._begin(slot.shard)
        with self._lock:
            self._open.append(slot)
        sums = self._sums[name] = _C.Checksum(slot.nbytes)
        return slot, sums

    def computed(self, name: str, result: dict[str, Any]) -> None:
        """The tensor's sink is filled. ``result``, of JSON types, is in ``results`` from then on,
        with the tensor's ``checksum``, in a run that continues this one too.
        """
        result = {**result, "checksum": checksum_of(self._sums.pop(name))}
        with self._lock:
            self.results[name] = result
        self.mark()

    def mark(self) -> int:
        """Journals the tensors that are in their files by now; returns how many. Cheap."""
        done: list[str] = []
        with self._lock:
            # Only the head is asked: tensors finish nearly in order, and asking all of a large
            # window of small ones after each would take longer than merging them.
            while self._open:
                slot = self._open[0]
                written = self._files[slot.shard].done(slot.begin, slot.nbytes)
                if not written or slot.name not in self.results:
                    break
                done.append(self._open.popleft().name)
            if done:
                self._journal.add({name: self.results[name] for name in done})
        return len(done)

    def _begin(self, shard: int) -> None:
        """Writes the shard's header; with its first tensor, as it holds a buffer from then on."""
        with self._lock:
            if shard in self._begun:
                return
            self._begun.add(shard)
        self._files[shard].write(0, self.layout.shards[shard].header)

    # --- ending ---

    def finish(
        self,
        side_files: Mapping[str, bytes | Path] | None = None,
        last: Callable[[Written], Mapping[str, bytes]] | None = None,
    ) -> None:
        """Waits for the weights, adds ``side_files`` (by name, with ``/`` between folders: content
        or a file) and what ``last`` makes of all that was written, shows the folder.

        Everything is on the disk (fsync) before the target's name points to it.
        """
        try:
            for number in range(len(self._files)):
                self._begin(number)
            for file in self._files:
                file.finish()
                self.mark()
            self._staging.close()
            self._sweep()
            extra = dict(side_files or {})
            if self.layout.index is not None:
                extra.pop(INDEX, None)
                extra[INDEX] = self.layout.index
            inside = self._inside
            folders = {inside}
            written: Written = {
                shard.name: {
                    "bytes": shard.size,
                    "header_sha256": hashlib.sha256(shard.header[8:]).hexdigest(),
                }
                for shard in self.layout.shards
            }
            for name, content in extra.items():
                place = inside / name
                place.parent.mkdir(parents=True, exist_ok=True)
                folders |= {f for f in place.parents if f.is_relative_to(inside)}
                written[name] = _write_file(place, content)
            for name, text in (last(written) if last else {}).items():
                _write_file(inside / name, text)
            for folder in folders:
                _sync(folder)
            check_target(self.target, self._overwrite)
            self._publish()
            self._finished = True
            self._close_folder()
            self._journal.close(remove=True)
        except OSError as error:
            raise explain(self._named(error), self.target) from error

    def discard(self) -> None:
        """Leaves nothing for a later run to continue, unless this one is finished."""
        self._worthless = True

    def _sweep(self) -> None:
        """Removes what is no shard: scratch, and a killed run's scratch and side files."""
        shards = {shard.name for shard in self.layout.shards}
        for entry in self._inside.iterdir():
            if entry.name not in shards:
                shutil.rmtree(entry) if inode(entry) else entry.unlink()

    def _publish(self) -> None:
        assert self._folder is not None
        self._folder.share()
        old = inode(self.target)
        if not self.target.exists() or not any(self.target.iterdir()):
            self.partial.rename(self.target)  # replaces an empty folder
        elif _exchange(self.partial, self.target):
            _sync(self.target.parent)
            self._check_shown()
            if inode(self.partial) == old:
                shutil.rmtree(self.partial)  # the old model
        else:
            self._journal.set_aside(old)
            try:
                self.target.rename(self._old)
                self.partial.rename(self.target)
            except BaseException:
                with suppress(OSError):  # else the next run does it
                    if inode(self._old) == old and not os.path.lexists(self.target):
                        self._old.rename(self.target)
                raise
            _sync(self.target.parent)
            self._check_shown()
            if inode(self._old) == old:
                shutil.rmtree(self._old)
        _sync(self.target.parent)
        self._check_shown()

    def _check_shown(self) -> None:
        assert self._folder is not None
        if inode(self.target) != self._folder.inode:
            raise OutputError(
                f"{self.target}: somebody exchanged the folder while it was written; what is there "
                "now is not the merge; choose an output where nobody else may write"
            )

    @property
    def _inside(self) -> Path:
        assert self._folder is not None
        return self._folder.inside

    def _named(self, error: OSError) -> OSError:
        return self._folder.named(error) if self._folder else error

    def _close_folder(self) -> None:
        if self._folder is not None:
            self._folder.close()

    def __enter__(self) -> ModelWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._finished:
            return
        self._give_up(failed=isinstance(error, Exception))
        own = (str(self.partial), str(self._journal.path))
        if isinstance(error, OSError):
            named = self._named(error)
            if str(named.filename).startswith(own):
                raise explain(named, self.target) from error

    def _give_up(self, *, failed: bool = False) -> None:
        """Stops; keeps what a later run can continue from, else leaves nothing."""
        with suppress(OSError):  # a full disk takes no more entries: those it has will do
            self.mark()
            if failed:
                self._journal.fail()
        for file in self._files:
            file.abandon()
        worthless = self._worthless or (self._journal.begun and not self._journal.entries)
        if worthless and self._folder is not None:
            with suppress(OSError):
                self._folder.remove()
        # A disk that fails goes on failing: what is told is the first of its errors.
        with suppress(OSError):
            self._close_folder()
        told = True
        with suppress(OSError):
            left = os.path.lexists(self.partial) or os.path.lexists(self._old)
            told = left and bool(self._journal.folder())
        with suppress(OSError):
            self._journal.close(remove=not told)


# --- system calls ---


def _no_threads(target: Path, threads: int, error: RuntimeError) -> ResourceError:
    return ResourceError(f"{target}: the system refuses {threads} threads to write it ({error})")


def _write_file(path: Path, content: bytes | Path) -> dict[str, Any]:
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


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
