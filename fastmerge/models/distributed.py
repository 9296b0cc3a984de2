"""One model that PyTorch's distributed checkpoints (DCP) hold: ``.metadata`` and ``.distcp`` files.

Read through torch's own reader, which is imported when such a folder is opened. Its index is a
pickle: it is opened only where it names nothing but the classes that torch writes there.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge import _C
from fastmerge.dtypes import BY_NAME
from fastmerge.errors import ModelError, ResourceError, UnsupportedError
from fastmerge.limits import MAX_HEADER_BYTES
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
# All that torch 2.0 to 2.13 pickles into an index.
_CLASSES: Mapping[str, set[str] | None] = {
    "torch.distributed.checkpoint.metadata": None,  # any of its own
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *BY_NAME},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


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
        self._metadata = _read_index(self._home.inside(folder / DISTRIBUTED_INDEX))
        self._keys: dict[str, str] = {}  # in the index, by the tensor's name
        self.tensors: dict[str, TensorInfo] = {}
        self._read_names()
        self.files = self._find_files()
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
        if not raw and info.dtype.mergeable:
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

    def _read_names(self) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        nested = self._metadata.planner_data
        nested = nested if isinstance(nested, Mapping) else {}
        for key, found in self._metadata.state_dict_metadata.items():
            if not isinstance(found, TensorStorageMetadata):
                continue  # a step, a learning rate, a random state
            name = _name_of(key, nested.get(key))
            named = str(found.properties.dtype).removeprefix("torch.")
            dtype = BY_NAME.get(named)
            if dtype is None:
                if is_of_optimizer(name):
                    continue
                raise UnsupportedError(f"{self.path}: tensor {show(name)} is {named}")
            if name in self.tensors:
                raise ModelError(
                    f"{self.path}: tensor {show(name)} is there twice, as {show(self._keys[name])} "
                    f"and {show(key)}"
                )
            shape = tuple(int(size) for size in found.size)
            count = math.prod(shape)
            self._keys[name] = key
            self.tensors[name] = TensorInfo(name, dtype, shape, dtype.bytes_for(count), count)
        if all(map(is_of_optimizer, self.tensors)):
            raise ModelError(f"{self.path}: its {DISTRIBUTED_INDEX} lists no tensors of a model")

    def _find_files(self) -> tuple[Path, ...]:
        stored = self._metadata.storage_data
        if not isinstance(stored, Mapping):
            raise ModelError(
                f"{self._at / DISTRIBUTED_INDEX}: says nothing of where the tensors lie"
            )
        wanted = {key for name, key in self._keys.items() if not is_of_optimizer(name)}
        names = {
            place.relative_path
            for index, place in stored.items()
            if getattr(index, "fqn", None) in wanted
        }
        files = []
        for name in sorted(names, key=str):
            if not isinstance(name, str) or not name or name.startswith("/") or ".." in name:
                raise ModelError(f"{self._at / DISTRIBUTED_INDEX}: names a file outside the folder")
            if not (self._at / name).exists():
                raise ModelError(f"{self._at}: {show(name)} is missing; copy it again")
            files.append(self._home.inside(self._at / name))
        return tuple(files)

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
        from torch.distributed.checkpoint.default_planner import (
            DefaultLoadPlanner,
            create_default_local_load_plan,
        )
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        if name not in self.tensors:
            raise ModelError(f"{self.path}: no tensor {show(name)}")
        info, key = self.tensors[name], self._keys[name]
        where = f"{self.path}: tensor {show(name)}"
        tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype.name))
        reader = FileSystemReader(self._home.root)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            reader.set_up_storage_reader(self._metadata, True)
            planner.set_up_planner({key: tensor}, self._metadata, True)
            plan = create_default_local_load_plan({key: tensor}, self._metadata)
            covered = sum(math.prod(item.lengths) for item in plan.items)
            if covered != info.count:
                raise ModelError(f"{where}: its pieces have {covered} of {info.count} elements")
            reader.read_data(plan, planner).wait()
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, AssertionError) as error:
            said = " ".join(str(error).split())[:120] or type(error).__name__
            raise ModelError(f"{where}: cannot be read ({said}); copy the folder again") from error
        except pickle.UnpicklingError as error:
            raise ModelError(f"{where}: is not what torch writes; copy the folder again") from error
        return tensor


def _name_of(key: str, path: Any) -> str:
    """What the model calls the tensor that the index has under ``key``, whose place in the saved
    dictionaries is ``path`` where that is known; of the optimizer's, a name that says so.
    """
    places = [str(part) for part in path] if isinstance(path, (tuple, list)) else [key]
    for at, part in enumerate(places):
        if is_of_optimizer(part):
            return f"optimizer.{key}"
        if part in _WRAPPERS and at + 1 < len(places):
            return ".".join(places[at + 1 :])
    return ".".join(places)


class _Unpickler(pickle.Unpickler):
    """Takes torch's own classes of an index, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _CLASSES:
            names = _CLASSES[module]
            found = super().find_class(module, name)
            own = isinstance(found, type) and found.__module__ == module
            if (own if names is None else name in names) and "." not in name:
                return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def _read_index(path: Path) -> Any:
    try:
        from torch.distributed.checkpoint.metadata import Metadata
    except ImportError as error:
        raise ResourceError(
            f"{path.parent}: a PyTorch distributed checkpoint, and reading one needs torch "
            "(pip install torch)"
        ) from error
    text = _content(path)
    try:
        found = _Unpickler(io.BytesIO(text)).load()
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: names '{' '.join(str(error).split())[:120]}', which torch writes into no "
            "index; it is damaged, or would run somebody's code"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
        raise ModelError(f"{path}: not an index of torch's ({type(error).__name__})") from error
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, Mapping):
        raise ModelError(f"{path}: not an index of torch's")
    return found


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_HEADER_BYTES:
                raise ModelError(f"{path}: over {MAX_HEADER_BYTES} bytes; not an index")
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
