"""Writing: a model folder that is either absent or whole.

Everything goes into a hidden sibling of the target, ``.NAME.fastmerge-partial``, and takes the
target's name by one rename at the end. Beside it, ``.NAME.fastmerge-journal`` is the lock and lists
the tensors that are in the files for good: the same job, killed at any moment, goes on from there.
Both are private until then, and nobody else's are used.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fastmerge.errors import OutputError, argument
from fastmerge.models.folder import INDEX
from fastmerge.output.checksum import Written
from fastmerge.output.disk import remove_tree, write_files
from fastmerge.output.journal import Journal
from fastmerge.output.layout import Layout
from fastmerge.output.place import (
    check_place,
    check_space,
    check_target,
    explain,
    free_bytes,
    real_target,
)
from fastmerge.output.publish import publish
from fastmerge.output.shards import IO_THREADS, Shards, file_facts
from fastmerge.output.shipping import Destination, Shipping
from fastmerge.output.working import WorkingFolder, beside, inode

_LOOK_SECONDS = 0.02  # between two looks for files that are complete, while one waits for room


class ModelWriter(Shards):
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
    to: where weight files go one by one, and are here no more, if the disk has no room for all of
    them; ``sends`` says whether they do.

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
        io_threads: int = IO_THREADS,
        to: Destination | None = None,
    ) -> None:
        # A link is followed: what it points to is what is replaced.
        super().__init__(real_target(target), layout, range(len(layout.shards)))
        check_place(self.target, inputs)
        self.partial = beside(self.target, "partial")
        self._overwrite = overwrite
        self._side_bytes = side_bytes
        self._old = beside(self.target, "old")
        self._to = to
        self._shipping: Shipping | None = None
        self._unnoted: dict[int, int] = {}  # of files that are sent: tensors that are not in them
        self._whole: set[int] = set()  # files that are on the disk to their end
        self._finished = self._worthless = False
        self._folder: WorkingFolder | None = None
        in_parts = beside(self.target, "parts")
        if os.path.lexists(in_parts):
            raise OutputError(
                f"{in_parts}: the output is being merged in parts; end that with `fastmerge finish "
                f"{target}`, or remove the folder if nobody works on it"
            )
        self._journal = Journal(beside(self.target, "journal"), self.target)
        try:
            self._recover()
            check_target(self.target, overwrite)
            job = hashlib.sha256(f"{key}\n{layout.digest}".encode()).hexdigest()
            kept = self._reopen(job, fresh)
            sent = self._sent if kept else frozenset()
            if kept:
                kept = self._resume(self._inside, kept, io_threads, sent)
            if not kept:
                self._start(job)
                sent = frozenset()
            most = self._most_here(sent)
            self._open_files(
                self._inside, at_once=most is None,
                resume=bool(kept), io=io, staging_bytes=staging_bytes, io_threads=io_threads,
            )  # fmt: skip
            if most is not None:
                self._ship(sent, most)
        except BaseException as error:
            self._give_up()
            if isinstance(error, OSError):
                raise explain(self._named(error), self.target, io) from error
            raise

    # --- starting ---

    def _recover(self) -> None:
        """Tidies what a kill between the last renames left: one whole model, the new or the old."""
        ours, shown, old = self._journal.folder(), inode(self.target), inode(self._old)
        left = inode(self.partial)
        if shown and shown == ours and left:
            if left != self._journal.aside:
                raise OutputError(
                    f"{self.partial}: not known to be the model that a merge replaced; remove it "
                    "if nobody needs it"
                )
            remove_tree(self.partial)  # the old model, exchanged for the new one
        if os.path.lexists(self._old) and (not old or old != self._journal.aside):
            raise OutputError(
                f"{self._old}: not known to be the model that a merge moved aside; if it is, "
                f"rename it to {self.target}, else remove it"
            )
        if old and shown:
            remove_tree(self._old)
        elif old:
            self._old.rename(self.target)

    def _reopen(self, job: str, fresh: bool) -> dict[str, dict[str, Any]]:
        """The tensors of an earlier run of this job that are in the files, and their results."""
        if not os.path.lexists(self.partial):
            return {}
        self._folder = WorkingFolder(self.partial)
        if fresh:
            return {}
        kept = self._journal.read(self._folder.inode)
        if self._folder.loose or (kept and self._journal.loose):
            raise OutputError(
                f"{self.partial}: an unfinished merge that other users could write to "
                f"({len(kept)} tensors done), so that nothing in it is certain; start over with "
                f"{argument('fresh', True)}, which deletes all that is in it"
            )
        if not kept:
            return {}
        if self._journal.job != job:
            if self._journal.failed:  # by itself: whoever mends the recipe has nothing to save
                return {}
            raise OutputError(
                f"{self.partial}: an unfinished merge of other inputs or another recipe "
                f"({len(kept)} tensors done); run that one again to finish it, or start over with "
                f"{argument('fresh', True)}"
            )
        slots, whole = self.layout.slots, set(self._sent)
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

    def _start(self, job: str) -> None:
        if self._folder is not None:
            self._folder.close()
            self._folder.remove()
        if self._to is None:
            check_space(self.target.parent, self.layout.file_bytes + self._side_bytes)
        self._folder = WorkingFolder.make(self.partial)
        self._journal.begin(job, self._folder.inode)

    # --- where the disk has no room for all ---

    @property
    def sends(self) -> bool:
        """Whether weight files leave one by one: none is in the folder that is shown."""
        return self._shipping is not None

    @property
    def _sent(self) -> frozenset[int]:
        """The files that an earlier run has sent."""
        there = {} if self._to is None else self._to.sent()
        shards = enumerate(self.layout.shards)
        return frozenset(n for n, shard in shards if there.get(shard.name) == shard.size)

    def _most_here(self, sent: Collection[int]) -> int | None:
        """How many weight files the disk has room for at a time; None where it has for all. Raises
        ResourceError where it has for fewer than two.
        """
        if self._to is None:
            return None
        shards, parent = self.layout.shards, self.target.parent
        missing, here = self._side_bytes, 0
        for number, shard in enumerate(shards):
            there = (self._inside / shard.name).exists()
            here += there
            missing += 0 if there or number in sent else shard.size
        free = free_bytes(parent)
        if len(shards) == 1:  # which is what makes a model of the others: it is the last to go
            check_space(parent, missing)
        if len(shards) == 1 or (free >= missing and not sent):
            return None
        largest = max(shard.size for shard in shards)
        check_space(parent, min(missing, max(0, 2 - here) * largest + self._side_bytes))
        return max(2, here + (free - self._side_bytes) // largest)

    def _ship(self, sent: Collection[int], most: int) -> None:
        assert self._to is not None
        for number in sent:  # killed before it was removed
            (self._inside / self.layout.shards[number].name).unlink(missing_ok=True)
        left = self._own - set(sent)
        self._own = frozenset(left)
        self._unnoted = dict.fromkeys(left, 0)
        for slot in self.layout.slots.values():
            if slot.shard in left and slot.name not in self.resumed:
                self._unnoted[slot.shard] += 1
        self._shipping = Shipping(self._to, left, most)
        for number in sorted(left):
            if not self._unnoted[number]:  # all of it an earlier run's: it needs no room
                super()._begin(number)
                self._give(number)

    def _begin(self, shard: int) -> None:
        # The last tensors before may be on their way to the disk: nobody else looks for them now.
        while self._shipping is not None and not self._shipping.may(shard, _LOOK_SECONDS):
            self.mark()
        super()._begin(shard)

    def _give(self, number: int) -> None:
        def finish() -> Path:
            if number not in self._whole:
                self._files[number].finish()
            return self._inside / self.layout.shards[number].name

        assert self._shipping is not None
        self._shipping.give(number, finish)

    def _finish_files(self) -> None:
        if self._shipping is None:
            super()._finish_files()
            return
        for number in sorted(self._own):
            if not self._shipping.is_given(number):
                self._begin(number)
                self._files[number].finish()
                self._whole.add(number)
                self.mark()
        self._shipping.finish()
        if self._staging:
            self._staging.close()

    @property
    def scratch_folder(self) -> Path:
        """Where intermediates may lie."""
        return self.partial

    def _note(self, results: Mapping[str, dict[str, Any]]) -> None:
        self._journal.add(results)
        if self._shipping is None:
            return
        for number in (self.layout.slots[name].shard for name in results):
            self._unnoted[number] -= 1
            if not self._unnoted[number]:
                self._give(number)

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
            self._finish_files()
            self._sweep()
            extra = dict(side_files or {})
            if self.layout.index is not None:
                extra.pop(INDEX, None)
                extra[INDEX] = self.layout.index
            written = file_facts(self.layout.shards)
            written |= write_files(self._inside, extra)
            write_files(self._inside, last(written) if last else {})
            check_target(self.target, self._overwrite)
            assert self._folder is not None
            publish(self._folder, self.partial, self.target, self._old, self._journal.set_aside)
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
                remove_tree(entry) if inode(entry) else entry.unlink()

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
        if self._shipping is not None:
            self._shipping.stop()
        for file in self._files.values():
            file.abandon()
        # Of what was on its way 16 MiB are on the disk now, or a whole tensor of 64 MiB.
        with suppress(OSError):  # a full disk takes no more entries: those it has will do
            self.mark()
            if failed:
                self._journal.fail()
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
