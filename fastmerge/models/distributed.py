"""One model that PyTorch's distributed checkpoints (DCP) hold: ``.metadata`` and ``.distcp`` files.

Needs torch, which is imported when such a folder is opened: each piece of a tensor is what its
``torch.save`` writes, and is read by its reader of weights alone.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge import _C
from fastmerge.dtypes import BY_NAME
from fastmerge.errors import ModelError, ResourceError
from fastmerge.limits import MAX_HEADER_BYTES
from fastmerge.models.distributed_index import Entry, ForeignError, Piece, overlap, read_index
from fastmerge.models.folder import DISTRIBUTED_INDEX
from fastmerge.models.header import Stamp, open_regular, read_object, show, stamp_of, unreadable
from fastmerge.models.links import Home
from fastmerge.models.memory import view_of
from fastmerge.models.model import TensorInfo
from fastmerge.models.names import is_of_optimizer
from fastmerge.models.side_files import SideFiles, side_files
from fastmerge.once import cached_property

if TYPE_CHECKING:
    import torch

_SAMPLE_BYTES = 4096
# What a training loop calls the dictionary with the weights, beside the optimizer's.
_WRAPPERS = frozenset({"model", "module", "state_dict"})


class Distributed:
    """The tensors of one DCP folder, a `Model`; ``path``: the folder that the user named.

    A tensor is read into memory, joined from its ranks' pieces, when it is asked for, and let go of
    behind: that memory is the caller's to bound. Safe to share between threads.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        """Raises ModelError for what is missing, malformed or not torch's, ResourceError where
        there is no torch.
        """
        self.path, self._at = path, folder
        self._home = Home(folder)
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read_names(_entries(self._home.inside(folder / DISTRIBUTED_INDEX)))
        self.files = self._check_pieces()
        self.stamp = tuple(
            _stamp(file) for file in (self._home.root / DISTRIBUTED_INDEX, *self.files)
        )
        self.config: dict[str, Any] = {}
        for place in dict.fromkeys((folder, path)):
            if (place / "config.json").exists():
                self.config = read_object(Home(place).inside(place / "config.json"))
                break
        self._lock = threading.Lock()
        self._held: dict[str, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What another process reads the same files by."""
        return {name: own for name, own in vars(self).items() if name not in ("_lock", "_held")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()
        self._held = {}

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> Path:
        return self.path

    @property
    def places(self) -> tuple[Path, ...]:
        return (self.path,)

    def side_files(self) -> SideFiles:
        """What a merged model takes over from it beside the weights, by name: tokenizer, ..."""
        return side_files(self.path, self.files)

    def __repr__(self) -> str:
        return f"Distributed({str(self.path)!r}, {len(self.tensors)} tensors)"

    def view(self, name: str, *, raw: bool = False) -> _C.View:
        """The tensor, read into memory: its elements, or bytes if ``raw`` or without kernels."""
        tensor, info = self._tensor(name), self.tensors[name]
        if not raw and info.dtype.kernels:
            return view_of(tensor, f"{self.label}: {name}")
        return _C.View(tensor.data_ptr(), info.nbytes, "RAW", tensor)

    def prefetch(self, name: str) -> None:
        """Reads the tensor; blocks until it is there: call it from a thread."""
        self._tensor(name)

    def drop(self, name: str) -> None:
        """The tensor will not be read again soon: its memory is free once no view is left."""
        with self._lock:
            self._held.pop(name, None)

    def check_unchanged(self) -> None:
        """Raises ModelError where a file is not the one that was opened."""
        for stamp in self.stamp:
            if _stamp(Path(stamp.path)) != stamp:
                raise _changed(Path(stamp.path))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the index, the files' sizes, and 4 KiB at the start, the middle and
        the end of each file: a change that misses those goes unseen.
        """
        digest = hashlib.sha256(b"fastmerge distributed 1")
        digest.update(_content(self._home.root / DISTRIBUTED_INDEX))
        for path in self.files:
            try:
                with open_regular(path) as file:
                    size = os.fstat(file.fileno()).st_size
                    digest.update(size.to_bytes(8, "little"))
                    for at in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                        digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, at))
            except OSError as error:
                unreadable(path, error)
        return digest.hexdigest()

    # --- the index ---

    def _read_names(self, entries: list[Entry]) -> None:
        keys: dict[str, str] = {}
        for entry in entries:
            name, dtype = _name_of(entry), BY_NAME[entry.dtype]
            if name in keys:
                raise ModelError(
                    f"{self.path}: tensor {show(name)} is there twice, as {show(keys[name])} "
                    f"and {show(entry.key)}"
                )
            keys[name] = entry.key
            count = math.prod(entry.shape)
            nbytes = dtype.bytes_for(count)
            self.tensors[name] = TensorInfo(name, dtype, entry.shape, nbytes, count)
            if is_of_optimizer(name):
                continue
            if entry.pieces is None:
                raise ModelError(
                    f"{self._at / DISTRIBUTED_INDEX}: does not say where tensor {show(name)} lies"
                )
            self._pieces[name] = entry.pieces
        if not self._pieces:
            raise ModelError(f"{self.path}: its {DISTRIBUTED_INDEX} lists no tensors of a model")

    def _check_pieces(self) -> tuple[Path, ...]:
        """The files; ModelError where a tensor is not what its pieces and their bytes make."""
        files: dict[str, tuple[Path, int]] = {}
        for name, pieces in self._pieces.items():
            info, where = self.tensors[name], f"{self.path}: tensor {show(name)}"
            covered = sum(piece.elements for piece in pieces)
            if covered != info.count:
                raise ModelError(f"{where}: its pieces have {covered} of {info.count} elements")
            try:
                twice = overlap(pieces)
            except ValueError as error:
                raise ModelError(f"{where}: {error}; save the checkpoint again") from None
            if twice:
                raise ModelError(f"{where}: its pieces overlap, so that others are missing")
            for piece in pieces:
                if piece.file not in files:
                    files[piece.file] = self._file(piece.file)
                least = info.dtype.bytes_for(piece.elements)
                if piece.length < least or piece.offset + piece.length > files[piece.file][1]:
                    raise ModelError(
                        f"{where}: cannot be read ({piece.length} bytes at {piece.offset} of "
                        f"{show(piece.file)}, for {least}); copy the folder again"
                    )
        self._places = {name: path for name, (path, _) in files.items()}
        return tuple(path for _, (path, _) in sorted(files.items()))

    def _file(self, name: str) -> tuple[Path, int]:
        if not name or name.startswith("/") or ".." in name or "\0" in name:
            raise ModelError(f"{self._at / DISTRIBUTED_INDEX}: names a file outside the folder")
        try:
            if not os.path.lexists(self._at / name):
                raise ModelError(f"{self._at}: {show(name)} is missing; copy it again")
            path = self._home.inside(self._at / name)
            with open_regular(path) as file:
                return path, os.fstat(file.fileno()).st_size
        except OSError as error:
            unreadable(self._at / name, error)

    # --- reading ---

    def _tensor(self, name: str) -> torch.Tensor:
        with self._lock:
            found = self._held.get(name)
        if found is None:
            found = self._read(name)
            with self._lock:
                found = self._held.setdefault(name, found)
        return found

    def _read(self, name: str) -> torch.Tensor:
        import torch

        if name not in self._pieces:
            raise ModelError(f"{self.path}: no tensor {show(name)}")
        info, where = self.tensors[name], f"{self.path}: tensor {show(name)}"
        tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype.name))
        for piece in self._pieces[name]:
            path = self._places[piece.file]
            try:
                found = _loaded(_slice(path, piece))
            except OSError as error:
                unreadable(path, error)
            except Exception as error:  # what damaged bytes lead torch's reader to
                said = " ".join(str(error).split())[:120] or type(error).__name__
                raise ModelError(
                    f"{where}: cannot be read ({said}); copy the folder again"
                ) from error
            if not isinstance(found, torch.Tensor) or found.layout != torch.strided:
                raise ModelError(f"{where}: is not what torch writes; copy the folder again")
            if (tuple(found.shape), found.dtype) != (piece.shape, tensor.dtype):
                raise ModelError(
                    f"{where}: {show(piece.file)} has {list(found.shape)} of {found.dtype}, where "
                    f"the index says {list(piece.shape)} of {tensor.dtype}; copy the folder again"
                )
            box = zip(piece.begin, piece.shape, strict=True)
            tensor[tuple(slice(at, at + size) for at, size in box)].copy_(found)
        return tensor


def _slice(path: Path, piece: Piece) -> bytearray:
    with open_regular(path) as file:
        file.seek(piece.offset)
        data = bytearray(piece.length)
        view, at = memoryview(data), 0
        while at < len(data):
            count = file.readinto(view[at:])
            if not count:
                raise EOFError(f"{at} of {len(data)} bytes are there")
            at += count
    return data


def _loaded(data: bytearray) -> Any:
    """What ``torch.save`` wrote, which packs nothing: what is packed could be of any size."""
    import torch

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
    stored = all(each.compress_type == zipfile.ZIP_STORED for each in members)
    if not stored or sum(each.file_size for each in members) > len(data):
        raise ValueError("packed, as torch writes nothing")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _name_of(entry: Entry) -> str:
    """What the model calls the tensor; of the optimizer's, a name that says so."""
    for at, part in enumerate(entry.path):
        if is_of_optimizer(part):
            return f"optimizer.{entry.key}"
        if part in _WRAPPERS and at + 1 < len(entry.path):
            return ".".join(entry.path[at + 1 :])
    return entry.key


def _entries(path: Path) -> list[Entry]:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            f"{path.parent}: a PyTorch distributed checkpoint, and reading one needs torch "
            "(pip install torch)"
        ) from error
    try:
        return read_index(_content(path))
    except ForeignError as error:
        raise ModelError(
            f"{path}: names '{' '.join(str(error).split())[:120]}', which torch writes into no "
            "index; it is damaged, or would run somebody's code"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path}: not an index of torch's ({error})") from error


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_HEADER_BYTES:
                raise ModelError(
                    f"{path}: over {MAX_HEADER_BYTES} bytes; not an index: save it again"
                )
            return file.read()
    except OSError as error:
        unreadable(path, error)


def _stamp(path: Path) -> Stamp:
    try:
        return stamp_of(path, os.stat(path))
    except OSError as error:
        unreadable(path, error)


def _changed(path: Path) -> ModelError:
    return ModelError(f"{path}: changed while it was being read; run again when it is complete")
