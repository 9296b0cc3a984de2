"""What the index of a PyTorch distributed checkpoint (``.metadata``) says.

The index is a pickle, and a stranger's. Nothing that it names is imported: each class of torch's
becomes a record of what it would have been made of, in classes that one reading alone has, so that
what a pickle does to them (it may set attributes of classes) touches nothing else.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastmerge.dtypes import BY_NAME
from fastmerge.limits import MAX_COMPARED_PIECES, MAX_DIMENSIONS, MAX_OFFSET

Sizes = tuple[int, ...]

_LEAST_BYTES = 8  # that a piece takes in an index; without a bound, references repeat one for ever
# What Python's pickles from 3.8 on (protocols 4 and 5) are made of, and how many bytes follow each;
# negative: a length of so many bytes, and then what it says. Others may ask for any memory: PUT.
_FOLLOWED = {
    0: "FRAME PROTO STOP MARK MEMOIZE BINGET LONG_BINGET STACK_GLOBAL REDUCE NEWOBJ BUILD NONE "
    "NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS",
    1: "SHORT_BINUNICODE LONG1",
    4: "BINUNICODE LONG4",
}
_OPCODES = {
    ord(each.code): 0 if each.arg is None else each.arg.n if each.arg.n >= 0 else -size
    for size, names in _FOLLOWED.items()
    for each in pickletools.opcodes
    if each.name in names.split()
}
_METADATA = "torch.distributed.checkpoint.metadata"
# All that torch 2.0 to 2.13 pickles into an index.
_NAMES: Mapping[str, frozenset[str]] = {
    _METADATA: frozenset({
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    }),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch": frozenset({"Size", *BY_NAME}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePosixPath"}),
    "pathlib._local": frozenset({"Path", "PosixPath", "PurePosixPath"}),
}  # fmt: skip


class _Place(NamedTuple):
    file: str
    offset: int
    length: int


class Piece(NamedTuple):
    """A box of a tensor, and where it lies: ``length`` bytes of ``file`` from ``offset`` on."""

    begin: Sizes
    shape: Sizes
    file: str
    offset: int
    length: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Entry(NamedTuple):
    """A tensor. path: its keys in the saved dictionaries, of which ``key`` is made. pieces: None
    where the index does not say where they lie.
    """

    key: str
    path: tuple[str, ...]
    dtype: str
    shape: Sizes
    pieces: tuple[Piece, ...] | None


class ForeignError(Exception):
    """What the pickle names, and torch does not write."""


def read_index(data: bytes) -> list[Entry]:
    """The tensors in the index ``data``, in its order. Raises ForeignError, ValueError for what
    torch does not write.
    """
    try:
        _check_opcodes(data)
        root = _Reader(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise ForeignError(str(error)) from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
        raise ValueError(type(error).__name__) from error
    said = _state(root, "Metadata")
    listed, stored = _mapping(said.get("state_dict_metadata")), said.get("storage_data")
    paths = said.get("planner_data")
    paths = paths if isinstance(paths, dict) else {}
    places = _places(_mapping(stored)) if stored is not None else {}
    left = len(data) // _LEAST_BYTES
    found = []
    for key, entry in listed.items():
        if type(key) is not str:
            raise ValueError("a tensor's key is no text")
        if not _is(entry, "TensorStorageMetadata"):
            continue  # a step, a learning rate, a random state
        about = _state(entry, "TensorStorageMetadata")
        shape, chunks = _sizes(about.get("size")), about.get("chunks")
        if not isinstance(chunks, list):
            raise ValueError("a tensor without its pieces")
        left -= len(chunks)
        if left < 0:
            raise ValueError("one piece is told many times")
        boxes = [_box(chunk, shape) for chunk in chunks]
        known = all((key, begin) in places for begin, _ in boxes)
        pieces = tuple(_piece(box, places[key, box[0]]) for box in boxes) if known else None
        found.append(
            Entry(key, _path(paths.get(key), key), _dtype(about.get("properties")), shape, pieces)
        )
    return found


def overlap(pieces: Iterable[Piece]) -> bool:
    """Whether any two pieces of a tensor do. ValueError where that takes too long to see."""
    rest = sorted((piece for piece in pieces if piece.elements), key=lambda piece: piece.begin)
    near: list[Piece] = []
    compared = 0
    for piece in rest:
        if piece.begin:
            near = [other for other in near if other.begin[0] + other.shape[0] > piece.begin[0]]
        compared += len(near)
        if compared > MAX_COMPARED_PIECES:
            raise ValueError("too many of its pieces lie side by side")
        if any(_meet(piece, other) for other in near):
            return True
        near.append(piece)
    return False


def _piece(box: tuple[Sizes, Sizes], place: _Place) -> Piece:
    return Piece(*box, place.file, place.offset, place.length)


def _meet(one: Piece, other: Piece) -> bool:
    ranges = zip(one.begin, one.shape, other.begin, other.shape, strict=True)
    return all(a < b + n and b < a + m for a, m, b, n in ranges)


# --- the pickle ---


def _check_opcodes(data: bytes) -> None:
    """Raises ValueError for what no index is made of."""
    at, end = 0, len(data)
    while at < end:
        size = _OPCODES.get(data[at])
        if size is None:
            raise ValueError(f"opcode {data[at]:#x}")
        at += 1
        if size < 0:
            at -= size
            size = int.from_bytes(data[at + size : at], "little")
        at += size


class _Record:
    """What an object of torch's would have been made of: the arguments, and its state."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        base = dict if module == "collections" else _Record
        return self._classes.setdefault((module, name), type(name, (base,), {}))


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Record) and type(value).__name__ == kind


def _state(value: Any, kind: str) -> dict[str, Any]:
    if not _is(value, kind):
        raise ValueError(f"no {kind}")
    return _mapping(value.state)


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError("no mapping where torch writes one")
    return value


# --- its values ---


def _sizes(value: Any) -> Sizes:
    given = value.args[0] if _is(value, "Size") and len(value.args) == 1 else value
    if not isinstance(given, (tuple, list)) or len(given) > MAX_DIMENSIONS:
        raise ValueError("a shape is none")
    if not all(type(size) is int and 0 <= size <= MAX_OFFSET for size in given):
        raise ValueError("a shape is none")
    if math.prod(size or 1 for size in given) > MAX_OFFSET // 8:
        raise ValueError("a shape overflows")
    return tuple(given)


def _box(chunk: Any, shape: Sizes) -> tuple[Sizes, Sizes]:
    about = _state(chunk, "ChunkStorageMetadata")
    begin, sizes = _sizes(about.get("offsets")), _sizes(about.get("sizes"))
    if not len(begin) == len(sizes) == len(shape):
        raise ValueError("a piece has other dimensions than its tensor")
    if any(a + n > size for a, n, size in zip(begin, sizes, shape, strict=True)):
        raise ValueError("a piece lies outside its tensor")
    return begin, sizes


def _dtype(properties: Any) -> str:
    state = properties.state if _is(properties, "TensorProperties") else None
    named = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(named, type) or named.__name__ not in BY_NAME:
        raise ValueError("a tensor's type is none")
    return named.__name__


def _path(given: Any, key: str) -> tuple[str, ...]:
    """The keys of which torch makes one, with dots between them."""
    if isinstance(given, (tuple, list)) and len(given) <= len(key) + 1:
        parts = tuple(str(part) for part in given if type(part) in (str, int))
        if len(parts) == len(given) and ".".join(parts) == key:
            return parts
    return (key,)


def _places(stored: Mapping[Any, Any]) -> dict[tuple[str, Sizes], _Place]:
    """File, offset and length, by tensor and the beginning of the piece."""
    found: dict[tuple[str, Sizes], _Place] = {}
    for index, info in stored.items():
        of, about = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
        key, offset = of.get("fqn"), of.get("offset")
        file, begin, length = (about.get(n) for n in ("relative_path", "offset", "length"))
        if not isinstance(key, str) or not isinstance(file, str):
            raise ValueError("a place without a name")
        if not isinstance(begin, int) or not isinstance(length, int):
            raise ValueError("a place without its bytes")
        if not (0 <= begin <= MAX_OFFSET and 0 <= length <= MAX_OFFSET):
            raise ValueError("a place without its bytes")
        if about.get("transform_descriptors"):
            raise ValueError("its pieces are packed")
        if offset is not None:
            found[key, _sizes(offset)] = _Place(file, begin, length)
    return found
