"""Joining parts: every one against the plan, then one folder that is absent or whole.

Killed at any moment, it goes on where it was: the files are in their part's folder or in ``model``,
and before the last rename the run notes the new model's inode.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmerge.errors import OutputError, argument, some_of
from fastmerge.models.side_files import LINEAGE_FILE
from fastmerge.output.claim import Claim, Record, file_of, is_dead_here, records
from fastmerge.output.disk import remove_tree, sync_folder, write_files
from fastmerge.output.lineage import lineage_file
from fastmerge.output.parts import (
    FILES,
    FINISH,
    MODEL,
    PLAN,
    Manifest,
    file_fault,
    open_parts,
    part_name,
    read_manifest,
)
from fastmerge.output.place import check_place, check_target, explain, real_target
from fastmerge.output.publish import publish
from fastmerge.output.working import WorkingFolder, beside, inode

_COUNTS = ("parts", "files", "nbytes", "tensors")
_MOST_NAMED = 8  # parts that are missing, before a count


@dataclass(frozen=True)
class Joined:
    """What was joined. ``results``: what each tensor came to, in plain values."""

    target: Path
    parts: int
    files: int
    nbytes: int  # of the weight files
    tensors: int
    results: Mapping[str, Mapping[str, Any]]


def join(out: Path, *, overwrite: bool = False) -> Joined:
    """Joins the parts of ``out``. Raises OutputError where one is missing or not done, where
    another `join` is at work, and as `ModelWriter` does about the target.
    """
    target = real_target(out)
    check_place(target, ())
    folder = None
    try:
        folder = open_parts(target, make=False)
        return _Join(target, folder, overwrite).run()
    except OSError as error:
        if not os.path.lexists(beside(target, "parts")):  # another one was faster, or none was made
            state = "is there already, and no part lies" if target.exists() else "no part lies"
            raise OutputError(f"{target}: {state} beside it: nothing to finish") from None
        raise explain(folder.named(error) if folder else error, target) from error
    finally:
        if folder:
            folder.close()


class _Join:
    def __init__(self, target: Path, folder: WorkingFolder, overwrite: bool) -> None:
        self.target, self.folder, self.overwrite = target, folder, overwrite
        self.old = beside(target, "old")

    def run(self) -> Joined:
        if not records(self.folder, FINISH):
            self._check_begun()
        claim = Claim(self.folder, FINISH, f"{self.target}: finish")
        try:
            shown = self._shown(claim)
            if shown is not None:
                self._tidy(claim, shown)
                return shown
            self._give_back(claim)
            check_target(self.target, self.overwrite)
            manifest = read_manifest(self.folder)
            results, kept, folders = self._results(manifest)
            self._check_files(manifest, folders)
            model = self._gather(manifest, folders)
            try:
                self._write(manifest, model, results, kept)
                joined = Joined(
                    self.target,
                    manifest.parts,
                    len(manifest.shards),
                    sum(facts["bytes"] for facts in manifest.shards.values()),
                    manifest.tensors,
                    results,
                )
                _say_shown(claim, model.inode, joined)
                check_target(self.target, self.overwrite)
                path = self.folder.path / MODEL
                publish(model, path, self.target, self.old, lambda old: claim.say(aside=old))
            finally:
                model.close()
            self._tidy(claim, joined)
            return joined
        finally:
            claim.end()

    # --- after a kill ---

    def _shown(self, claim: Claim) -> Joined | None:
        """What an earlier run has joined and shown, where it was killed after that."""
        now = inode(self.target)
        for run in claim.previous:
            if now and run.facts.get("showing") == now:
                if inode(self.old) and inode(self.old) == run.facts.get("aside"):
                    remove_tree(self.old)
                return Joined(self.target, **_counts(run), results={})
        return None

    def _give_back(self, claim: Claim) -> None:
        """Gives the old model its name again, if an earlier run had moved it aside."""
        old = inode(self.old)
        if os.path.lexists(self.old):
            if not old or all(run.facts.get("aside") != old for run in claim.previous):
                raise OutputError(
                    f"{self.old}: not known to be the model that a merge moved aside; if it is, "
                    f"rename it to {self.target}, else remove it"
                )
            if not os.path.lexists(self.target):
                self.old.rename(self.target)

    def _tidy(self, claim: Claim, joined: Joined) -> None:
        """Removes the folder of the parts; at the very end what says that the model is shown."""
        _say_shown(claim, inode(self.target), joined)
        last = [file_of(FINISH, number) for number in range(1, claim.number + 1)]
        for entry in self.folder.inside.iterdir():
            if entry.name not in last:
                remove_tree(entry) if inode(entry) else entry.unlink()
        claim.end()  # an open file that is removed leaves one of NFS's own in the folder
        for name in last:
            (self.folder.inside / name).unlink(missing_ok=True)
        self.folder.remove()

    def _check_begun(self) -> None:
        """Raises OutputError where no part has begun: then nothing is claimed."""
        if self.target.exists() and not os.listdir(self.folder.inside):
            with suppress(OSError):  # not if a part is about to begin there
                self.folder.path.rmdir()  # all that a killed run left behind
            raise FileNotFoundError(self.folder.path)
        read_manifest(self.folder)

    # --- the parts ---

    def _results(
        self, manifest: Manifest
    ) -> tuple[dict[str, dict[str, Any]], dict[str, int], list[str]]:
        """What every tensor came to, what one threshold over all tensors keeps of each model, and
        the parts' folders; OutputError for parts that are missing.
        """
        folders: list[str] = []
        missing: list[str] = []
        results: dict[str, dict[str, Any]] = {}
        kept: dict[str, int] = {}
        files: dict[str, list[str]] = {}
        for file in os.listdir(self.folder.inside):
            files.setdefault(file.partition(".")[0], []).append(file)
        for number in range(1, manifest.parts + 1):
            name = part_name(number)
            runs = records(self.folder, name, files.get(name, ()))
            if not runs or "done" not in runs[-1].facts:
                missing.append(f"{number}/{manifest.parts} ({_state(runs)})")
                continue
            folders.append(f"{part_name(number)}.{runs[-1].number:04d}")
            results |= runs[-1].entries
            kept |= _numbers(runs[-1].facts.get("kept", {}), self.folder.path / folders[-1])
        if missing:
            raise OutputError(
                f"{self.target}: {len(missing)} of {manifest.parts} parts are missing: "
                f"{some_of(missing, _MOST_NAMED)}; run the same merge with "
                f"{argument('part')} for each"
            )
        if len(results) != manifest.tensors:
            raise OutputError(
                f"{self.folder.path}: its parts have {len(results)} tensors of {manifest.tensors}; "
                "it is damaged: remove it and run all parts again"
            )
        return results, kept, folders

    def _gather(self, manifest: Manifest, folders: list[str]) -> WorkingFolder:
        """Moves every part's files into one folder."""
        place = self.folder.inside / MODEL
        place.mkdir(mode=0o700, exist_ok=True)
        model = WorkingFolder(self.folder.path / MODEL, place)
        shards = list(manifest.shards)
        for folder, (begin, end) in zip(folders, manifest.shares, strict=True):
            own = self.folder.inside / folder
            for name in shards[begin:end]:
                if os.path.lexists(own / name):
                    (own / name).rename(model.inside / name)
        for entry in model.inside.iterdir():  # of a run that was killed
            if entry.name not in manifest.shards:
                remove_tree(entry) if inode(entry) else entry.unlink()
        return model

    def _check_files(self, manifest: Manifest, folders: list[str]) -> None:
        """Raises OutputError for a file that is not there, or not as it was planned."""
        shards = list(manifest.shards.items())
        begun = os.path.lexists(self.folder.inside / MODEL)
        mend = f"remove {self.folder.path} and run all parts" if begun else "run that part"
        for number, (folder, (begin, end)) in enumerate(zip(folders, manifest.shares, strict=True)):
            for name, facts in shards[begin:end]:
                moved = os.path.lexists(self.folder.inside / MODEL / name)
                file = f"{MODEL if moved else folder}/{name}"
                fault = file_fault(self.folder, file, facts)
                if fault:
                    raise OutputError(
                        f"{self.folder.path / file}: {fault}: somebody changed it after part "
                        f"{number + 1}/{manifest.parts} had written it; {mend} again"
                    )

    def _write(
        self,
        manifest: Manifest,
        model: WorkingFolder,
        results: Mapping[str, Mapping[str, Any]],
        kept: Mapping[str, int],
    ) -> None:
        """Adds what lies beside the weights."""
        files = {name: self.folder.inside / PLAN / FILES / name for name in manifest.files}
        for name in files:
            self.folder.check(f"{PLAN}/{FILES}/{name}")
        written = write_files(model.inside, files)
        for name, facts in manifest.files.items():
            if written[name] != facts:
                raise OutputError(
                    f"{self.folder.path / PLAN / FILES / name}: changed since the first part wrote "
                    f"it; remove {self.folder.path} and run all parts again"
                )
        names = (*manifest.files, LINEAGE_FILE, *manifest.shards)
        text = lineage_file(manifest.lineage, results, kept, names, {**manifest.shards, **written})
        write_files(model.inside, {LINEAGE_FILE: text})
        # Parts may have run with other umasks; who may read the one file may read all.
        mode = stat.S_IMODE((model.inside / LINEAGE_FILE).stat().st_mode)
        for name in manifest.shards:
            if stat.S_IMODE((model.inside / name).stat().st_mode) != mode:
                (model.inside / name).chmod(mode)
        sync_folder(self.folder.inside)


def _counts(run: Record) -> dict[str, int]:
    said = run.facts.get("counts")
    said = said if isinstance(said, dict) else {}
    return {name: said[name] if type(said.get(name)) is int else 0 for name in _COUNTS}


def _numbers(said: Any, where: Path) -> dict[str, int]:
    if not isinstance(said, dict) or not all(type(value) is int for value in said.values()):
        raise OutputError(f"{where}.run: is damaged; run that part again (fresh)")
    return said


def _say_shown(claim: Claim, folder: int, joined: Joined) -> None:
    counts = {name: getattr(joined, name) for name in _COUNTS}
    claim.say(showing=folder, counts=counts)


def _state(runs: list[Record]) -> str:
    if not runs:
        return "not begun"
    last = runs[-1]
    state = {True: "stopped", False: f"at work: {last.who}", None: f"last seen: {last.who}"}
    return f"{state[is_dead_here(last)]}, {len(last.entries)} tensors done"
