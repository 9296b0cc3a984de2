"""Where the tensors of a merge go: a model folder, arrays in memory, or what others plug in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.compute.across import Shared
from fastmerge.compute.tensor import Outcome
from fastmerge.models.header import Stamp, show
from fastmerge.models.side_files import bytes_of
from fastmerge.output.checksum import Written
from fastmerge.output.layout import Layout
from fastmerge.output.lineage import (
    LINEAGE_FILE,
    lineage_file,
    lineage_head,
    metadata,
    tensor_lineage,
)
from fastmerge.output.provenance import names
from fastmerge.output.share import Part, costs
from fastmerge.output.shipping import Destination
from fastmerge.output.writer import ModelWriter
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.plan import Plan

if TYPE_CHECKING:
    from fastmerge.output.part import PartWriter


class Sink(Protocol):
    """Takes each tensor once, several at a time from several threads, in order or nearly.

    `fastmerge.merge` writes to a folder; for another sink run the plan yourself: ``for item,
    outcome in fastmerge.engine.executor.Local(plan).run(sink)``. docs/plugins.md has one.
    """

    @property
    def scratch_folder(self) -> Path | None:
        """Where intermediates lie that memory has no room for; None: memory takes them all."""
        ...

    def pending(self, items: Iterable[TensorPlan]) -> list[TensorPlan]:
        """Those of ``items`` that it wants, in the order to compute them."""
        ...

    def slot(self, item: TensorPlan) -> _C.Sink:
        """Where the kernels write the tensor: elements, or RAW bytes of a type without kernels. Of
        one with an encoding, codes and scales are asked for apart (`TensorPlan.written`).
        """
        ...

    def parts(self, item: TensorPlan) -> Callable[[int, int], _C.Sink]:
        """The tensor by its parts, instead of ``slot``: a function of (first byte, bytes) that
        gives a RAW sink; every byte once, in order or nearly.
        """
        ...

    def computed(self, item: TensorPlan, outcome: Outcome) -> None:
        """The tensor is complete in its slot."""
        ...


class Arrays:
    """Tensors as new NumPy arrays: floats, bfloat16's bits in uint16, or raw bytes."""

    scratch_folder = None

    def __init__(self, wanted: Container[str] | None = None) -> None:
        """``wanted``: the names of those to make; None is all."""
        self._wanted = wanted
        self._made: dict[str, NDArray[Any]] = {}

    def pending(self, items: Iterable[TensorPlan]) -> list[TensorPlan]:
        return [item for item in items if self._wanted is None or item.name in self._wanted]

    def slot(self, item: TensorPlan) -> _C.Sink:
        self._made[item.name], sink = array_sink(item)
        return sink

    def parts(self, item: TensorPlan) -> Callable[[int, int], _C.Sink]:
        self.slot(item)
        array = self._made[item.name]
        address = array.ctypes.data
        return lambda begin, nbytes: _C.MemorySink(_C.View(address + begin, nbytes, "RAW", array))

    def computed(self, item: TensorPlan, outcome: Outcome) -> None:
        pass

    def take(self, item: TensorPlan) -> NDArray[Any]:
        """The finished tensor, which the sink lets go of."""
        return self._made.pop(item.name)


def array_sink(item: TensorPlan) -> tuple[NDArray[Any], _C.Sink]:
    """A new array for one output tensor, and the sink that fills it."""
    array: NDArray[Any]
    if item.dtype.mergeable:
        array = np.empty(item.shape, item.dtype.numpy)
    else:
        array = np.empty(item.nbytes, np.uint8)
    if item.dtype.kernels:
        view = _C.View(array.ctypes.data, array.size, item.dtype.code, array)
    else:
        view = _C.View(array.ctypes.data, array.nbytes, "RAW", array)
    return array, _C.MemorySink(view)


class ModelFolder:
    """A folder that is absent or whole; use it as a context manager (`ModelWriter` has the rest).

    An interrupted merge of the same plan goes on where it was: ``results`` then holds what its
    tensors came to.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        *,
        max_shard_bytes: int,
        staging_bytes: int,
        overwrite: bool = False,
        fresh: bool = False,
        io: str = "auto",
        side_files: Mapping[str, bytes | Path] | None = None,
        part: Part | None = None,
        to: Destination | None = None,
    ) -> None:
        """``side_files``: content, or files to copy, to be written beside the weights. ``part``:
        only that part's share of the weight files, in the folder where parts meet. ``to``: as of
        `ModelWriter`.
        """
        self._side_files = side_files or {}
        layout = Layout.plan(
            plan.written,
            max_shard_bytes=max_shard_bytes,
            metadata=metadata(plan),
        )
        self._names, self._head = names(plan), lineage_head(plan)
        self._writer: ModelWriter | PartWriter
        self._part: PartWriter | None = None
        if part is None:
            self._writer = ModelWriter(
                out,
                layout,
                key=f"{plan.key} {plan.stamps}",
                inputs=plan.places,
                overwrite=overwrite,
                fresh=fresh,
                io=io,
                side_bytes=bytes_of(self._side_files),
                staging_bytes=staging_bytes,
                to=to,
            )
        else:
            from fastmerge.output.part import PartWriter  # 8 ms that few merges need

            self._part = self._writer = PartWriter(
                out,
                layout,
                part,
                costs=costs(plan, layout),
                key=plan.key,
                inputs_key=_inputs_key(plan),
                files=self._side_files,
                lineage=self._head,
                inputs=plan.places,
                overwrite=overwrite,
                fresh=fresh,
                io=io,
                staging_bytes=staging_bytes,
                to=to,
            )
        self.layout = layout
        self.files = layout.files

    @property
    def scratch_folder(self) -> Path:
        return self._writer.scratch_folder

    @property
    def works(self) -> bool:
        """Whether there is anything to compute: a part may have no file, or be done already."""
        return self._part is None or self._part.works

    @property
    def shared(self) -> Shared | None:
        """Where parts leave what others need not compute again."""
        return None if self._part is None else self._part.shared

    @property
    def results(self) -> Mapping[str, Mapping[str, Any]]:
        """What each finished tensor came to, by name, in plain values."""
        return self._writer.results

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found of an interrupted merge, or of the disk, that is worth telling."""
        notes = []
        if damaged := self._writer.damaged:
            notes.append(
                f"{self._writer.target}: finished tensors of the interrupted merge had changed on "
                f"the disk and are merged again: {len(damaged)}, the first {show(damaged[0])}; if "
                "nobody wrote to them, check the disk"
            )
        if isinstance(self._writer, ModelWriter) and self._writer.sends:
            notes.append(
                f"{self._writer.target.parent} has no room for all weight files: they were sent "
                "one by one"
            )
        return tuple(notes)

    @property
    def bytes_written(self) -> int:
        return self._writer.bytes_written

    @property
    def direct(self) -> bool:
        """Whether the output bypasses the page cache."""
        return self._writer.direct

    def own(self, items: Iterable[TensorPlan]) -> list[TensorPlan]:
        """Those of ``items`` of which it writes anything."""
        if isinstance(self._writer, ModelWriter):
            return list(items)
        return [t for t in items if any(self._writer.is_own(part.name) for part in t.written)]

    def pending(self, items: Iterable[TensorPlan]) -> list[TensorPlan]:
        items = list(items)
        of = {item.name: item for item in items if item.encoding is None}
        of |= {part.name: item for item in items if item.encoding for part in item.written}
        wanted = map(of.__getitem__, self._writer.pending())
        # Codes and scales are one item, which is computed again where either is lost.
        return list({id(item): item for item in wanted}.values())

    def slot(self, item: TensorPlan) -> _C.Sink:
        if not self._writer.wants(item.name):  # the other of codes and scales is: this is there
            return array_sink(item)[1]
        return self._writer.sink(item.name)

    def parts(self, item: TensorPlan) -> Callable[[int, int], _C.Sink]:
        return self._writer.parts(item.name)

    def computed(self, item: TensorPlan, outcome: Outcome) -> None:
        said = tensor_lineage(item, outcome, self._names)
        for part in item.written:
            if self._writer.wants(part.name):
                self._writer.computed(part.name, said)
            said = {}

    def discard(self) -> None:
        """Leaves nothing for a later run to continue, unless this one is finished."""
        self._writer.discard()

    def finish(self, kept: Mapping[str, int]) -> None:
        """Waits for the weights, adds the side files and the lineage and shows the folder; of a
        part, notes that it is done. ``kept``: as `lineage_file` has it.
        """
        if isinstance(self._writer, ModelWriter):
            names = (*self._side_files, LINEAGE_FILE, *self.files)

            def lineage(written: Written) -> Mapping[str, bytes]:
                text = lineage_file(self._head, self.results, kept, names, written)
                return {LINEAGE_FILE: text}

            self._writer.finish(self._side_files, lineage)
        else:
            self._writer.finish(kept=kept)

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)


def _inputs_key(plan: Plan) -> str:
    """What is read, as every machine sees it that reads the same files: of a file's stamp, its
    size and time; its path and inode may be each machine's own.
    """
    stamps = [(stamp.size, stamp.mtime_ns) for stamp in plan.stamps if isinstance(stamp, Stamp)]
    text = repr([[model.fingerprint for model in plan.models], stamps])
    return hashlib.sha256(text.encode()).hexdigest()
