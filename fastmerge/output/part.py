"""Writing a part: its share of a model's weight files, until `fastmerge finish` joins all parts.

Each run has a folder of its own, so that one that was taken for dead and is not cannot write into
the files of the run that took over. That moves what it can use into its own folder: all files of a
run that is over for certain; of one on another machine that only fell silent, those that it had
finished, which it never writes again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fastmerge.errors import OutputError, ResourceError, argument
from fastmerge.models.folder import INDEX
from fastmerge.output.claim import Claim, Record, is_dead, is_dead_here, records
from fastmerge.output.disk import facts_of, remove_tree, sync_folder
from fastmerge.output.layout import Layout
from fastmerge.output.parts import (
    FINISH,
    MODEL,
    Manifest,
    agree,
    file_fault,
    open_parts,
    part_name,
)
from fastmerge.output.place import (
    check_place,
    check_space,
    check_target,
    explain,
    free_bytes,
    real_target,
)
from fastmerge.output.shards import IO_THREADS, Shards, file_facts
from fastmerge.output.share import Part, shares
from fastmerge.output.shared import SharedFiles
from fastmerge.output.shipping import Destination
from fastmerge.output.working import WorkingFolder, beside
from fastmerge.version import __version__


class PartWriter(Shards):
    """Writes the weight files of one part; use it as a context manager.

    part: which one. costs: what each of the layout's files takes to make, in bytes read and
    written; all parts share by it. key: identifies recipe and settings; inputs_key: what is read.
    files: what `finish` is to write beside the weights; lineage: what is known of it already. to:
    where `finish` sends all parts, which lie here until then. The rest, and what is raised, as
    `ModelWriter`; also OutputError where this part is at work elsewhere, or where other parts were
    begun with another recipe, version or input. A part that is done is left as it is, unless
    ``fresh``.
    """

    def __init__(
        self,
        target: Path,
        layout: Layout,
        part: Part,
        *,
        costs: list[int],
        key: str,
        inputs_key: str,
        files: Mapping[str, bytes | Path],
        lineage: Mapping[str, Any],
        overwrite: bool = False,
        fresh: bool = False,
        io: str = "auto",
        inputs: Iterable[Path] = (),
        staging_bytes: int = 96 << 20,
        to: Destination | None = None,
    ) -> None:
        everyone = shares(costs, part.of)
        super().__init__(real_target(target), layout, everyone[part.number - 1])
        self._part = part
        check_place(self.target, inputs)
        check_target(self.target, overwrite)
        for what in ("partial", "journal"):
            if os.path.lexists(beside(self.target, what)):
                raise OutputError(
                    f"{beside(self.target, what)}: a merge without parts was begun there; run it "
                    "again to finish it, or remove it if nobody works on it"
                )
        if to is not None:
            self._check_room_for_all()
        self._claim: Claim | None = None
        self._run: Path | None = None  # the folder of this run, by its name in the open one
        self._worthless = False
        self.done = False
        try:
            self._folder = open_parts(self.target, make=True)
        except OSError as error:
            raise explain(error, self.target) from error
        try:
            extra = dict(files)
            if layout.index is not None:
                extra[INDEX] = layout.index
            manifest = self._manifest(everyone, key, inputs_key, extra, lineage)
            agree(self._folder, manifest, extra)
            self._name = part_name(part.number)
            if not fresh and self._is_done(manifest):
                return
            self._claim_part(fresh)
            self._open_files(
                self._own_folder, resume=True, io=io,
                staging_bytes=staging_bytes, io_threads=IO_THREADS,
            )  # fmt: skip
        except BaseException as error:
            self._give_up()
            if isinstance(error, OSError):
                raise explain(self._folder.named(error), self.target, io) from error
            raise

    # --- starting ---

    def _check_room_for_all(self) -> None:
        """Raises ResourceError where the parts that a store is to get cannot all lie here."""
        parent, parts = self.target.parent, beside(self.target, "parts")
        there = 0
        for file in parts.glob("*/*.safetensors"):
            with suppress(FileNotFoundError):  # another part moved it since
                there += file.stat().st_size
        missing, free = self.layout.file_bytes - there, free_bytes(parent)
        if free < missing:
            raise ResourceError(
                f"{parent}: no space left for all parts, which lie there until finish has sent "
                f"them: needs {missing / 1e9:.2f} GB, {free / 1e9:.2f} GB free; set TMPDIR to a "
                f"larger folder, or leave {argument('part')} out: a whole merge sends its weight "
                "files one by one"
            )

    def _manifest(
        self,
        everyone: list[range],
        key: str,
        inputs_key: str,
        files: Mapping[str, bytes | Path],
        lineage: Mapping[str, Any],
    ) -> Manifest:
        known = {name: facts_of(content) for name, content in files.items()}
        side = json.dumps(sorted(known.items())).encode()
        return Manifest(
            version=__version__,
            parts=self._part.of,
            inputs=inputs_key,
            recipe=hashlib.sha256(f"{key}\n{self.layout.digest}".encode()).hexdigest(),
            side=hashlib.sha256(side).hexdigest(),
            tensors=len(self.layout.slots),
            shares=[[share.start, share.stop] for share in everyone],
            shards=file_facts(self.layout.shards),
            files=known,
            lineage=dict(lineage),
        )

    @property
    def _own_folder(self) -> Path:
        assert self._run is not None
        return self._run

    def _is_done(self, manifest: Manifest) -> bool:
        """Whether an earlier run finished the part, and its files are there; then its results are
        this one's.
        """
        runs = records(self._folder, self._name)
        if runs and "done" in runs[-1].facts:
            there = self._run_folder(runs[-1]).name
            # `finish` moves files, and looks at them itself.
            self.done = os.path.lexists(self._folder.inside / MODEL) or not any(
                file_fault(self._folder, f"{there}/{shard.name}", manifest.shards[shard.name])
                for shard in self.shards
            )
        if self.done:
            self.results = {n: r for n, r in runs[-1].entries.items() if self.is_own(n)}
            self.resumed = frozenset(self.results)
        return self.done

    def _claim_part(self, fresh: bool) -> None:
        """Claims the part and takes over what earlier runs left of it."""
        what = f"{self.target}: part {self._part}"
        self._check_open(what)
        self._claim = claim = Claim(self._folder, self._name, what)
        # Both claim before they look: of a part and a finish at once, one sees the other.
        self._check_open(what)
        self._run = self._folder.inside / f"{self._name}.{claim.number:04d}"
        self._run.mkdir(mode=0o700)
        if not fresh:
            kept = self._taken_over(claim)
            kept = self._resume(self._run, kept, IO_THREADS)
            claim.add(kept)
        for earlier in claim.previous:
            remove_tree(self._run_folder(earlier), ignore_errors=True)
        there = sum(path.stat().st_size for path in self._run.iterdir())
        check_space(self.target.parent, sum(shard.size for shard in self.shards) - there)

    def _check_open(self, what: str) -> None:
        """Raises OutputError where the parts are being joined."""
        finishes = records(self._folder, FINISH)
        if finishes and is_dead(self._folder, FINISH, finishes[-1]) is False:
            raise OutputError(f"{what}: the parts are being finished ({finishes[-1].who})")
        if os.path.lexists(self._folder.inside / MODEL):
            raise OutputError(
                f"{what}: `fastmerge finish` has begun to join the parts; run that again"
            )

    def _run_folder(self, run: Record) -> Path:
        return self._folder.inside / f"{self._name}.{run.number:04d}"

    def _taken_over(self, claim: Claim) -> dict[str, dict[str, Any]]:
        """Moves earlier runs' files into this one's folder; the tensors that should be in them."""
        kept: dict[str, dict[str, Any]] = {}
        for run in claim.previous:
            kept |= run.entries
        by_shard: dict[int, list[str]] = {number: [] for number in self._own}
        for slot in self.layout.slots.values():
            if slot.shard in by_shard:
                by_shard[slot.shard].append(slot.name)
        moved: set[int] = set()
        for run in reversed(claim.previous):
            certain = is_dead_here(run) is True
            for number, names in by_shard.items():
                shard = self.layout.shards[number]
                there = self._run_folder(run) / shard.name
                if number in moved or not os.path.lexists(there):
                    continue
                if certain or all(name in run.entries for name in names):
                    found = WorkingFolder(
                        self._folder.path / self._run_folder(run).name, self._run_folder(run)
                    )
                    try:
                        found.check(shard.name)
                    finally:
                        found.close()
                    if there.stat().st_size >= shard.size:
                        there.rename(self._own_folder / shard.name)
                        moved.add(number)
        return {
            name: kept[name]
            for number in moved
            for name in by_shard[number]
            if "checksum" in kept.get(name, {})
        }

    # --- working ---

    @property
    def scratch_folder(self) -> Path:
        """Where intermediates may lie."""
        return self._folder.path / self._own_folder.name if self._run else self._folder.path

    @property
    def works(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._own) and not self.done

    @property
    def shared(self) -> SharedFiles | None:
        """Where parts leave what others need not compute again."""
        if self._claim is None:
            return None
        return SharedFiles(self._folder, self._part.number, self._part.of, self._claim)

    def _note(self, results: Mapping[str, dict[str, Any]]) -> None:
        assert self._claim is not None
        self._claim.add(results)

    def finish(self, **facts: Any) -> None:
        """Waits until the part's files are on the disk, and says so, with what else `fastmerge
        finish` shall know.
        """
        if self.done:
            return
        assert self._claim is not None
        try:
            self._finish_files()
            sync_folder(self._own_folder)
            self._claim.check()
            self._claim.say(**facts, done=True)
            self.done = True
        except OSError as error:
            raise explain(self._folder.named(error), self.target) from error

    def discard(self) -> None:
        """Leaves nothing for a later run to continue, unless this one is finished."""
        self._worthless = True

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_up()
        if isinstance(error, OSError):
            named = self._folder.named(error)
            if str(named.filename).startswith(str(self._folder.path)):
                raise explain(named, self.target) from error

    def _give_up(self) -> None:
        """Stops; what is there is for a later run."""
        if self._claim is not None:
            for file in self._files.values():
                file.abandon()
            # A full disk takes no more entries, nor does who lost the part: those it has will do.
            with suppress(OSError, OutputError):
                self.mark()
            if self._worthless and not self.done and self._run is not None:
                remove_tree(self._run, ignore_errors=True)
            self._claim.end()
        self._folder.close()
