"""The safetensors format: one file's header, checked in full.

As strict as the safetensors library, and beyond it: duplicate keys and unknown fields are refused.
Every refusal is one line that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fastmerge.dtypes import BY_CODE
from fastmerge.errors import ModelError, brief
from fastmerge.limits import (
    MAX_CONFIG_BYTES,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_NESTING,
    MAX_OFFSET,
)
from fastmerge.models.links import Resolved
from fastmerge.models.model import TensorInfo
from fastmerge.records import record

LFS_POINTER = int.from_bytes(b"version ", "little")  # how its text begins
_QUOTES = "'\""
# The shortest entry, "":{"dtype":"U8","shape":[],"data_offsets":[0,0]}, has 49 bytes and three.
_BYTES_A_BRACKET = 16
_CHECKED_BYTES = 1 << 20
_PLAIN_BYTES = 16 << 20  # 140 000 tensors; as mappings the entries of 100 MB would take 400 MB


@record(slots=True)
class FileTensor(TensorInfo):
    """One tensor as the headers describe it."""

    file: int  # index into Checkpoint.files
    begin: int  # byte offset in that file


class Stamp(NamedTuple):
    """What changes when a file is touched: cheap to compare, proves nothing about content."""

    path: str
    size: int
    mtime_ns: int
    inode: int


def show(name: str) -> str:
    """A tensor or key name fit for a one-line message."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return f"'{text}'" if len(text) <= 120 else f"'{text[:117]}...'"


# --- one header ---


class Header(NamedTuple):
    tensors: list[FileTensor]  # in file order
    metadata: dict[str, str]
    digest: bytes


Hook = Callable[[list[tuple[str, Any]]], Any]
_FIELDS = {"dtype", "shape", "data_offsets"}


class _Entry(NamedTuple):
    """A tensor's entry, in half the memory of the mapping that it is: a header of 100 MB has 1.8
    million.
    """

    dtype: Any
    shape: Any
    data_offsets: Any


def _entry_or_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Entry:
    found = _unique(pairs)
    if found.keys() != _FIELDS or not isinstance(found["shape"], list):
        return found
    if isinstance(found["dtype"], str):
        found["dtype"] = sys.intern(found["dtype"])
    return _Entry(**found)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {show(key)}")
            seen.add(key)
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _no_minus_zero(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no whole number")
    return int(text)


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it; two halves make a character


def _check_brackets(data: bytes) -> None:
    """Refuses more lists and mappings than a header or an index of this size has, before they are
    made: 100 MB of empty ones took 2.5 GiB. What is valid always passes.
    """
    most = len(data) // _BYTES_A_BRACKET
    if len(data) < _CHECKED_BYTES or data.count(b"[") + data.count(b"{") <= most:
        return
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    bare = re.sub(rb'"[^"]*"?', b"", bare)  # less the names, which may hold any
    if bare.count(b"[") + bare.count(b"{") > most:
        raise ValueError("more lists and mappings than tensors of so many bytes have")


def _parse_object(data: bytes, hook: Hook | None) -> dict[str, Any]:
    """One JSON object; ValueError says what it is instead. With a ``hook``, which makes the
    objects of a header or an index, NaN and -0 are refused.
    """
    if hook is not None:
        _check_brackets(data)
    try:
        text = data.decode("utf-8")
        if hook is not None:
            whole = _no_minus_zero if b"-0" in data else None
            found = json.loads(
                text, object_pairs_hook=hook, parse_constant=_no_constant, parse_int=whole
            )
        else:
            found = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    if _is_deep(found):
        raise ValueError("nested too deeply")
    return found


def _is_deep(found: dict[str, Any]) -> bool:
    """Whether mappings and lists are nested deeper than whoever walks them may recurse."""
    level: list[Any] = [found]
    for _ in range(MAX_NESTING):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if type(inner) in (dict, list)
        ]
        if not level:
            return False
    return True


def open_regular(path: Path) -> FileIO:
    """Opens a regular file for reading, unbuffered; anything else is refused and never waited for.
    Raises ModelError, OSError.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = path.descriptor(flags) if isinstance(path, Resolved) else os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(
            f"{path}: not a regular file but a pipe, device, socket or folder; delete it, or put "
            "the file itself there"
        )
    return FileIO(descriptor)


def read_object(
    path: Path,
    place: Path | None = None,
    *,
    strict: bool = False,
    max_bytes: int = MAX_CONFIG_BYTES,
) -> dict[str, Any]:
    """The JSON object in a file. ``place``: where ``path`` leads, if that was checked. Raises
    ModelError.
    """
    try:
        with open_regular(place or path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise ModelError(
                    f"{path}: {size} bytes, over {max_bytes}; not a config: download it again"
                )
            # No more than was seen, should it grow while it is read.
            return _parse_object(os.pread(file.fileno(), size, 0), _unique if strict else None)
    except OSError as error:
        unreadable(path, error)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None


def as_value(data: bytes) -> Any:
    """What a line of a journal says, as JSON. Raises ValueError for anything that could not be
    written again.
    """
    try:
        text = data.decode()
        found = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return found


def as_object(data: bytes, *, strict: bool = False) -> dict[str, Any]:
    """The JSON object in ``data``, as `read_object` has it; ValueError says what it is instead."""
    return _parse_object(data, _unique if strict else None)


def unreadable(path: Path, error: OSError) -> NoReturn:
    raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Says an OSError within it as a ModelError of the file that it names, else of ``path``; of a
    folder that may not be searched it is one: there Path.exists of Python 3.14 says False.
    """
    try:
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        yield
    except OSError as error:
        unreadable(Path(error.filename or path), error)


def stamp_of(path: Path, info: os.stat_result) -> Stamp:
    return Stamp(str(path.resolve()), info.st_size, info.st_mtime_ns, info.st_ino)


def read_header(path: Path, file: int, place: Path | None = None) -> tuple[Header, Stamp]:
    """The header of the ``file``-th file of its model. ``place``: where ``path`` leads, if that was
    checked. Raises ModelError.
    """
    try:
        with open_regular(place or path) as opened:
            descriptor = opened.fileno()
            status = os.fstat(descriptor)
            size = status.st_size
            if size < 8:
                raise ModelError(f"{path}: truncated: {size} bytes, not even a header length")
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if length == LFS_POINTER:
                raise ModelError(f"{path}: a Git LFS pointer, not the file; run: git lfs pull")
            if length > MAX_HEADER_BYTES:
                raise ModelError(
                    f"{path}: header length {length} is over {MAX_HEADER_BYTES}; not safetensors"
                )
            if length > size - 8:
                raise ModelError(
                    f"{path}: truncated: {size} bytes, but its header alone takes {8 + length}"
                )
            header = parse_header(path, os.pread(descriptor, length, 8), file, size)
    except OSError as error:
        unreadable(path, error)
    return header, stamp_of(path, status)


def parse_header(where: Path | str, data: bytes, file: int, size: int) -> Header:
    """The header in ``data``, JSON without the 8 bytes of its length, of a file of ``size`` bytes
    that is the ``file``-th of its model. Raises ModelError that begins with ``where``.
    """
    begin = 8 + len(data)
    try:
        if not data.startswith(b"{"):
            raise ValueError("does not start with '{'")
        digest = hashlib.sha256(data).digest()
        content = _plain_header(data, file, begin) or _any_header(data, file, begin)
        del data
        tensors, metadata = content
        tensors.sort(key=lambda info: (info.begin, info.nbytes))
        _check_coverage(tensors, begin, size)
    except ValueError as error:
        raise ModelError(f"{where}: bad header: {error}") from None
    return Header(tensors, metadata, digest)


Content = tuple[list[FileTensor], dict[str, str]]


def _plain_header(data: bytes, file: int, begin: int) -> Content | None:
    """What nearly every header is, read in half the time, of ``data`` that begins with a brace.
    None: one for `_any_header`, which says what is wrong, if anything is.

    Of a key that is there twice `json` keeps one, and then there are more colons than what is kept
    accounts for. (A name with a colon is left to `_any_header` too.)
    """
    if len(data) > _PLAIN_BYTES or b"\\u" in data or b"-0" in data:  # \u003a is a colon
        return None
    try:
        _check_brackets(data)
        text = data.decode()
        entries = json.loads(text, parse_constant=_no_constant)
        colons = int("__metadata__" in entries)
        metadata = _check_metadata(entries.pop("__metadata__", {}))
        colons += sum(1 + key.count(":") + value.count(":") for key, value in metadata.items())
        if colons + len(entries) * (1 + len(_FIELDS)) != text.count(":"):
            return None
        if not all(type(entry) is dict and len(entry) == 3 for entry in entries.values()):
            return None
        tensors = [
            _plain_tensor(name, entry["dtype"], entry["shape"], entry["data_offsets"], file, begin)
            or _check_tensor(name, entry, file, begin)
            for name, entry in entries.items()
        ]
    except (KeyError, ValueError, RecursionError):
        return None
    return tensors, metadata


def _any_header(data: bytes, file: int, begin: int) -> Content:
    parsed = _parse_object(data, _entry_or_mapping)
    metadata = _check_metadata(parsed.pop("__metadata__", {}))
    # Each entry is let go of as it is checked: of 100 MB of them there are 1.5 million.
    return [_check_tensor(name, parsed.pop(name), file, begin) for name in list(parsed)], metadata


def _check_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:  # some writers' word for none, which the library reads too
        return {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("__metadata__ must map strings to strings")
    return metadata


def _plain_tensor(
    name: str, code: Any, shape: Any, offsets: Any, file: int, data_begin: int
) -> FileTensor | None:
    """What nearly every entry is, looked at once: of 90 000 it takes a third of the time. None: an
    entry for `_check_tensor`, which says what is wrong, if anything is.
    """
    dtype = BY_CODE.get(code) if type(code) is str else None
    if dtype is None or type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        return None
    count = 1
    for size in shape:
        if type(size) is not int or size <= 0:
            return None
        count *= size
    if type(offsets) is not list or len(offsets) != 2:
        return None
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= MAX_OFFSET:
        return None
    bits = count * dtype.bits
    if bits > MAX_OFFSET or bits != 8 * (end - begin):
        return None
    return FileTensor(name, dtype, tuple(shape), end - begin, count, file, data_begin + begin)


def _check_tensor(name: str, entry: Any, file: int, data_begin: int) -> FileTensor:
    if type(entry) is _Entry and name.isascii():
        found = _plain_tensor(name, *entry, file, data_begin)
        if found is not None:
            return found
    if isinstance(entry, dict) and entry.keys() == _FIELDS:
        entry = _Entry(**entry)
    if not isinstance(entry, _Entry):
        raise ValueError(
            f"tensor {show(name)} must have dtype, shape and data_offsets, and nothing else"
        )
    if not name.isascii():
        _check_text(name)
    code, shape, offsets = entry
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ValueError(
            f"tensor {show(name)} has unknown dtype {show(brief(code).strip(_QUOTES))}"
        )
    if not _are_sizes(shape):
        raise ValueError(
            f"tensor {show(name)} has shape {show(brief(shape))}; need non-negative integers"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"tensor {show(name)} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"tensor {show(name)} has data_offsets {show(brief(offsets))}; need [begin, end]"
        )
    count = math.prod(shape)
    # A zero in the shape must not hide an overflow from readers that multiply in 64 bits.
    if math.prod(size or 1 for size in shape) * dtype.bits > MAX_OFFSET:
        raise ValueError(f"tensor {show(name)} overflows: shape {show(str(shape))}")
    if count * dtype.bits % 8:
        raise ValueError(
            f"tensor {show(name)} does not fill whole bytes: {count} elements of {dtype.code}"
        )
    begin, end = offsets
    if end - begin != dtype.bytes_for(count):
        raise ValueError(
            f"tensor {show(name)} needs {dtype.bytes_for(count)} bytes for {dtype.code} of shape "
            f"{show(str(shape))}, but its data_offsets span {end - begin}"
        )
    return FileTensor(name, dtype, tuple(shape), end - begin, count, file, data_begin + begin)


def _check_text(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"tensor {show(name)} has a name that is not Unicode text") from None


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= MAX_OFFSET for item in value
    )


def _check_coverage(tensors: Iterable[FileTensor], data_begin: int, size: int) -> None:
    """The tensors' bytes start at the header's end, touch, never overlap, and end with the file."""
    end = data_begin
    for info in tensors:
        if info.begin < end:
            raise ValueError(
                f"tensor {show(info.name)} overlaps the one before it by {end - info.begin} bytes"
            )
        if info.begin > end:
            raise ValueError(
                f"{info.begin - end} bytes before tensor {show(info.name)} belong to no tensor"
            )
        end = info.begin + info.nbytes
    if end > size:
        raise ValueError(f"the file is truncated: {size} bytes, but the tensors need {end}")
    if end < size:
        raise ValueError(f"{size - end} bytes at the end of the file belong to no tensor")
