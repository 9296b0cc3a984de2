"""Thresholds that span all tensors of a model: found in two or three readings of the files before
the merge, exactly, with nothing of a tensor's size in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from itertools import count as numbered
from typing import Protocol, TypeVar

from fastmerge import _C
from fastmerge.compute.cpu import Passes
from fastmerge.compute.tensor import Trim, consensus_terms
from fastmerge.errors import ModelError
from fastmerge.selection import Selection, Sparsify
from fastmerge.tree.nodes import Leaf, Merge, Node

_SHARED = "trims"
TILE_ENTRIES = _C.tile_entries()  # no two tensors may share a tile


T = TypeVar("T")
T_in = TypeVar("T_in", contravariant=True)


class SelectsAcross(Protocol[T_in]):
    """A back end of the CPU, as far as it is needed here."""

    def select_across(
        self,
        inputs: Sequence[Sequence[T_in]],
        bases: Sequence[T_in],
        origins: Sequence[int],
        specs: Sequence[Sparsify],
        ends: Sequence[int] = ...,
        passes: Passes | None = ...,
        /,
    ) -> list[Selection]: ...


class Shared(Protocol):
    """What the parts of a merge find out for one another, by name; equal whoever does."""

    pieces: int  # into which work is cut that every part can do

    def get(self, name: str) -> bytes | None:
        """None where no part has put it there yet."""
        ...

    def put(self, name: str, data: bytes) -> None: ...

    def each(self, name: str, pieces: int, count: Callable[[int], bytes]) -> list[bytes]:
        """Every piece's result: count(piece), by this part or by another that is at work."""
        ...


def find_trims(
    nodes: Mapping[Merge, int],
    backend: SelectsAcross[T],
    fetch: Callable[[Leaf], T],
    shared: Shared | None = None,
) -> Mapping[Node, Trim]:
    """The trims of `Plan.spanning` (merges and element counts), from all their tensors' weights.
    With ``shared``, each part counts its piece of the tensors, and those of parts that are not at
    work; the sums, and so the thresholds, are those of one process.
    """
    if not nodes:
        return {}
    origins, end = [], 0
    for count in nodes.values():
        origins.append(end)
        end += -(-count // TILE_ENTRIES) * TILE_ENTRIES
    terms = consensus_terms(next(iter(nodes)))  # what they keep is alike for all
    total = sum(nodes.values())
    known = shared.get(_SHARED) if shared else None
    if known is not None:
        chosen = [Selection(*fields) for fields in json.loads(known)]
    else:
        chosen = backend.select_across(
            [[fetch(part) for part in node.operands if isinstance(part, Leaf)] for node in nodes],
            [fetch(node.base) for node in nodes if isinstance(node.base, Leaf)],
            origins,
            [keep.of((total,), 0) for keep in terms.keep],
            *(_in_pieces(list(nodes.values()), shared) if shared else ()),
        )
        if shared:
            shared.put(_SHARED, json.dumps(chosen).encode())
    chosen = list(terms.settled(chosen))
    if not all(math.isfinite(selection.rescale) for selection in chosen):
        raise ModelError(
            "trim: model with rescale: a model has NaN or infinite weights, which would reach "
            "every tensor; mend the model, or merge without rescale"
        )
    return {node: Trim(tuple(chosen), origin) for node, origin in zip(nodes, origins, strict=True)}


def _in_pieces(counts: Sequence[int], shared: Shared) -> tuple[list[int], Passes]:
    """Where each part's piece of the tensors ends, by their elements, and how a pass is shared."""
    total, before, ends = sum(counts), 0, [0] * shared.pieces
    for index, count in enumerate(counts):
        piece = min(shared.pieces - 1, before * shared.pieces // max(1, total))
        ends[piece] = index + 1
        before += count
    ends = list(accumulate(ends, max))
    ends[-1] = len(counts)
    numbers = numbered()

    def passes(pieces: int, count: Callable[[int], bytes]) -> list[bytes]:
        return shared.each(f"{_SHARED}-{next(numbers)}", pieces, count)

    return ends, passes
