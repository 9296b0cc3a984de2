"""What a merge reads: any source of named tensors with a config. A folder on disk is one."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.dtypes import BF16, DType
from fastmerge.errors import UnsupportedError
from fastmerge.records import record

_BLOCK_BYTES = 1 << 20


@record(slots=True)
class TensorInfo:
    """One tensor, before a weight of it is read.

    ``name``: in its model. ``dtype``: a `DType` of `fastmerge.dtypes`. ``shape``: its sides.
    ``nbytes``: as it is stored. ``count``: of elements.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    count: int


class Model(Protocol):
    """One model; safe to share between threads. What it cannot give, it raises FastmergeError for.

    `fastmerge.models.checkpoint.Checkpoint` is one on disk; a recipe's names may stand for others
    (``models`` of `fastmerge.api.plan`); docs/plugins.md has one that is a dictionary. Properties,
    which plain attributes may be: ``label`` (str), ``config`` (mapping), ``tensors`` (mapping of
    names to `TensorInfo`), ``fingerprint`` (str), ``stamp`` (tuple), ``folder`` (Path or None),
    ``places`` (tuple of Path).
    """

    @property
    def label(self) -> str:
        """What messages call it: usually the path."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json as it is read; {} where there is none."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By name, in the order to read them."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digits that identify the weights."""
        ...

    @property
    def stamp(self) -> tuple[Hashable, ...]:
        """What changes when it is touched: cheap to compare, proves nothing about content."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where its tokenizer and config lie, for libraries that read folders."""
        ...

    @property
    def places(self) -> tuple[Path, ...]:
        """The files and folders that it is read from, which no output may touch."""
        ...

    def view(self, name: str, *, raw: bool = False) -> _C.View:
        """The tensor's memory: ``_C.View(address, count, code, owner)``, ``count`` elements at
        ``address``, of the type that ``code`` is in safetensors ("F32", "F16", "BF16"); of "RAW"
        the elements are bytes. ``owner`` is kept alive while the view is.

        ``name``: of one of `tensors`. ``raw``: as bytes, as those without kernels always are.
        Returns the view.
        """
        ...

    def prefetch(self, name: str) -> None:
        """Tells that a tensor will be read soon; may block while it is brought in. ``name``: of one
        of `tensors`.
        """
        ...

    def drop(self, name: str) -> None:
        """Tells that a tensor will not be read again soon. ``name``: of one of `tensors`."""
        ...

    def check_unchanged(self) -> None:
        """Raises FastmergeError where it is not what it was when it was opened."""
        ...

    def side_files(self) -> Mapping[str, bytes | Path]:
        """Returns what a merged model takes over from it beside the weights, by name: tokenizer,
        ...
        """
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A `Model` whose tensors come from afar, and may be on their way before they are wanted."""

    def expect(self, names: Sequence[str], nbytes: int) -> None:
        """Those tensors will be read, in this order; until they are dropped, up to ``nbytes`` of
        memory may hold them ahead. A later call takes the place of an earlier one.
        """
        ...


def folder_of(model: Model) -> Path:
    """The model's folder, for libraries that read one; UnsupportedError where it has none."""
    if model.folder is None:
        raise UnsupportedError(
            f"{model.label}: is in no folder, and its tokenizer is read from one; save it first"
        )
    return model.folder


def same_bytes(a: Model, of_a: str, b: Model, of_b: str) -> bool:
    """Whether tensor ``of_a`` of one model and ``of_b`` of another, or the same, have the same
    bytes; compared in blocks of 1 MiB, until the first that differs.
    """
    x, y = stored_bytes(a.view(of_a, raw=True)), stored_bytes(b.view(of_b, raw=True))
    if x.size != y.size:
        return False
    try:
        return all(
            np.array_equal(x[at : at + _BLOCK_BYTES], y[at : at + _BLOCK_BYTES])
            for at in range(0, x.size, _BLOCK_BYTES)
        )
    finally:
        a.drop(of_a)
        b.drop(of_b)


def same_numbers(a: Model, of_a: str, b: Model, of_b: str) -> bool:
    """Whether two tensors of floats that merge, of as many elements, hold the same numbers, however
    they are stored; compared in blocks of 256 Ki elements, until the first that differs.
    """
    x, y, kind_x, kind_y = a.view(of_a), b.view(of_b), a.tensors[of_a].dtype, b.tensors[of_b].dtype
    step = _BLOCK_BYTES // 4
    try:
        return all(
            np.array_equal(
                numbers_of(x, kind_x, at, at + step), numbers_of(y, kind_y, at, at + step)
            )
            for at in range(0, a.tensors[of_a].count, step)
        )
    finally:
        a.drop(of_a)
        b.drop(of_b)


def as_numbers(stored: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """float32 for the floats of up to 32 bits, exactly; float64 for the rest. ``stored``: elements
    as ``dtype.numpy`` names them.
    """
    if dtype is BF16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32 if dtype.kernels else np.float64)


def numbers_of(view: _C.View, dtype: DType, begin: int, end: int) -> NDArray[Any]:
    """Elements [begin, end) of a view of this type, up to its last, as `as_numbers` has them."""
    size = dtype.bytes_for(1) if view.dtype == "RAW" else 1
    stored = stored_bytes(view.slice(size * begin, min(size * end, view.count)))
    return as_numbers(stored.view(dtype.numpy or "u1"), dtype)


def stored_bytes(view: _C.View) -> NDArray[np.uint8]:
    """The memory of a view, flat and as it is: no copy, good for as long as its owner is."""
    if not view.nbytes:
        return np.zeros(0, np.uint8)
    memory = (ctypes.c_ubyte * view.nbytes).from_address(view.address)
    return np.ctypeslib.as_array(memory)
