"""Models that are in memory: state dictionaries of torch tensors or NumPy arrays, and modules."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge import _C
from fastmerge.dtypes import BY_NAME, DType
from fastmerge.errors import FastmergeError, UnsupportedError, brief
from fastmerge.models.checkpoint import open_model
from fastmerge.models.foreign import held_to_protocol
from fastmerge.models.memory import Extent, check_torch, dtype_of, is_torch, place_of, view_of
from fastmerge.models.model import Model, TensorInfo, stored_bytes
from fastmerge.once import cached_property

_numbers = itertools.count()


class StateDict:
    """A `Model` of tensors in memory, by name; nothing is copied. Those on a GPU have no view."""

    folder = None
    places: tuple[Path, ...] = ()

    def __init__(self, label: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Raises FastmergeError for what is no tensor with memory of its own."""
        self.label, self.config = label, config
        self.held: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, tensor in tensors.items():
            where = f"{label}: {brief(name)}"
            if not isinstance(name, str) or any("\ud800" <= letter <= "\udfff" for letter in name):
                raise FastmergeError(f"{where}: names of tensors must be text that UTF-8 can say")
            held = _plain(tensor, where)
            self.held[name] = held
            shape = tuple(int(size) for size in held.shape)
            count = int(np.prod(shape, dtype=np.int64))
            dtype = _dtype(held, where)
            self.tensors[name] = TensorInfo(name, dtype, shape, dtype.bytes_for(count), count)
        # What is written into the same memory is seen by nothing but its bytes.
        self.stamp: tuple[Hashable, ...] = ("memory", next(_numbers))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of names, types, shapes and, of tensors in the host's memory, all bytes."""
        digest = hashlib.sha256(b"fastmerge state dict 1")
        for name, info in self.tensors.items():
            digest.update(f"\n{name!r} {info.dtype.code} {info.shape} ".encode())
            if str(getattr(self.held[name], "device", "cpu")) == "cpu":
                digest.update(stored_bytes(self.view(name, raw=True)).data)
        return digest.hexdigest()

    def view(self, name: str, *, raw: bool = False) -> _C.View:
        held, info = self.held[name], self.tensors[name]
        if str(getattr(held, "device", "cpu")) != "cpu":
            raise UnsupportedError(
                f"{self.label}: {name}: is on {held.device}, and the CPU is to read it; pass "
                "every tensor on one device"
            )
        if not raw and info.dtype.kernels:
            return view_of(held, f"{self.label}: {name}")
        address = held.data_ptr() if is_torch(held) else held.ctypes.data
        return _C.View(address, info.nbytes, "RAW", held)

    def prefetch(self, name: str) -> None:
        pass

    def drop(self, name: str) -> None:
        pass

    def check_unchanged(self) -> None:
        pass

    def side_files(self) -> Mapping[str, bytes | Path]:
        return {}


def as_model(source: Any, label: str) -> Model:
    """What a caller gives for a model: one already, a folder or a .safetensors file, a state
    dictionary, or a torch module, whose ``config`` comes along where transformers gave it one.

    Raises FastmergeError for anything else.
    """
    if isinstance(source, (str, os.PathLike)):
        return open_model(Path(source))
    if isinstance(source, Mapping):
        return StateDict(label, source, {})
    if callable(getattr(source, "state_dict", None)) and not isinstance(source, type):
        as_dict = getattr(getattr(source, "config", None), "to_dict", None)
        return StateDict(label, held_by(source, label), as_dict() if callable(as_dict) else {})
    if hasattr(source, "tensors") and hasattr(source, "view"):
        return held_to_protocol(source, label)
    raise FastmergeError(
        f"{label}: must be a folder, a state dictionary or a module, not {type(source).__name__}"
    )


def held_by(module: Any, where: str) -> Mapping[str, Any]:
    """The tensors of a module, or of what has a ``state_dict`` as one has; FastmergeError where
    that is none.
    """
    found = module.state_dict()
    if not isinstance(found, Mapping):
        raise FastmergeError(f"{where}: its state_dict() is no dictionary, but {brief(found)}")
    return found


def is_made_anew(first: Any, second: Any) -> bool:
    """Whether two looks at one place gave two tensors: what is written into one is seen by none."""
    return first is not second and (
        is_torch(first) != is_torch(second) or place_of(first) != place_of(second)
    )


def _plain(tensor: Any, where: str) -> Any:
    if isinstance(tensor, np.ndarray):
        if isinstance(tensor, np.ma.MaskedArray):
            raise FastmergeError(f"{where}: a masked array; pass its numbers, x.filled(0)")
        if not tensor.flags.c_contiguous:
            raise FastmergeError(f"{where}: not contiguous; pass np.ascontiguousarray(x)")
        return tensor
    if not is_torch(tensor):
        raise FastmergeError(
            f"{where}: must be a tensor, not {type(tensor).__name__}; {_remedy(tensor)}"
        )
    check_torch(tensor, where)
    if tensor.is_meta:
        raise UnsupportedError(f"{where}: on 'meta' it has no numbers; load the model's weights")
    if not tensor.is_contiguous():
        raise FastmergeError(f"{where}: not contiguous; pass tensor.contiguous()")
    return tensor.detach()


def _remedy(value: Any) -> str:
    """What to give for a model that holds something else than tensors: a module's extra state, the
    step of a training, or the tensors themselves one floor below, as trainers save them.
    """
    if isinstance(value, Mapping) and any(is_array(own) for own in value.values()):
        return "pass that one, which holds the tensors, in the dictionary's place"
    return "pass a dictionary of the tensors alone, without it"


def is_array(value: Any) -> bool:
    """Whether it is a tensor of torch's or an array of NumPy's."""
    return isinstance(value, np.ndarray) or is_torch(value)


def _dtype(tensor: Any, where: str) -> DType:
    named = str(tensor.dtype).removeprefix("torch.")
    if isinstance(tensor, np.ndarray) and tensor.dtype == np.uint16:
        return dtype_of(tensor, where)  # bfloat16's bits
    found = BY_NAME.get(named)
    if found is None:
        raise UnsupportedError(f"{where}: tensors of {named} are not known")
    return found


def memory_of(model: Model, name: str) -> Extent | None:
    """Where a tensor lies; None where it has no place in memory, or no bytes."""
    if not isinstance(model, StateDict) or not model.tensors[name].nbytes:
        return None
    tensor = model.held[name]
    return place_of(tensor)


def check_apart(targets: Mapping[str, Any], reads: Iterable[tuple[Model, str, str]]) -> None:
    """Raises FastmergeError where what is written for one name is memory that is read or written
    for another. ``reads``: a model, its tensor's name, and the name that it is read for.
    """
    read = [
        (*place, name)
        for model, stored, name in reads
        if (place := memory_of(model, stored)) is not None
    ]
    written_to = {name: place_of(target) for name, target in targets.items()}

    def hits(name: str, place: Extent) -> bool:
        own = written_to.get(name)
        return own is not None and own[0] < place[1] and place[0] < own[1]

    widest = (0, 0, "")
    for span in sorted([*read, *((*place, name) for name, place in written_to.items())]):
        begin, end, name = span
        other = widest[2]
        meets = begin < widest[1] and name != other
        if meets and (hits(name, widest[:2]) or hits(other, (begin, end))):
            raise FastmergeError(
                f"'{name}' and '{other}' share memory, so one would be overwritten before it is "
                "read; give other tensors"
            )
        if end > widest[1]:
            widest = span
