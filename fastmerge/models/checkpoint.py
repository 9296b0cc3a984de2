"""One model on disk: its tensors, its mapped weights, its fingerprint.

Every header is read and checked when it is opened; weights are mapped when they are asked for.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

from fastmerge import _C
from fastmerge.errors import FastmergeError, ModelError, nearest
from fastmerge.models.folder import INDEX, check_index, find_distributed, find_files
from fastmerge.models.header import (
    FileTensor,
    Header,
    Stamp,
    open_regular,
    read_header,
    read_object,
    readable,
    show,
    stamp_of,
    unreadable,
)
from fastmerge.models.links import Home
from fastmerge.models.model import Model
from fastmerge.models.side_files import SideFiles, side_files
from fastmerge.once import cached_property

_SAMPLE_BYTES = 4096
_FEW_PAGES_BYTES = 16 << 10  # to ask for them takes longer than to read them
_MAX_SAMPLES = 12_288  # 48 MiB: under a second even where every read is a seek on flash


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
        headers: tuple[Header, ...],
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

    def __getstate__(self) -> dict[str, Any]:
        """What another process maps the same files by, which has locks and mappings of its own."""
        return {name: own for name, own in vars(self).items() if name not in ("_lock", "_mappings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()
        self._mappings = {}

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
            raise ModelError(f"{path}: the path is not UTF-8; rename the folder") from None
        with readable(path):
            return cls._open(path)

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        config: dict[str, Any] = {}
        weight_map: dict[str, str] | None = None
        if path.is_dir():
            files, weight_map = find_files(path)
        elif path.suffix == ".safetensors" and path.exists():
            files = (path,)
        elif path.exists():
            raise ModelError(f"{path}: not a model folder or a .safetensors file")
        else:
            raise ModelError(f"{path}: no such file or folder")
        beside = (path if path.is_dir() else path.parent) / "config.json"
        if beside.is_symlink() and not beside.exists():
            raise ModelError(f"{beside}: a link to nothing ({os.readlink(beside)}); mend the link")
        if beside.exists():
            config = read_object(beside, Home(beside.parent).inside(beside))
        places = [_place(path, file) for file in files]
        opened = [
            read_header(file, index, place)
            for index, (file, place) in enumerate(zip(files, places, strict=True))
        ]
        headers = tuple(header for header, _ in opened)
        if weight_map is not None:
            check_index(path / INDEX, weight_map, files, headers)
        return cls(path, config, files, tuple(stamp for _, stamp in opened), headers)

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def places(self) -> tuple[Path, ...]:
        return (self.path,)

    def side_files(self) -> SideFiles:
        """What a merged model takes over from it beside the weights, by name: tokenizer, ..."""
        return side_files(self.path, self.files)

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors, {self.total_bytes} bytes)"
        )

    def info(self, name: str) -> FileTensor:
        """The tensor called ``name``; FastmergeError with the nearest name where there is none."""
        found = self.tensors.get(name)
        if found is None:
            hint = nearest(name, self.tensors, limit=3)
            raise ModelError(f"{self.path}: no tensor {show(name)}; {hint}")
        return found

    def view(self, name: str, *, raw: bool = False) -> _C.View:
        """The mapped tensor: its elements, or bytes if ``raw`` or of a type without kernels."""
        info = self.info(name)
        mapping = self._mapping(info.file)
        if raw or not info.dtype.kernels:
            return mapping.view(info.begin, info.nbytes, "RAW")
        return mapping.view(info.begin, info.count, info.dtype.code)

    def prefetch(self, name: str) -> None:
        """Brings the tensor's pages in; blocks while a cold disk is read: call it from a thread."""
        info = self.info(name)
        if info.nbytes >= _FEW_PAGES_BYTES:
            self._mapping(info.file).prefetch(info.begin, info.nbytes)

    def drop(self, name: str) -> None:
        """The tensor will not be read again: its pages stop counting as this process's memory.
        Raises ModelError where a page of its file was gone when it was read.
        """
        info = self.info(name)
        mapping = self._mapping(info.file)
        if info.nbytes >= _FEW_PAGES_BYTES:
            mapping.drop(info.begin, info.nbytes)

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
                with open_regular(_place(self.path, path)) as opened:
                    descriptor = opened.fileno()
                    # Read-ahead would turn every 4 KiB into 128.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                    for begin, nbytes in by_file.get(index, ()):
                        digest.update(os.pread(descriptor, nbytes, begin))
            except OSError as error:
                unreadable(path, error)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises FastmergeError where a file is not the one whose header was read."""
        for path, stamp in zip(self.files, self.stamp, strict=True):
            try:
                now = stamp_of(path, os.stat(path))
            except OSError as error:
                unreadable(path, error)
            if now != stamp:
                raise _changed(path)
        for index in self._mappings:
            self._mapping(index)

    def _mapping(self, index: int) -> _C.Mapping:
        """The mapped file; ModelError from then on when a page that was read of it had gone."""
        found = self._mappings.get(index)
        if found is not None:
            if found.torn:
                raise _changed(self.files[index])
            return found
        with self._lock:
            if index not in self._mappings:
                path = self.files[index]
                try:
                    with open_regular(_place(self.path, path)) as opened:
                        mapping = _C.Mapping(f"/proc/self/fd/{opened.fileno()}")
                        now = stamp_of(path, os.fstat(opened.fileno()))
                except OSError as error:
                    unreadable(path, error)
                # Reading on would use the offsets of a header that is no longer there.
                if now != self.stamp[index] or mapping.size != now.size:
                    raise _changed(path)
                self._mappings[index] = mapping
            return self._mappings[index]


def _place(model: Path, file: Path) -> Path:
    """Where a file of the model really lies; ModelError where that is not in its folder."""
    return Home(model).inside(file) if model.is_dir() else file


def open_model(path: Path) -> Model:
    """The model at ``path``: a `Checkpoint`, or a `Distributed` where PyTorch's distributed
    checkpoint lies there. Raises FastmergeError.
    """
    with readable(path):
        folder = find_distributed(path)
    if folder is None:
        return Checkpoint.open(path)
    from fastmerge.models.distributed import Distributed

    return Distributed(path, folder)


def _changed(path: Path) -> FastmergeError:
    return ModelError(f"{path}: changed while it was being read; run again when it is complete")
