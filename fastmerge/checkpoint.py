"""Reading: a folder of safetensors files, validated in full before one weight is read.

The format is checked as strictly as the safetensors library does, and beyond it: duplicate keys,
unknown fields and an index that disagrees with its shards are refused. Every refusal is one line
that names the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fastmerge import _C
from fastmerge.dtypes import BY_CODE, DType
from fastmerge.errors import FastmergeError, nearest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_LFS_POINTER = int.from_bytes(b"version ", "little")  # how its text begins
_MAX_INT = 2**63 - 1  # file offsets are signed 64-bit

TOKENIZER_PATTERNS = (
    "tokenizer*.json",
    "tokenizer*.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "tokenization_*.py",
)
# What a model folder holds beside its weights that a merged model needs too.
_SIDE_PATTERNS = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_PATTERNS,
    "*preprocessor_config.json",
    "processor_config.json",
    # A config with `auto_map` names these and does not load without them. Copied, never run.
    "configuration_*.py",
    "modeling_*.py",
)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_HUB_PATTERNS = ("*.safetensors", INDEX, *_SIDE_PATTERNS)

_SAMPLE_BYTES = 4096
_MAX_SAMPLES = 12_288  # 48 MiB: under a second even where every read is a seek on flash


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the headers describe it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int  # index into Checkpoint.files
    begin: int  # byte offset in that file
    nbytes: int
    count: int  # elements


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


class Checkpoint:
    """The tensors and the config of one model on disk; safe to share between threads.

    path: the folder (or single file) opened. config: config.json in it (or beside it), {} where
    there is none.
    tensors: by name, in file order. metadata: the files' ``__metadata__``, the first file's entry
    winning.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        files: tuple[Path, ...],
        stamp: tuple[Stamp, ...],
        headers: tuple[_Header, ...],
    ) -> None:
        self.path = path
        self.config = config
        self.files = files
        self.stamp = stamp
        self.tensors = {info.name: info for header in headers for info in header.tensors}
        self.metadata: dict[str, str] = {}
        for header in reversed(headers):
            self.metadata.update(header.metadata)
        self.total_bytes = sum(info.nbytes for info in self.tensors.values())
        self._digests = tuple(header.digest for header in headers)
        self._lock = threading.Lock()
        self._mappings: dict[int, _C.Mapping] = {}

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Reads and checks every header of the model at ``path``; no weights.

        path: a folder with model.safetensors, or with shards and model.safetensors.index.json, or
        one .safetensors file. Raises FastmergeError for what is missing, unreadable or malformed.
        """
        path = Path(path)
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise FastmergeError(f"{path}: the path is not UTF-8; rename the folder") from None
        config: dict[str, Any] = {}
        weight_map: dict[str, str] | None = None
        if path.is_dir():
            files, weight_map = _find_files(path)
        elif path.suffix == ".safetensors" and path.exists():
            files = (path,)
        elif path.exists():
            raise FastmergeError(f"{path}: not a model folder or a .safetensors file")
        else:
            raise FastmergeError(f"{path}: no such file or folder")
        beside = (path if path.is_dir() else path.parent) / "config.json"
        if beside.exists():
            config = _read_object(beside)
        opened = [_read_header(file, index) for index, file in enumerate(files)]
        headers = tuple(header for header, _ in opened)
        if weight_map is not None:
            _check_index(path / INDEX, weight_map, files, headers)
        return cls(path, config, files, tuple(stamp for _, stamp in opened), headers)

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors, {self.total_bytes} bytes)"
        )

    def info(self, name: str) -> TensorInfo:
        """The tensor called ``name``; FastmergeError with the nearest name where there is none."""
        found = self.tensors.get(name)
        if found is None:
            hint = nearest(name, self.tensors, limit=3)
            raise FastmergeError(f"{self.path}: no tensor {show(name)}; {hint}")
        return found

    def view(self, name: str, *, raw: bool = False) -> _C.View:
        """The mapped tensor: its elements, or bytes if ``raw`` or of a type without kernels."""
        info = self.info(name)
        mapping = self._mapping(info.file)
        if raw or not info.dtype.mergeable:
            return mapping.view(info.begin, info.nbytes, "RAW")
        return mapping.view(info.begin, info.count, info.dtype.code)

    def prefetch(self, name: str) -> None:
        """Brings the tensor's pages in; blocks while a cold disk is read: call it from a thread."""
        info = self.info(name)
        self._mapping(info.file).prefetch(info.begin, info.nbytes)

    def drop(self, name: str) -> None:
        """The tensor will not be read again: its pages stop counting as this process's memory."""
        info = self.info(name)
        self._mapping(info.file).drop(info.begin, info.nbytes)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) that identifies the weights without reading them all.

        Over, file by file in order: the file's size and its header bytes; then samples of 4 KiB
        at the start, the middle and the end of every tensor (the whole of one that has at most
        12 KiB). Where that makes more than 12 288 samples, every n-th is taken, n the smallest
        that fits. Names and dates of files do not enter: equal copies have equal fingerprints.
        A change that misses every sample goes unseen (see ``stamp`` for noticing those).
        """
        digest = hashlib.sha256(b"fastmerge checkpoint 1")
        spots: list[tuple[int, int, int]] = []
        for info in self.tensors.values():
            if info.nbytes <= 3 * _SAMPLE_BYTES:
                spots.append((info.file, info.begin, info.nbytes))
                continue
            last = info.nbytes - _SAMPLE_BYTES
            spots += ((info.file, info.begin + at, _SAMPLE_BYTES) for at in (0, last // 2, last))
        step = max(1, -(-len(spots) // _MAX_SAMPLES))
        by_file: dict[int, list[tuple[int, int]]] = {}
        for file, begin, nbytes in spots[::step]:
            by_file.setdefault(file, []).append((begin, nbytes))
        for index, path in enumerate(self.files):
            digest.update(self.stamp[index].size.to_bytes(8, "little") + self._digests[index])
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    # Read-ahead would turn every 4 KiB into 128.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                    for begin, nbytes in by_file.get(index, ()):
                        digest.update(os.pread(descriptor, nbytes, begin))
                finally:
                    os.close(descriptor)
            except OSError as error:
                _unreadable(path, error)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises FastmergeError where a file is not the one whose header was read."""
        for path, stamp in zip(self.files, self.stamp, strict=True):
            try:
                now = _stamp(path, os.stat(path))
            except OSError as error:
                _unreadable(path, error)
            if now != stamp:
                raise _changed(path)

    def _mapping(self, index: int) -> _C.Mapping:
        found = self._mappings.get(index)
        if found is not None:
            return found
        with self._lock:
            if index not in self._mappings:
                path = self.files[index]
                try:
                    mapping = _C.Mapping(str(path))
                    now = _stamp(path, os.stat(path))
                except OSError as error:
                    _unreadable(path, error)
                # Reading on would use the offsets of a header that is no longer there.
                if now != self.stamp[index] or mapping.size != now.size:
                    raise _changed(path)
                self._mappings[index] = mapping
            return self._mappings[index]


def side_files(path: Path) -> dict[str, Path]:
    """What a merged model takes over from the one at ``path``, by name: config, tokenizer, ..."""
    folder = path if path.is_dir() else path.parent
    found = {
        file.name: file
        for pattern in _SIDE_PATTERNS
        for file in folder.glob(pattern)
        if file.is_file()
    }
    found.pop(INDEX, None)
    return dict(sorted(found.items()))


def resolve(reference: str, *, revision: str | None = None) -> Path:
    """The local path of ``reference``: a folder, a file, or else a Hub id, ``org/name[@revision]``.

    The safetensors weights and side files of a Hub id come from huggingface_hub's cache or are
    downloaded into it. Raises FastmergeError that says what was tried.
    """
    local = Path(reference).expanduser()
    if reference and local.exists():  # Path('') would be the current folder
        return local
    name, _, pinned = reference.partition("@")
    if revision is not None and pinned and pinned != revision:
        raise FastmergeError(
            f"{reference}: revision '{revision}' contradicts '@{pinned}'; give one of them"
        )
    if not _HUB_ID.fullmatch(name):
        raise FastmergeError(
            f"{reference}: no such folder or file (and not a Hub id of the form org/name)"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FastmergeError(
            f"{reference}: not a local folder, and fetching it from the Hub needs "
            f"`pip install huggingface_hub`"
        ) from None
    try:
        # `*` crosses folders in these patterns: without the second list, `original/` comes along.
        found = snapshot_download(
            name,
            revision=revision or pinned or None,
            allow_patterns=list(_HUB_PATTERNS),
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (
        Exception
    ) as error:  # its own, httpx's, requests' and the OS's errors share no base class
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise FastmergeError(
            f"{reference}: not a local folder, and the Hub did not provide it "
            f"({type(error).__name__}: {reason[:200]})"
        ) from error
    return Path(found)


# --- finding the files ---


def _find_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        weight_map = _read_weight_map(index)
        names = sorted(set(weight_map.values()))
        if single.exists() and names != [SINGLE]:
            raise FastmergeError(
                f"{folder}: has both {SINGLE} and {INDEX} for other files; remove the stale one"
            )
        for name in names:
            if name.startswith("/") or ".." in name.split("/"):
                raise FastmergeError(f"{index}: shard {show(name)} lies outside the folder")
            if not (folder / name).exists():
                raise FastmergeError(
                    f"{index}: shard {show(name)} is missing; download or copy it again"
                )
        return tuple(folder / name for name in names), weight_map
    if single.exists():
        return (single,), None
    if single.is_symlink():
        raise FastmergeError(f"{single}: a link to nothing ({os.readlink(single)}); mend the link")
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if any("-of-" in name for name in others):
        raise FastmergeError(f"{folder}: has shards but no {INDEX}; download or copy it again")
    if any((folder / f"adapter_model.{kind}").exists() for kind in ("safetensors", "bin")):
        raise FastmergeError(
            f"{folder}: a LoRA adapter, not a model; merge it into its base with peft first"
        )
    if others:
        raise FastmergeError(f"{folder}: no {SINGLE}; to use {others[0]}, name that file itself")
    pickled = sorted(
        file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{suffix}")
    )
    if pickled:
        raise FastmergeError(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code; convert: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto')"
            f".save_pretrained('{folder}-safe', safe_serialization=True)\""
        )
    if any(folder.glob("*.gguf")):
        raise FastmergeError(f"{folder}: GGUF files, which are quantised; get the safetensors ones")
    raise FastmergeError(f"{folder}: no {SINGLE} or {INDEX} in it")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_object(index, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FastmergeError(f"{index}: has no 'weight_map'")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise FastmergeError(f"{index}: tensor {show(name)} has no shard name")
    return weight_map


def _check_index(
    index: Path, weight_map: Mapping[str, str], files: tuple[Path, ...], headers: Iterable[_Header]
) -> None:
    missing = dict(weight_map)
    for file, header in zip(files, headers, strict=True):
        shard = file.relative_to(index.parent).as_posix()
        for info in header.tensors:
            place = missing.pop(info.name, None)
            if place == shard:
                continue
            place = weight_map.get(info.name)
            where = (
                f"but the index places it in '{place}'"
                if place
                else "but the index does not list it"
            )
            raise FastmergeError(
                f"{file}: has tensor {show(info.name)}, {where}; one of the two is stale"
            )
    for name, shard in missing.items():
        raise FastmergeError(f"{index}: tensor {show(name)} is not in its shard '{shard}'")


# --- one header ---


class _Header(NamedTuple):
    tensors: list[TensorInfo]  # in file order
    metadata: dict[str, str]
    digest: bytes


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


def _parse_object(data: bytes, *, strict: bool) -> dict[str, Any]:
    """One JSON object; ValueError says what it is instead. strict: no duplicate keys, no NaN."""
    try:
        text = data.decode("utf-8")
        if strict:
            found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        else:
            found = json.loads(text)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _read_object(path: Path, *, strict: bool = False) -> dict[str, Any]:
    try:
        return _parse_object(path.read_bytes(), strict=strict)
    except OSError as error:
        _unreadable(path, error)
    except ValueError as error:
        raise FastmergeError(f"{path}: {error}") from None


def _unreadable(path: Path, error: OSError) -> NoReturn:
    raise FastmergeError(f"{path}: cannot be read ({error.strerror or error})") from error


def _changed(path: Path) -> FastmergeError:
    return FastmergeError(f"{path}: changed while it was being read; run again when it is complete")


def _stamp(path: Path, info: os.stat_result) -> Stamp:
    return Stamp(str(path.resolve()), info.st_size, info.st_mtime_ns, info.st_ino)


def _read_header(path: Path, file: int) -> tuple[_Header, Stamp]:
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FastmergeError(f"{path}: not a regular file")
            size = status.st_size
            if size < 8:
                raise FastmergeError(f"{path}: truncated: {size} bytes, not even a header length")
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if length == _LFS_POINTER:
                raise FastmergeError(f"{path}: a Git LFS pointer, not the file; run: git lfs pull")
            if length > MAX_HEADER_BYTES:
                raise FastmergeError(
                    f"{path}: header length {length} is over {MAX_HEADER_BYTES}; not safetensors"
                )
            if length > size - 8:
                raise FastmergeError(
                    f"{path}: truncated: {size} bytes, but its header alone takes {8 + length}"
                )
            data = os.pread(descriptor, length, 8)
        finally:
            os.close(descriptor)
    except OSError as error:
        _unreadable(path, error)
    try:
        if not data.startswith(b"{"):
            raise ValueError("does not start with '{'")
        parsed = _parse_object(data, strict=True)
        metadata = _check_metadata(parsed.pop("__metadata__", {}))
        tensors = [_check_tensor(name, entry, file, 8 + length) for name, entry in parsed.items()]
        tensors.sort(key=lambda info: (info.begin, info.nbytes))
        _check_coverage(tensors, 8 + length, size)
    except ValueError as error:
        raise FastmergeError(f"{path}: bad header: {error}") from None
    return _Header(tensors, metadata, hashlib.sha256(data).digest()), _stamp(path, status)


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("__metadata__ must map strings to strings")
    return metadata


_FIELDS = {"dtype", "shape", "data_offsets"}


def _check_tensor(name: str, entry: Any, file: int, data_begin: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(
            f"tensor {show(name)} must have dtype, shape and data_offsets, and nothing else"
        )
    if not name.isascii():
        _check_text(name)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ValueError(f"tensor {show(name)} has unknown dtype {show(str(code))}")
    if not _are_sizes(shape):
        raise ValueError(
            f"tensor {show(name)} has shape {show(str(shape))}; need non-negative integers"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"tensor {show(name)} has data_offsets {show(str(offsets))}; need [begin, end]"
        )
    count = math.prod(shape)
    # A zero in the shape must not hide an overflow from readers that multiply in 64 bits.
    if math.prod(size or 1 for size in shape) * dtype.bits > _MAX_INT:
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
    return TensorInfo(name, dtype, tuple(shape), file, data_begin + begin, end - begin, count)


def _check_text(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"tensor {show(name)} has a name that is not Unicode text") from None


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _MAX_INT for item in value
    )


def _check_coverage(tensors: Iterable[TensorInfo], data_begin: int, size: int) -> None:
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
