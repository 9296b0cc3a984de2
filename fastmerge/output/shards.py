"""The weight files of a layout, or some of them: filled out of order, in bounded memory."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastmerge import _C
from fastmerge.errors import ResourceError
from fastmerge.output.checksum import checksum_of, checksums_in_file
from fastmerge.output.layout import Layout, Shard, Slot

_MIN_CHUNK_BYTES = 4096  # what direct I/O needs on every common disk
_MAX_CHUNK_BYTES = 4 << 20  # large enough for a disk's full speed, small enough to hold many
# They wait for the disk and compute nothing. Writing 2 GB on one busy disk: 0.9 GB/s with one
# thread, 1.2 with two, 1.4 with four.
IO_THREADS = 4


class Shards(ABC):
    """Takes tensors to the files ``numbers`` of ``layout``; who derives from it has the place, and
    keeps note of what is done.
    """

    def __init__(self, target: Path, layout: Layout, numbers: Iterable[int]) -> None:
        self.target = target
        self.layout = layout
        self._own = frozenset(numbers)
        self.resumed: frozenset[str] = frozenset()  # tensors that an earlier run had finished
        self.results: dict[str, dict[str, Any]] = {}
        self.damaged: tuple[str, ...] = ()
        self._files: dict[int, _C.StagedFile] = {}  # by number of the shard
        self._make: Callable[[int], _C.StagedFile] | None = None
        self._staging: _C.Staging | None = None
        self._begun: set[int] = set()
        self._open: deque[Slot] = deque()
        self._sums: dict[str, _C.Checksum] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def _note(self, results: Mapping[str, dict[str, Any]]) -> None:
        """Keeps note of tensors that are in their files for good; one thread at a time."""

    def is_own(self, name: str) -> bool:
        """Whether the tensor goes to one of these files."""
        slot = self.layout.slots.get(name)
        return slot is not None and slot.shard in self._own

    def _resume(
        self,
        folder: Path,
        kept: Mapping[str, dict[str, Any]],
        threads: int,
        elsewhere: Collection[int] = (),
    ) -> dict[str, dict[str, Any]]:
        """Those of ``kept`` whose bytes in the files in ``folder`` are still the ones that were
        written, or whose file is one of those ``elsewhere``; from now on ``resumed`` and in
        ``results``. Reads what is here, at the disk's speed; ``damaged`` names the others, which
        are made anew.
        """
        slots = self.layout.slots
        found = {name: kept[name] for name in kept if slots[name].shard in elsewhere}
        if len(found) < len(kept):
            try:
                pool = _C.Pool(threads)
            except RuntimeError as error:
                raise self._no_threads(threads, error) from error
            places: dict[str, dict[str, tuple[int, int]]] = {}  # by shard
            for slot in (slots[name] for name in kept if name not in found):
                own = places.setdefault(self.layout.shards[slot.shard].name, {})
                own[slot.name] = (slot.begin, slot.nbytes)
            for shard, own in places.items():
                for name, checksum in checksums_in_file(pool, folder / shard, own):
                    if checksum is not None and checksum == kept[name]["checksum"]:
                        found[name] = kept[name]
        self.damaged = tuple(name for name in kept if name not in found)
        self.resumed, self.results = frozenset(found), dict(found)
        return found

    def _open_files(
        self,
        folder: Path,
        *,
        resume: bool,
        io: str,
        staging_bytes: int,
        io_threads: int,
        at_once: bool = True,
    ) -> None:
        """Makes the files in ``folder`` and reserves their space; with ``resume``, takes those that
        are there and keeps the bytes of what is ``resumed``. Where that is not ``at_once``, each
        with its first tensor.
        """
        chunk = _MAX_CHUNK_BYTES
        while chunk > _MIN_CHUNK_BYTES and chunk * 24 > staging_bytes:
            chunk //= 2
        try:
            staging = _C.Staging(chunk, max(24, staging_bytes // chunk), io_threads)
        except RuntimeError as error:
            raise self._no_threads(io_threads, error) from error
        self._staging = staging
        kept: dict[int, list[Slot]] = {}
        for name in self.resumed:
            kept.setdefault(self.layout.slots[name].shard, []).append(self.layout.slots[name])

        shards = self.layout.shards

        # Of itself it knows nothing: a circle would keep the staging memory, of each merge, until
        # Python looks for circles.
        def made(number: int) -> _C.StagedFile:
            shard = shards[number]
            path = folder / shard.name
            file = _C.StagedFile(
                staging, str(path), shard.size, io=io, resume=resume and path.exists()
            )
            for slot in kept.get(number, ()):
                file.keep(slot.begin, slot.nbytes)
            return file

        self._make = made
        if at_once:
            self._files |= {number: made(number) for number in sorted(self._own)}

    def _no_threads(self, threads: int, error: RuntimeError) -> ResourceError:
        return ResourceError(
            f"{self.target}: the system refuses {threads} threads to write it ({error})"
        )

    # --- working ---

    @property
    def shards(self) -> list[Shard]:
        """The files that are written here, in order."""
        return [self.layout.shards[number] for number in sorted(self._own)]

    @property
    def direct(self) -> bool:
        """Whether the output bypasses the page cache."""
        return all(file.direct for file in self._files.values())

    @property
    def bytes_written(self) -> int:
        return self._staging.bytes_written if self._staging else 0

    def pending(self) -> list[str]:
        """The tensors still to be written, in file order."""
        slots = self.layout.slots.values()
        return [s.name for s in slots if s.shard in self._own and s.name not in self.resumed]

    def wants(self, name: str) -> bool:
        """Whether the tensor is still to be written here."""
        return name not in self.resumed and self.is_own(name)

    def sink(self, name: str) -> _C.Sink:
        """Where the tensor goes, once; as ``RAW`` bytes if its type has no kernels."""
        slot, sums = self._take(name)
        if slot.dtype.kernels:
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
                self._note({name: self.results[name] for name in done})
        return len(done)

    def _begin(self, shard: int) -> None:
        """Writes the shard's header; with its first tensor, as it holds a buffer from then on."""
        with self._lock:
            if shard in self._begun:
                return
            if shard not in self._files:
                assert self._make is not None
                self._files[shard] = self._make(shard)
            self._begun.add(shard)
        self._files[shard].write(0, self.layout.shards[shard].header)

    def _finish_files(self) -> None:
        """Waits until all of them are on the disk (fsync)."""
        for number in sorted(self._own):
            self._begin(number)
        for file in self._files.values():
            file.finish()
            self.mark()
        if self._staging:
            self._staging.close()


def file_facts(shards: Iterable[Shard]) -> dict[str, dict[str, Any]]:
    """What `fastmerge verify` compares weight files with, by name."""
    return {
        shard.name: {
            "bytes": shard.size,
            "header_sha256": hashlib.sha256(shard.header[8:]).hexdigest(),
        }
        for shard in shards
    }
