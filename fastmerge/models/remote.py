"""A model in an object store or on a web server: headers first, then the ranges asked for."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastmerge import _C
from fastmerge.errors import ModelError
from fastmerge.limits import (
    MAX_CONFIG_BYTES,
    MAX_ENTRIES,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    MAX_TOTAL_BYTES,
)
from fastmerge.models.ahead import Ahead
from fastmerge.models.folder import INDEX, SINGLE, weight_map_of
from fastmerge.models.header import LFS_POINTER, FileTensor, Header, as_object, parse_header, show
from fastmerge.models.hub import access, repository, token_header
from fastmerge.models.side_files import SideFiles, is_known, is_weights
from fastmerge.models.store import EmptyError, asked, check_plain, check_stays, library, open_store
from fastmerge.once import cached_property

_FIRST_BYTES = 1 << 20  # of a weight file: the header of nearly every one in use
# A connection of S3 brings 50 to 100 MB/s, a 25 Gb/s network 3 GB/s.
_CONNECTIONS = 32
# What a web server is asked for.
_BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
)  # fmt: skip
# What a store says that may be read but not listed, or that knows no lists.
_NO_LIST = re.compile(r"status code: (401|403|404|405|501)\b")

R = TypeVar("R")


class _Object(NamedTuple):
    """A file as it was first seen."""

    name: str
    size: int
    tag: str  # its ETag, or where there is none its date

    @property
    def tagged(self) -> bool:
        """Whether a server can be asked for this one alone: a weak ETag (W/"...") never matches in
        If-Match (RFC 9110, 13.1.1), and is compared in each answer, as a date is.
        """
        return self.tag.startswith('"')


class Remote:
    """The model whose files lie below one URL, or one .safetensors file; a `Model`.

    A tensor is read into memory when it is asked for, or ahead of that where the caller has said
    what it will ask for (`expect`), by up to 32 requests of 1 to 8 MiB at a time, and let go of
    behind: beyond what is read ahead, memory is the caller's to bound. Safe to share between
    threads.
    """

    folder = None
    places: tuple[Path, ...] = ()

    def __init__(self, url: str) -> None:
        """Reads and checks the headers of every file, no weights. Raises ModelError for what is not
        there, not readable or malformed, ResourceError where there is no obstore.
        """
        self.label = url.rstrip("/")
        check_plain(url)
        single = self.label.endswith(".safetensors")
        self._base, _, name = self.label.rpartition("/") if single else (self.label, "", "")
        sent: dict[str, str] = {}
        self._listed: tuple[str, ...] | None = None  # where the store cannot list
        if url.startswith("hf://"):
            self._base, self._listed, sent = repository(self.label)
        self._store = open_store(self._base, headers=sent)
        weight_map = None if single else self._weight_map()
        names = [name] if single else sorted(set((weight_map or {SINGLE: SINGLE}).values()))
        read = list(_pool().map(self._header, range(len(names)), names))
        self.files = tuple(found for found, _ in read)
        headers = [header for _, header in read]
        self.tensors: dict[str, FileTensor] = {t.name: t for h in headers for t in h.tensors}
        if weight_map is not None:
            self._check_index(weight_map, headers)
        self.metadata: dict[str, str] = {}
        for header in reversed(headers):
            self.metadata.update(header.metadata)
        self.total_bytes = sum(info.nbytes for info in self.tensors.values())
        self._digests = [header.digest for header in headers]
        found = self._small("config.json", MAX_CONFIG_BYTES)
        self.config: dict[str, Any] = {}
        if found is not None:
            self.config = self._parsed("config.json", lambda: as_object(found))
        self.stamp: tuple[Hashable, ...] = tuple((self._base, *each) for each in self.files)
        self._ahead = Ahead(self.tensors, self._bytes_of, _pool)

    def __getstate__(self) -> dict[str, Any]:
        """What another process reads the same objects by: with credentials of its own."""
        return {name: own for name, own in vars(self).items() if name not in ("_store", "_ahead")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        of_hub = self.label.startswith("hf://")
        self._store = open_store(self._base, headers=token_header() if of_hub else {})
        self._ahead = Ahead(self.tensors, self._bytes_of, _pool)

    def view(self, name: str, *, raw: bool = False) -> _C.View:
        """The tensor, read into memory: its elements, or bytes if ``raw`` or without kernels."""
        self._known(name)
        data, info = self._ahead.start(name).result(), self.tensors[name]
        mergeable = info.dtype.kernels and not raw
        count, code = (info.count, info.dtype.code) if mergeable else (info.nbytes, "RAW")
        return _C.View(data.ctypes.data, count, code, data)

    def prefetch(self, name: str) -> None:
        """Asks for the tensor; `view` waits for it."""
        self._known(name)
        self._ahead.start(name)

    def drop(self, name: str) -> None:
        """The tensor will not be read again soon: its memory is free once no view is left."""
        self._ahead.drop(name)

    def expect(self, names: Sequence[str], nbytes: int) -> None:
        """Those tensors will be read, in this order: they are asked for ahead, as long as no more
        than ``nbytes`` of this model are in memory.
        """
        self._ahead.expect(names, nbytes)

    @property
    def held_bytes(self) -> int:
        """In memory, or on the way there."""
        return self._ahead.held

    def check_unchanged(self) -> None:
        """Raises ModelError where a file is not the one whose header was read."""

        def check(each: _Object) -> None:
            try:
                meta = self._asked(each.name, lambda: library().head(self._store, each.name))
            except FileNotFoundError:
                raise self._changed(each.name) from None
            if _object(each.name, meta) != each:
                raise self._changed(each.name)

        list(_pool().map(check, self.files))

    def side_files(self) -> SideFiles:
        """What a merged model takes over from it beside the weights, by name: of a remote one what
        is known by name.
        """
        return self._beside

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the files' sizes, headers and ETags, in order."""
        digest = hashlib.sha256(b"fastmerge remote 1")
        for each, header in zip(self.files, self._digests, strict=True):
            digest.update(each.size.to_bytes(8, "little") + header + each.tag.encode() + b"\0")
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Remote({self.label!r}, {len(self.tensors)} tensors)"

    # --- opening ---

    def _weight_map(self) -> dict[str, str] | None:
        text = self._small(INDEX, MAX_HEADER_BYTES)
        if text is None:
            return None
        found = self._parsed(INDEX, lambda: weight_map_of(as_object(text, strict=True)))
        for name in set(found.values()):
            # Nothing else is a path to every store, nor what a server may take for one elsewhere.
            if not name.isprintable() or {"", ".", ".."} & set(name.split("/")):
                raise ModelError(
                    f"{self._base}/{INDEX}: shard {show(name)} is no name of a file in the folder"
                )
        return found

    def _header(self, number: int, name: str) -> tuple[_Object, Header]:
        where = f"{self._base}/{name}"
        got = self._first(name, _FIRST_BYTES)
        if got is None:
            raise ModelError(
                f"{where}: not there; give the URL of a folder with {SINGLE} or {INDEX}, or of one "
                ".safetensors file"
            )
        found, begin = got
        length = int.from_bytes(begin[:8], "little")
        if length == LFS_POINTER:
            raise ModelError(f"{where}: a Git LFS pointer, not the file; upload the file itself")
        if found.size < 8 or length > min(MAX_HEADER_BYTES, found.size - 8):
            raise ModelError(f"{where}: not safetensors, or truncated ({found.size} bytes)")
        if 8 + length > len(begin):
            begin += bytes(self._range(found, len(begin), 8 + length))
        data = begin[8 : 8 + length]
        return found, parse_header(where, data, number, found.size)

    def _check_index(self, weight_map: Mapping[str, str], headers: list[Header]) -> None:
        stale = f"{self._base}/{INDEX}: tensor"
        for each, header in zip(self.files, headers, strict=True):
            for info in header.tensors:
                if weight_map.get(info.name) != each.name:
                    raise ModelError(f"{stale} {show(info.name)} is not where '{each.name}' has it")
        for name in weight_map:
            if name not in self.tensors:
                raise ModelError(f"{stale} {show(name)} is in no file")

    def _parsed(self, name: str, parse: Callable[[], R]) -> R:
        try:
            return parse()
        except ValueError as error:
            raise ModelError(f"{self._base}/{name}: {error}") from None

    def _small(self, name: str, limit: int) -> bytes | None:
        """A whole file of at most ``limit`` bytes; None where there is none."""
        got = self._first(name, limit)
        if got is None:
            return None
        found, data = got
        if found.size > limit:
            raise ModelError(f"{self._base}/{name}: {found.size} bytes, over {limit}")
        return data

    @property
    def names_beside(self) -> list[str]:
        """What is known by name beside the weights: a web server, which lists nothing, is asked for
        each name.
        """
        there = self._there()
        names = _known_among(there)
        if tuple(there) == _BESIDE:
            found = list(_pool().map(self._is_there, names))
            names = [name for name, is_there in zip(names, found, strict=True) if is_there]
            names += ["config.json"] if self.config else []
        return sorted(names)

    def _is_there(self, name: str) -> bool:
        try:
            self._asked(name, lambda: library().head(self._store, name))
        except FileNotFoundError:
            return False
        return True

    @cached_property
    def _beside(self) -> SideFiles:
        there = self._there()
        names = _known_among(there)
        begun: list[tuple[_Object, bytes]] = []
        total = 0
        for at in range(0, len(names), _CONNECTIONS):
            some = names[at : at + _CONNECTIONS]
            got = _pool().map(lambda name: self._first(name, _FIRST_BYTES), some)
            for name, first in zip(some, got, strict=True):
                if first is not None:
                    begun.append(first)
                elif tuple(there) != _BESIDE:  # it was listed
                    raise self._changed(name)
            total = sum(each.size for each, _ in begun)
            large = next((each for each, _ in begun if each.size > MAX_FILE_BYTES), None)
            if large is not None:
                raise ModelError(
                    f"{self._base}/{large.name}: {large.size} bytes, over {MAX_FILE_BYTES}"
                )
            if total > MAX_TOTAL_BYTES:
                raise ModelError(f"{self._base}: more than {MAX_TOTAL_BYTES >> 30} GiB beside it")
        found = SideFiles()
        for each, data in begun:
            found[each.name] = data + bytes(self._range(each, len(data), each.size))
        what = "what is known by name is taken along"
        if tuple(there) == _BESIDE:
            what = "which cannot be listed, a tokenizer's files are asked for and taken along"
        found.notes = (
            f"{self.label}: of what lies beside the weights, {what} ({len(found)} files)",
        )
        return found

    def _there(self) -> Sequence[str]:
        """The names of what lies beside the weights, or those to ask for one by one."""
        if self._listed is not None:
            return self._listed
        # A web server answers with as long a text as it likes, which is read whole.
        if self._base.startswith(("https://", "http://")):
            return _BESIDE

        def listed() -> list[str]:
            there: list[str] = []
            try:
                for batch in library().list(self._store):
                    there += [entry["path"] for entry in batch]
                    if len(there) > MAX_ENTRIES + len(self.files):
                        raise ModelError(
                            f"{self._base}: more than {MAX_ENTRIES} other objects; give the "
                            "model a prefix of its own"
                        )
            except library().exceptions.BaseError as error:
                if _NO_LIST.search(str(error)) is None:
                    raise
                return list(_BESIDE)
            return there

        return asked(self._base, listed)

    # --- requests ---

    def _known(self, name: str) -> None:
        if name not in self.tensors:
            raise ModelError(f"{self.label}: no tensor {show(name)}")

    def _bytes_of(self, file: int, begin: int, end: int) -> Any:
        return self._range(self.files[file], begin, end)

    def _first(self, name: str, limit: int) -> tuple[_Object, bytes] | None:
        """The file, and at most its first ``limit`` bytes; None where there is none."""
        check_stays(f"{self._base}/{name}")

        def first() -> tuple[_Object, bytes]:
            got = library().get(self._store, name, options={"range": (0, limit)})
            found = _object(name, got.meta)
            return found, bytes(_whole(name, got, min(limit, found.size)))

        try:
            return self._asked(name, first, ranged=True)
        except FileNotFoundError:
            return None
        except EmptyError:
            try:
                found = _object(name, self._asked(name, lambda: library().head(self._store, name)))
            except FileNotFoundError:
                return None
            if found.size:
                raise self._changed(name) from None
            return found, b""

    def _range(self, file: _Object, begin: int, end: int) -> Any:
        """Those bytes of the file, as a buffer."""
        if begin == end:
            return b""
        options: dict[str, Any] = {"range": (begin, end)}
        if file.tagged:
            options["if_match"] = file.tag

        def read() -> Any:
            got = library().get(self._store, file.name, options=options)
            if _object(file.name, got.meta) != file:
                raise self._changed(file.name)
            return _whole(file.name, got, end - begin)

        try:
            return self._asked(file.name, read, ranged=True)
        except (FileNotFoundError, EmptyError):
            raise self._changed(file.name) from None

    @property
    def _access(self) -> str:
        if not self.label.startswith("hf://"):
            return ""
        return access(self.label.removeprefix("hf://").partition("@")[0].rstrip("/"))

    def _asked(self, name: str, ask: Callable[[], R], *, ranged: bool = False) -> R:
        where, changed = f"{self._base}/{name}", lambda: self._changed(name)
        return asked(where, ask, changed=changed, ranged=ranged, access=self._access)

    def _changed(self, name: str) -> ModelError:
        return ModelError(
            f"{self._base}/{name}: changed while it was being read; run again when it is complete"
        )


def _known_among(names: Sequence[str]) -> list[str]:
    return [n for n in names if is_known(n) and not is_weights(n) and "/" not in n]


def _whole(name: str, got: Any, size: int) -> Any:
    """The body, as a buffer; EOFError where it has not as many bytes as were asked for. What a
    server sends beyond them is not read.
    """
    if not size:
        return b""
    data = next(iter(got.stream(min_chunk_size=size)), b"")
    if len(data) != size:
        raise EOFError(f"{name}: not the {size} bytes that were asked for came")
    return data


def _object(name: str, meta: Mapping[str, Any]) -> _Object:
    return _Object(name, int(meta["size"]), meta.get("e_tag") or str(meta["last_modified"]))


_POOLS: dict[int, ThreadPoolExecutor] = {}  # by process: a child has none of its parent's threads
_SHARING = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    """The requests of all models; none of them waits for another."""
    with _SHARING:
        if os.getpid() not in _POOLS:
            made = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="fastmerge-remote")
            _POOLS[os.getpid()] = made
        return _POOLS[os.getpid()]
