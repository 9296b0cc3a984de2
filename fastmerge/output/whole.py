"""A written folder against what its own fastmerge.json says: headers, sizes, files, checksums.

The folder may be a stranger's: what fastmerge.json says is checked before it is used. It is no
proof of where a folder is from: whoever can rewrite the weights can rewrite fastmerge.json.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmerge import _C
from fastmerge.errors import ModelError, UnsupportedError, brief, printable, shortened
from fastmerge.limits import (
    MAX_DEPTH,
    MAX_DIFFERENCES,
    MAX_ENTRIES,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
)
from fastmerge.models.adapter import CONFIG as ADAPTER_CONFIG
from fastmerge.models.adapter import WEIGHTS, inside
from fastmerge.models.folder import INDEX, check_index, find_files
from fastmerge.models.header import FileTensor, Header, open_regular, read_header, read_object, show
from fastmerge.models.links import Home
from fastmerge.models.side_files import LINEAGE_FILE, is_weights
from fastmerge.output.checksum import ALGORITHM, checksums_in_file, sha256_of
from fastmerge.version import __version__

_NEVER = re.compile(r"^/|(^|/)\.\.(/|$)|\0")  # in the name of a file that a merge wrote
_GIT = ".git"
# What tools leave in a model's folder, and all that is not looked at beside .git/: the Hub's
# attributes, the state of its downloads and uploads, what Finder keeps. No loader opens any of it.
_OF_TOOLS = re.compile(
    r"\.gitattributes|(.+/)?\.DS_Store"
    r"|\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG|(.+/)?[^/]+\.(metadata|lock|incomplete))"
)
_FIRST_WITH_ALL = (0, 1)  # the version whose lineages have every digest and checksum
Watch = Callable[[int, int, str], None]  # bytes done, bytes in all, tensor name


@dataclass(frozen=True)
class Difference:
    """What is not as it was written: a file of the folder, or a tensor (else ""), and in what."""

    file: str
    tensor: str
    what: str

    def __str__(self) -> str:
        tensor = f" tensor {show(self.tensor)}:" if self.tensor else ""
        return shortened(printable(f"{show(self.file)[1:-1]}:{tensor} {self.what}"))


@dataclass
class Findings:
    """What a check came to. ``unchecked``: what could not be checked, and why, a sentence each."""

    differences: list[Difference] = field(default_factory=list)
    more: int = 0  # differences beyond those that are kept
    unchecked: list[str] = field(default_factory=list)
    files: int = 0
    tensors: int = 0
    checked: int = 0  # tensors whose every byte was read and agrees with a checksum, or does not
    nbytes: int = 0  # of those
    faulty: set[str] = field(default_factory=set)  # files of which a difference is told

    def differ(self, file: str, what: str, tensor: str = "") -> None:
        if not tensor:
            self.faulty.add(file)
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(Difference(file, tensor, what))
        else:
            self.more += 1


@dataclass(frozen=True)
class Lineage:
    """A fastmerge.json, as far as it says what was written; what it does not say is empty."""

    said: Mapping[str, Any]
    files: frozenset[str]
    written: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, str | None]  # their checksums
    version: str
    algorithm: str | None

    @classmethod
    def read(cls, folder: Path) -> Lineage | None:
        """None where there is none. Raises ModelError for one that no merge wrote."""
        path = folder / LINEAGE_FILE
        if not os.path.lexists(path):
            return None
        said = read_object(Home(folder).inside(path), max_bytes=MAX_HEADER_BYTES)
        files, written = said.get("files", []), said.get("written", {})
        tensors, kind = said.get("tensors", {}), said.get("checksum")
        mappings = [written, tensors, *_values(written), *_values(tensors)]
        if (
            not isinstance(files, list)
            or not all(isinstance(name, str) for name in files)
            or not all(isinstance(value, dict) for value in mappings)
        ):
            raise ModelError(f"{path}: not what a merge writes there")
        return cls(
            said,
            frozenset(files),
            written,
            {name: _text(result.get("checksum")) for name, result in tensors.items()},
            _text(said.get("fastmerge_version")) or "an unknown version",
            None if kind is None else brief(kind) if not isinstance(kind, str) else kind,
        )

    def lacks(self, what: str, found: Findings) -> None:
        """Tells that ``what`` is not in it: a fault, unless an older version wrote it."""
        number = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)", self.version, re.ASCII)
        if number and (int(number[1]), int(number[2])) >= _FIRST_WITH_ALL:
            found.differ(LINEAGE_FILE, f"has no {what}, which fastmerge {self.version} writes")
        else:
            found.unchecked.append(f"fastmerge {self.version} kept no {what}")

    @property
    def is_of_adapter(self) -> bool:
        return WEIGHTS in self.files


def _values(mapping: Any) -> list[Any]:
    return list(mapping.values()) if isinstance(mapping, dict) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def check_folder(folder: Path, lineage: Lineage, pool: _C.Pool, watch: Watch | None) -> Findings:
    """``folder`` against its ``lineage``. Raises FastmergeError where it cannot be searched."""
    found = Findings()
    _check_written(folder, lineage, found)
    _check_unlisted(folder, lineage, found)
    files, headers = read_headers(folder, found, adapter=lineage.is_of_adapter)
    _check_metadata(files, headers, lineage, found)
    tensors = {info.name: info for header in headers.values() for info in header.tensors}
    found.tensors = len(tensors)
    # Of a file that cannot be read, that is told: not each of its tensors.
    if files and len(headers) == len(files):
        for name in sorted(set(lineage.tensors) - set(tensors)):
            found.differ(LINEAGE_FILE, "listed here, but in no weight file", name)
    if lineage.algorithm not in (None, ALGORITHM):
        kind = f"checksums of a kind that this version does not know ({show(lineage.algorithm)})"
        if lineage.version == __version__:
            found.differ(LINEAGE_FILE, kind)
        else:
            found.unchecked.append(f"the tensors' bytes: {kind}")
        return found
    _check_tensors(folder, headers, lineage, pool, found, watch)
    return found


def _check_written(folder: Path, lineage: Lineage, found: Findings) -> None:
    if not lineage.written:
        lineage.lacks("digests of configs, side files and headers ('written')", found)
    for name in sorted(lineage.files | set(lineage.written)):
        found.files += 1
        if _NEVER.search(name) or not name:
            found.differ(LINEAGE_FILE, f"names a file outside the folder ({show(name)})")
        elif not os.path.lexists(folder / name):
            found.differ(name, "is missing")
        else:
            wanted = lineage.written.get(name)
            listed = wanted or not lineage.written or name == LINEAGE_FILE
            try:
                what = _fault(folder, name, wanted) if wanted else None
                what = what if listed else f"{LINEAGE_FILE} has no size and digest of it"
            except (ModelError, OSError) as error:
                what = in_words(error, folder / name)
            if what:
                found.differ(name, what)


def _fault(folder: Path, name: str, wanted: Mapping[str, Any]) -> str | None:
    """How the file differs from the one that was written, in its size or its bytes."""
    path = Home(folder).inside(folder / name)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != wanted.get("bytes"):
            return f"has {size} bytes, {brief(wanted.get('bytes'))} were written"
        header = wanted.get("header_sha256")
        if header is not None:
            return None if read_header(path, 0)[0].digest.hex() == header else "has another header"
        if size > MAX_FILE_BYTES:
            return f"is larger than any file that a merge writes beside weights ({size} bytes)"
        same = sha256_of(file) == wanted.get("sha256")
    return None if same else "has other bytes than were written"


def _check_unlisted(folder: Path, lineage: Lineage, found: Findings) -> None:
    """Loaders look for files by name: a config, an index or code may have been laid beside."""
    known = lineage.files | set(lineage.written) | {LINEAGE_FILE}
    if not lineage.files:
        lineage.lacks("list of files ('files')", found)
        return
    check_added(folder, known, "was not written by the merge", found)


def check_added(folder: Path, known: Set[str], what: str, found: Findings) -> None:
    """Tells ``what`` of every file that is not ``known``, unless something is told of it."""
    for name in _names(folder, len(known)):
        if name not in known and name not in found.faulty:
            found.differ(name, what)
    git = f"what lies in {_GIT}/: version control, of which no loader reads"
    if (folder / _GIT).is_dir() and git not in found.unchecked:
        found.unchecked.append(git)


def _names(folder: Path, known: int) -> Iterator[str]:
    """Every file in the folder and its folders, but for what tools leave there; beside so many
    ``known`` ones, there may not be more than a model has.
    """
    entries = 0
    for place, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        if entries > known + MAX_ENTRIES:
            raise ModelError(
                f"{folder}: more than {MAX_ENTRIES} other files; not what a merge wrote"
            )
        within = os.path.relpath(place, folder)
        if within.count("/") > MAX_DEPTH:
            raise ModelError(
                f"{folder}: folders more than {MAX_DEPTH} deep; not what a merge wrote"
            )
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = sorted(n for n in folders if n not in links and (within, n) != (".", _GIT))
        for file in sorted(files + links):
            name = os.path.relpath(os.path.join(place, file), folder)
            if file in links or not _OF_TOOLS.fullmatch(name):
                yield name


def read_headers(
    folder: Path, found: Findings, *, adapter: bool = False
) -> tuple[tuple[Path, ...], dict[Path, Header]]:
    """The weight files, of a model or of an ``adapter``, and the headers of those in order."""
    config = folder / (ADAPTER_CONFIG if adapter else "config.json")
    try:
        files, weight_map = ((inside(folder, WEIGHTS),), None) if adapter else find_files(folder)
        if adapter or config.exists():
            read_object(inside(folder, config.name))
    except (ModelError, UnsupportedError, OSError) as error:
        _tell(error, folder, found)
        return (), {}
    headers: dict[Path, Header] = {}
    for number, path in enumerate(files):
        try:
            headers[path] = read_header(path, number)[0]
        except ModelError as error:
            name = path.relative_to(folder).as_posix()
            if name not in found.faulty:
                found.differ(name, in_words(error, path))
    if weight_map is not None and len(headers) == len(files):
        try:
            check_index(folder / INDEX, weight_map, files, headers.values())
        except ModelError as error:
            _tell(error, folder, found)
    return files, headers


def _check_metadata(
    files: tuple[Path, ...], headers: Mapping[Path, Header], lineage: Lineage, found: Findings
) -> None:
    """What the headers say of the merge is what fastmerge.json says of it."""
    for path in files:
        for key, value in headers[path].metadata.items() if path in headers else ():
            if not key.startswith("fastmerge_"):
                continue
            said = lineage.said.get(key)
            if (json.dumps(said) if isinstance(said, dict) else said) != value:
                what = f"its header's {show(key)} is not the one in {LINEAGE_FILE}"
                found.differ(path.name, what)


def _check_tensors(
    folder: Path,
    headers: Mapping[Path, Header],
    lineage: Lineage,
    pool: _C.Pool,
    found: Findings,
    watch: Watch | None,
) -> None:
    total = sum(info.nbytes for header in headers.values() for info in header.tensors)
    without = 0
    for path, header in headers.items():
        name = path.relative_to(folder).as_posix()
        wanted: dict[str, FileTensor] = {}
        for info in header.tensors:
            if info.name not in lineage.tensors and lineage.tensors:
                found.differ(name, f"not listed in {LINEAGE_FILE}", info.name)
            elif lineage.tensors.get(info.name) is None:
                without += 1
            else:
                wanted[info.name] = info
        places = {info.name: (info.begin, info.nbytes) for info in wanted.values()}
        try:
            for tensor, checksum in checksums_in_file(pool, path, places):
                found.checked += 1
                found.nbytes += wanted[tensor].nbytes
                if checksum is None:
                    found.differ(name, "could not be read to its end", tensor)
                elif checksum != lineage.tensors[tensor]:
                    found.differ(name, "has other bytes than were written", tensor)
                if watch is not None:
                    watch(found.nbytes, total, tensor)
        except OSError as error:
            found.differ(name, in_words(error, path))
    if without:
        lineage.lacks(f"checksums of {without} of {found.tensors} tensors", found)


def _tell(error: Exception, folder: Path, found: Findings) -> None:
    """The error as a difference of the file that it begins with, or of the folder, unless that is
    told, or a weight file's own fault.
    """
    if any(map(is_weights, found.faulty)):
        return
    text = str(error)
    inside = text.removeprefix(printable(f"{folder}/"))
    name, colon, what = inside.partition(": ")
    if isinstance(error, OSError) or inside == text or not colon:
        found.differ(".", in_words(error, folder))
    elif name not in found.faulty:
        found.differ(name, what)


def in_words(error: Exception, place: Path) -> str:
    """The error in words that do not repeat where it is."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    return str(error).removeprefix(printable(f"{place}: "))
