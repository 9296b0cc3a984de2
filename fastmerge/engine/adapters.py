"""Writes adapters: pieces computed several at a time, into a folder that is absent or whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.arguments import a_function
from fastmerge.compute.cpu import cpu, isa
from fastmerge.dtypes import DType
from fastmerge.engine.report import MergeReport, PeakMemory, nonfinite_of
from fastmerge.engine.window import in_order
from fastmerge.errors import FastmergeError
from fastmerge.models.side_files import LINEAGE_FILE
from fastmerge.output.adapter import adapter_files, adapter_layout, adapter_lineage, by_module
from fastmerge.output.writer import ModelWriter
from fastmerge.planning.adapter_plan import AdapterPlan
from fastmerge.progress import Progress, Told

_SIDE_BYTES = 1 << 20  # config, card and lineage
_STAGING_BYTES = 96 << 20

Content = NDArray[np.float32] | _C.View  # numbers to round, or what is copied as it is


class Made(NamedTuple):
    """A piece's tensors, in its order, and what is told of it in plain values."""

    tensors: Sequence[Content]
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together: the factors of one module, or one that is copied.

    ``tensors``: names, types and shapes, all of one type. ``make`` is called from several threads.
    """

    module: str
    tensors: tuple[tuple[str, DType, tuple[int, ...]], ...]
    bytes_in: int
    make: Callable[[], Made]

    @property
    def nbytes(self) -> int:
        return sum(dtype.bytes_for(int(np.prod(shape))) for _, dtype, shape in self.tensors)


def write_adapter(
    plan: AdapterPlan,
    pieces: Sequence[Piece],
    config: Mapping[str, Any],
    method: Sequence[str],
    out: Path,
    *,
    threads: int,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
) -> tuple[MergeReport, dict[str, Mapping[str, Any]]]:
    """Makes the pieces and writes them with ``config`` to the folder ``out``; the report, and what
    was told of each module. An interrupted run is continued, as `merge_plan` does. ``method``: how
    they were made, for the card.
    """
    started = time.perf_counter()
    a_function(progress, "progress")
    # Wider types lie first in the file, and pieces are best made in its order.
    pieces = sorted(pieces, key=lambda piece: -piece.tensors[0][1].bits)
    backend = cpu(threads)
    writer = ModelWriter(
        out,
        adapter_layout(plan, [tensor for piece in pieces for tensor in piece.tensors]),
        key=f"{plan.key} {plan.stamps}",
        inputs=plan.places,
        overwrite=overwrite,
        fresh=fresh,
        side_bytes=_SIDE_BYTES,
        staging_bytes=_STAGING_BYTES,
    )
    with writer:
        left = set(writer.pending())
        todo = [piece for piece in pieces if any(name in left for name, _, _ in piece.tensors)]

        def make(piece: Piece) -> None:
            made = piece.make()
            pairs = zip(piece.tensors, made.tensors, strict=True)
            for number, ((name, _, _), content) in enumerate(pairs):
                if name in left:
                    told = {} if number else {"module": piece.module, **made.told}
                    nonfinite = _put(backend.pool, content, writer.sink(name))
                    writer.computed(name, told | ({"nonfinite": nonfinite} if nonfinite else {}))

        total = sum(piece.bytes_in + piece.nbytes for piece in pieces)
        done = total - sum(piece.bytes_in + piece.nbytes for piece in todo)
        told, peak = Told(progress, total, done), PeakMemory()
        with closing(in_order(make, todo, threads)) as finished:
            for piece, _ in finished:
                peak.look()
                told.add(piece.bytes_in + piece.nbytes, piece.module)
        try:
            plan.check_unchanged()
        except FastmergeError:
            writer.discard()
            raise
        writer.finish(
            adapter_files(plan, config, writer.target.name, method),
            lambda written: {LINEAGE_FILE: adapter_lineage(plan, writer.results, written)},
        )
    tensors = sum(len(piece.tensors) for piece in pieces)
    report = MergeReport(
        out=out,
        seconds=time.perf_counter() - started,
        bytes_read=sum(piece.bytes_in for piece in todo),
        bytes_written=writer.bytes_written,
        tensors=tensors,
        resumed=tensors - sum(len(piece.tensors) for piece in todo),
        threads=threads,
        isa=isa(),
        backend="cpu",
        io="direct" if writer.direct else "buffered",
        seed=plan.seed,
        peak_anonymous_bytes=peak.nbytes,
        nonfinite=nonfinite_of(writer.results),
        notes=tuple(plan.notes),
    )
    return report, by_module(writer.results)


def _put(pool: _C.Pool, content: Content, sink: _C.Sink) -> int:
    """Rounds numbers to the sink's type, once, and counts those that are not finite there; copies
    what is stored.
    """
    if isinstance(content, _C.View):
        _C.copy(pool, content, sink)
        return 0
    array = np.ascontiguousarray(content)
    view = _C.View(array.ctypes.data, array.size, "F32", array)
    return _C.combine(pool, [view], np.ones(1), sink)
