"""What one part has found out for all of them: small files in the folder where they meet.

Work that all parts need is cut in pieces, one for each part. A part counts its own, takes what the
others leave, and counts the pieces of those that are not at work: so parts that run one after
another make every pass once, and those that run together each a share of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable

from fastmerge.errors import OutputError
from fastmerge.output import claim
from fastmerge.output.claim import Claim, Record, file_of, is_dead_here, records
from fastmerge.output.parts import part_name
from fastmerge.output.working import WorkingFolder

_PREFIX = "shared-"
_LOOK_SECONDS = 0.1
_DIGEST_BYTES = 32  # sha256, before the data: a bit that flips would be another threshold


class SharedFiles:
    """Files by name, each whole or not there; ``number`` is this part's, of ``pieces``."""

    def __init__(self, folder: WorkingFolder, number: int, pieces: int, own: Claim) -> None:
        self.pieces = pieces
        self._folder, self._number, self._claim = folder, number, own
        self._watched = _Watched(folder)

    def get(self, name: str) -> bytes | None:
        """What a part has put there; None where none has yet."""
        file = _PREFIX + name
        if not os.path.lexists(self._folder.inside / file):
            return None
        self._folder.check(file)
        found = (self._folder.inside / file).read_bytes()
        digest, data = found[:_DIGEST_BYTES], found[_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            raise OutputError(
                f"{self._folder.path / file}: is damaged: not what a part wrote; remove it and run "
                "again"
            )
        return data

    def put(self, name: str, data: bytes) -> None:
        """Equal from every part that does."""
        descriptor, own = tempfile.mkstemp(prefix="new-", dir=self._folder.inside)
        with open(descriptor, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(own, self._folder.inside / (_PREFIX + name))

    def each(self, name: str, pieces: int, count: Callable[[int], bytes]) -> list[bytes]:
        """Every piece's result, in order: this part's first, then the others' from its own on."""
        found: dict[int, bytes] = {}
        first = self._number - 1
        for piece in [(first + step) % pieces for step in range(pieces)]:
            found[piece] = self._piece(f"{name}-{piece:05d}", piece, count)
        return [found[piece] for piece in range(pieces)]

    def _piece(self, name: str, piece: int, count: Callable[[int], bytes]) -> bytes:
        while True:
            known = self.get(name)
            if known is not None:
                return known
            self._claim.check()
            if not self._watched.at_work(self._counter_of(name, piece)):
                made = count(piece)
                self.put(name, made)
                return made
            time.sleep(_LOOK_SECONDS)

    def _counter_of(self, name: str, piece: int) -> tuple[str, Record] | None:
        """The run that counts the piece, this one not: its part's, or the one that took it on."""
        if piece == self._number - 1:
            return None
        runs = records(self._folder, part_name(piece + 1))
        if runs and is_dead_here(runs[-1]) is not True:
            return part_name(piece + 1), runs[-1]
        taken = self._folder.inside / f"taken-{name}"
        own = file_of(part_name(self._number), self._claim.number)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(taken, flags, 0o600)
        except FileExistsError:
            self._folder.check(taken.name)
            told = re.fullmatch(r"(part-\d{5})\.(\d+)\.run", taken.read_text(errors="replace"))
            runs = records(self._folder, told[1]) if told else []
            other = next((run for run in runs if told and run.number == int(told[2])), None)
            if told is None or other is None or is_dead_here(other) is True:
                return None
            return told[1], other
        with open(descriptor, "w") as file:
            file.write(own)
        return None


class _Watched:
    """Whether runs show signs of life, while one waits for them."""

    def __init__(self, folder: WorkingFolder) -> None:
        self._folder = folder
        self._seen: dict[str, tuple[int, float]] = {}  # by file: its size, and when it had it

    def at_work(self, run: tuple[str, Record] | None) -> bool:
        if run is None:
            return False
        name, record = run
        if is_dead_here(record) is False:
            return True
        file = file_of(name, record.number)
        size, now = claim.size_of(self._folder.inside / file), time.monotonic()
        then, since = self._seen.get(file, (-1, now))
        if size != then:
            self._seen[file] = (size, now)
            return True
        return now - since < claim.WATCH_SECONDS
