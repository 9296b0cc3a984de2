"""The output before it is written: which tensor goes to which byte of which file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastmerge.dtypes import DType
from fastmerge.errors import OutputError
from fastmerge.limits import MAX_HEADER_BYTES
from fastmerge.models.folder import INDEX, SINGLE
from fastmerge.models.header import show
from fastmerge.once import cached_property
from fastmerge.records import record

_ALIGN = 4096  # where a shard's data begins: readers' maps and direct reads start on a page


@record(slots=True)
class Slot:
    """Where one output tensor goes."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    shard: int  # index into Layout.shards
    begin: int  # byte offset in that file
    nbytes: int
    count: int  # elements


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, the bytes before the data, its exact size."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Layout:
    """Every byte of the output but the weights: which file, which offset, which header.

    slots: by name, in file order. Work in that order: it is the one that needs the fewest buffers.
    """

    shards: tuple[Shard, ...]
    slots: dict[str, Slot]
    total_bytes: int  # of all tensors
    index: bytes | None  # model.safetensors.index.json, where there is more than one shard

    @classmethod
    def plan(
        cls,
        tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
        *,
        max_shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
        single: str = SINGLE,
    ) -> Layout:
        """Lays out ``tensors`` (name, dtype, shape), filling shards in the given order.

        A shard holds at most ``max_shard_bytes`` of tensors, or one larger tensor. Inside a shard
        wider types come first, so that every element is aligned. ``metadata`` joins
        ``{"format": "pt"}`` in every header. ``single``: the name of the file where one takes all.
        Equal arguments give equal bytes. Raises FastmergeError for a duplicate name.
        """
        groups: list[list[tuple[str, DType, tuple[int, ...], int, int]]] = [[]]
        room = max_shard_bytes
        for name, dtype, shape in tensors:
            count = 1
            for size in shape:
                count *= size
            nbytes = dtype.bytes_for(count)
            if groups[-1] and nbytes > room:
                groups.append([])
                room = max_shard_bytes
            room -= nbytes
            groups[-1].append((name, dtype, shape, count, nbytes))
        shards: list[Shard] = []
        slots: dict[str, Slot] = {}
        for number, group in enumerate(groups):
            group.sort(key=lambda entry: -entry[1].bits)
            name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
            name = single if len(groups) == 1 else name
            shards.append(_plan_shard(number, name, group, dict(metadata or {}), slots))
        if len(slots) != len(tensors):
            names = [name for name, _, _ in tensors]
            twice = next(name for name in names if names.count(name) > 1)
            raise OutputError(f"output: tensor {show(twice)} is there twice")
        total = sum(slot.nbytes for slot in slots.values())
        index = None
        if len(shards) > 1:
            weight_map = {name: shards[slots[name].shard].name for name in sorted(slots)}
            document = {"metadata": {"total_size": total}, "weight_map": weight_map}
            index = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
        return cls(tuple(shards), slots, total, index)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of every header and file name."""
        found = hashlib.sha256()
        for shard in self.shards:
            found.update(shard.name.encode() + b"\0" + shard.header)
        return found.hexdigest()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the weight files and, where there are several, of the index."""
        return (*(shard.name for shard in self.shards), *([INDEX] if self.index else []))

    @property
    def file_bytes(self) -> int:
        """What the shards take on disk."""
        return sum(shard.size for shard in self.shards)


def _plan_shard(
    number: int,
    name: str,
    group: Iterable[tuple[str, DType, tuple[int, ...], int, int]],
    metadata: dict[str, str],
    slots: dict[str, Slot],
) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for tensor, dtype, shape, _, nbytes in group:
        entries[tensor] = {
            "dtype": dtype.code,
            "shape": list(shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # The format allows spaces after the header, and its own library pads with them (to 8).
    text += b" " * (-(8 + len(text)) % _ALIGN)
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(f"output: the header of {name} is over 100 MB; use smaller shards")
    begin = 8 + len(text)
    for tensor, dtype, shape, count, nbytes in group:
        slots[tensor] = Slot(tensor, dtype, tuple(shape), number, begin, nbytes, count)
        begin += nbytes
    return Shard(name, len(text).to_bytes(8, "little") + text, begin)
