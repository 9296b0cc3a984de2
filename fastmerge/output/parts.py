"""The folder in which the parts of a merge meet: what all of them must agree on.

``.NAME.fastmerge-parts`` lies beside the target, with mode 0700, and holds

    plan/               what all parts agree on (manifest.json) and what lies beside the weights
    part-00002.0001.run a run of a part: who it is, the tensors it has finished (`output.claim`)
    part-00002.0001/    its weight files
    model/              the finished files, when `fastmerge finish` joins them
    finish.0001.run     a run of that
    shared-..., taken-...  what one part has found out for all, and who does (`output.shared`)

The first part makes ``plan``, by one rename; every other compares itself with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastmerge.errors import ModelError, OutputError
from fastmerge.limits import MAX_HEADER_BYTES, MAX_MANIFEST_BYTES, MAX_OFFSET
from fastmerge.models.header import read_object
from fastmerge.output.disk import remove_tree, sync_folder, write_files
from fastmerge.output.names import take_name
from fastmerge.output.working import WorkingFolder, beside

PLAN, FILES, MANIFEST, MODEL, FINISH = "plan", "files", "manifest.json", "model", "finish"
# What may differ between two parts, and how that is said; the first that does is named.
_DIFFERENCES = {
    "version": "by fastmerge {theirs}, and this is {ours}",
    "parts": "in {theirs} parts, and this is one of {ours}",
    "inputs": "of other inputs (a model's weights, or its files' sizes or times)",
    "recipe": "by another recipe, seed or size of shards",
    "side": "with other files beside the weights (tokenizer, config, card)",
}


@dataclass(frozen=True)
class Manifest:
    """What all parts agree on, in plain values."""

    version: str
    parts: int
    inputs: str
    recipe: str
    side: str
    tensors: int  # written, by all parts
    shares: list[list[int]]  # by part: its first shard, and one past its last
    shards: dict[str, dict[str, Any]]  # by name: bytes, and the sha256 of the header
    files: dict[str, dict[str, Any]]  # beside the weights, by name: bytes and sha256
    lineage: dict[str, Any]  # what is known of it before the merge


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def open_parts(target: Path, *, make: bool) -> WorkingFolder:
    """The folder of the parts of ``target``. Raises OutputError, OSError; FileNotFoundError where
    there is none and none is to be made.
    """
    path = beside(target, "parts")
    made = False
    if make and not os.path.lexists(path):
        try:
            path.mkdir(mode=0o700)
            made = True
        except FileExistsError:  # another part was faster
            pass
    folder = WorkingFolder(path)
    if folder.loose:
        folder.close()
        raise OutputError(
            f"{path}: other users could write to it, so that nothing in it is certain; remove it "
            "and run all parts again"
        )
    if made:
        try:
            _check_file_system(folder)
        except BaseException:
            folder.close()
            raise
    return folder


def _check_file_system(folder: WorkingFolder) -> None:
    """Raises OutputError where the file system lacks what parts rely on."""
    probes = Path(tempfile.mkdtemp(dir=folder.inside))
    try:
        faults = _faults_of_file_system(probes)
        sync_folder(folder.inside)
    finally:
        remove_tree(probes)
    if faults:
        raise OutputError(
            f"{folder.path}: parts cannot meet on this file system: {'; '.join(faults)}; merge "
            "to another one, or without parts"
        )


def _faults_of_file_system(probes: Path) -> list[str]:
    """That O_EXCL refuses what is there, that a rename replaces a file unless it is told not to,
    and refuses a folder with something in it, and that fsync is there. Raises OSError.
    """
    a, b, faults = probes / "a", probes / "b", []
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for path, text in ((a, b"a"), (b, b"b")):
        descriptor = os.open(path, flags, 0o600)
        os.write(descriptor, text)
        os.fsync(descriptor)
        os.close(descriptor)
    with suppress(FileExistsError):
        os.close(os.open(a, flags, 0o600))
        faults.append("O_EXCL makes a file that is there")
    os.rename(a, b)
    if a.exists() or b.read_bytes() != b"a":
        faults.append("a rename does not replace a file")
    full, other = probes / "full", probes / "other"
    for path in (full, other):
        path.mkdir()
        (path / "x").touch()
    with suppress(OSError):
        os.rename(full, other)
        faults.append("a rename replaces a folder that is not empty")
    with suppress(FileExistsError):
        if take_name(b, other / "x"):
            faults.append("a rename replaces a file that it must not replace")
    return faults


def agree(folder: WorkingFolder, ours: Manifest, files: Mapping[str, bytes | Path]) -> None:
    """Writes the manifest, with the ``files`` beside the weights, where no part has yet. Raises
    OutputError where another part's says otherwise, OSError.
    """
    place = folder.inside / PLAN
    if not os.path.lexists(place):
        own = Path(tempfile.mkdtemp(prefix=f"{PLAN}-", dir=folder.inside))
        try:
            (own / FILES).mkdir()
            write_files(own / FILES, files)
            text = json.dumps(asdict(ours), indent=1).encode()
            write_files(own, {MANIFEST: text})
            try:
                own.rename(place)
                sync_folder(folder.inside)
                return
            except OSError:
                if not os.path.lexists(place):
                    raise
        finally:
            remove_tree(own, ignore_errors=True)
    theirs = read_manifest(folder)
    for key, said in _DIFFERENCES.items():
        values = {"theirs": getattr(theirs, key), "ours": getattr(ours, key)}
        if values["theirs"] != values["ours"]:
            raise OutputError(
                f"{folder.path}: its parts are merged {said.format(**values)}; run what they were "
                "begun with, or remove the folder to start over"
            )


def read_manifest(folder: WorkingFolder) -> Manifest:
    """Raises OutputError where there is none."""
    path = folder.inside / PLAN / MANIFEST
    if not os.path.lexists(path):
        raise OutputError(f"{folder.path}: no part has begun in it; run one, or remove it")
    folder.check(f"{PLAN}/{MANIFEST}")
    try:
        found = read_object(path, max_bytes=MAX_MANIFEST_BYTES)
    except ModelError as error:
        said = str(error).removeprefix(f"{path}: ")
        raise OutputError(
            f"{folder.path / PLAN / MANIFEST}: {said}; it is damaged: remove the folder and run "
            "all parts again"
        ) from None
    missing = [each.name for each in fields(Manifest) if each.name not in found]
    if missing:
        raise OutputError(
            f"{folder.path / PLAN / MANIFEST}: no '{missing[0]}'; it is damaged, or another "
            "version's: remove the folder and run all parts again"
        )
    made = Manifest(**{each.name: found[each.name] for each in fields(Manifest)})
    fault = _fault(made)
    if fault is not None:
        raise OutputError(
            f"{folder.path / PLAN / MANIFEST}: '{fault}' is not what a part writes; it is damaged: "
            "remove the folder and run all parts again"
        )
    return made


def file_fault(folder: WorkingFolder, file: str, facts: Mapping[str, Any]) -> str:
    """What is wrong with a finished weight file of the parts: nothing (""), if it has the size and
    the header that its ``facts`` say. Raises OutputError for what is no file of ours.
    """
    path = folder.inside / file
    if not os.path.lexists(path):
        return "is missing"
    folder.check(file)
    size = path.stat().st_size
    if size != facts["bytes"]:
        return f"has {size} bytes, not {facts['bytes']}"
    with path.open("rb") as opened:
        length = min(int.from_bytes(opened.read(8), "little"), MAX_HEADER_BYTES)
        header = hashlib.sha256(opened.read(length)).hexdigest()
    return "" if header == facts["header_sha256"] else "has another header than was planned"


def _fault(said: Manifest) -> str | None:
    """What in it no part writes: a name that leads out of the folder, a number that is none."""
    count = len(said.shards) if isinstance(said.shards, dict) else 0
    shares = said.shares if isinstance(said.shares, list) else []
    fits = {
        "version": isinstance(said.version, str),
        "parts": _is_number(said.parts) and said.parts == len(shares),
        "tensors": _is_number(said.tensors),
        "shards": bool(said.shards)
        and _are_files(said.shards, "header_sha256")
        and not any("/" in n for n in said.shards),
        "shares": all(
            isinstance(share, list)
            and len(share) == 2
            and all(map(_is_number, share))
            and share[0] <= share[1] <= count
            for share in shares
        ),
        "files": _are_files(said.files, "sha256"),
        "lineage": isinstance(said.lineage, dict),
    }
    return next((key for key, fit in fits.items() if not fit), None)


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_OFFSET


def _are_files(value: Any, digest: str) -> bool:
    return isinstance(value, dict) and all(
        isinstance(facts, dict)
        and _is_number(facts.get("bytes"))
        and isinstance(facts.get(digest), str)
        and not {"", ".", ".."} & set(name.split("/"))
        and "\0" not in name
        for name, facts in value.items()
    )
