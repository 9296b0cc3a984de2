"""A plan's models as back ends want them, and one tensor to a sink."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from fastmerge import _C
from fastmerge.compute.across import SelectsAcross, Shared, T, find_trims
from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.leaves import gathered, matrices, scale_fault, view_of
from fastmerge.compute.tensor import Computation, Outcome, Trim
from fastmerge.dtypes import F64
from fastmerge.errors import FastmergeError, ModelError, UnsupportedError, brief
from fastmerge.methods import find
from fastmerge.models.model import Model, ReadsAhead
from fastmerge.planning.inputs import Encoding, TensorPlan
from fastmerge.planning.plan import Plan
from fastmerge.tree.nodes import (
    Dequantised,
    Leaf,
    LowRank,
    Merge,
    Narrowed,
    Node,
    Rows,
    Stored,
    leaves,
    reads_rows,
    walk,
)
from fastmerge.tree.unread import keeps_equal


class Room:
    """Bytes of memory that several threads share."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes, self._taken = nbytes, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        """Waits until there is room for so many, or nothing else in it."""
        if not nbytes:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= self._nbytes)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()


class Inputs:
    """The models of a plan as `Computation` wants them: the one reader of their weights."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = models
        self._from_afar: set[int] = set()  # of the models
        self._room: Room | None = None  # of those

    def fetch(self, source: Stored) -> _C.View:
        """The tensor's memory: elements, or RAW bytes of a type without kernels."""
        model = self._models[source.model]
        found = model.view(source.name)
        if not isinstance(found, _C.View):
            raise FastmergeError(
                f"{model.label}: {type(model).__name__}.view gives {brief(found)} for "
                f"'{source.name}'; it must be a fastmerge._C.View"
            )
        return found

    def view(self, leaf: Leaf, backend: CpuBackend) -> _C.View:
        """The leaf's elements; ModelError as `check`."""
        if type(leaf) is not Stored:
            self.check(leaf)
        return view_of(leaf, backend, self.fetch)

    def check(self, leaf: Leaf) -> None:
        """Raises ModelError where scales are no numbers above 0."""
        coded = leaf.base if isinstance(leaf, LowRank) else leaf
        if not isinstance(coded, Dequantised):
            return
        fault = scale_fault(self.fetch(coded.scales))
        if fault is not None:
            label = self._models[coded.scales.model].label
            raise ModelError(
                f"{label}: tensor '{coded.scales.name}' holds {fault}, where a number above 0 is "
                "needed; the model is damaged: get it again"
            )

    @contextmanager
    def ahead(self, items: Iterable[TensorPlan], nbytes: int) -> Iterator[None]:
        """Tells the models that read ahead what is read for ``items``, in order; they share
        ``nbytes`` of memory for it, until the end. No more than that is in use by several tensors
        at a time: one that takes more is merged alone.
        """
        order: dict[int, dict[str, None]] = {
            number: {} for number, model in enumerate(self._models) if isinstance(model, ReadsAhead)
        }
        if not order:
            yield
            return
        for item in items:
            for source in item.sources:
                if source.model in order:
                    order[source.model][source.name] = None
        self._from_afar, self._room = set(order), Room(nbytes)
        reading = [number for number, names in order.items() if names]
        for number in reading:
            self._expect(number, list(order[number]), nbytes // len(reading))
        try:
            yield
        finally:
            for number in reading:
                self._expect(number, (), 0)
            self._from_afar, self._room = set(), None

    def _expect(self, number: int, names: Sequence[str], nbytes: int) -> None:
        model = self._models[number]
        assert isinstance(model, ReadsAhead)
        model.expect(names, nbytes)

    @contextmanager
    def reading(self, sources: Sequence[Stored]) -> Iterator[Inputs]:
        """Asks for the sources' pages ahead, and lets go of them behind; in between, the inputs
        with views that are made once.
        """
        afar, room = self._from_afar, self._room
        nbytes = sum(source.nbytes for source in sources if source.model in afar) if afar else 0
        with nullcontext() if room is None else room.taken(nbytes):
            for source in sources:
                self._models[source.model].prefetch(source.name)
            yield _Once(self._models)
            for source in sources:
                self._models[source.model].drop(source.name)

    def reduced(self, item: TensorPlan, pool: _C.Pool) -> TensorPlan:
        """The tensor made of one source where all are equal and its tree keeps that: what training
        left alone comes out as its bytes. Most tensors differ in the first 4 KiB.
        """
        root = item.root
        if not isinstance(root, Merge):
            return item
        views: list[_C.View] | None = None
        first: Stored | Dequantised | Narrowed | None = None
        nodes: Sequence[Node] = root.inputs if root.is_flat else walk(root)
        for leaf in nodes:
            if isinstance(leaf, Merge):
                continue
            if not isinstance(leaf, (Stored, Dequantised, Narrowed)):
                return item
            if first is None or views is None:
                first, views = leaf, [self.fetch(stored) for stored in leaf.stored]
            elif (_stored_as(leaf), leaf.shape) != (_stored_as(first), first.shape) or not all(
                _C.equal(pool, view, self.fetch(stored))
                for view, stored in zip(views, leaf.stored, strict=True)
            ):
                return item
        if first is None or not keeps_equal(root):
            return item
        # Not a bare copy: what is NaN or infinite is counted.
        return replace(item, root=Merge(find("passthrough"), (first,), None, {}, ({},)))


def _stored_as(leaf: Stored | Dequantised | Narrowed) -> object:
    if isinstance(leaf, Stored):
        return None
    return leaf.coding if isinstance(leaf, Dequantised) else F64


class _Once(Inputs):
    """The inputs of one tensor, of which each view is asked for up to four times."""

    def __init__(self, models: Sequence[Model]) -> None:
        super().__init__(models)
        self._views: dict[int, tuple[Stored, _C.View]] = {}  # by the id of what is kept there

    def fetch(self, source: Stored) -> _C.View:
        found = self._views.get(id(source))
        if found is None:
            found = self._views[id(source)] = source, super().fetch(source)
        return found[1]


def trims_of(
    plan: Plan,
    backend: SelectsAcross[T],
    fetch: Callable[[Leaf], T],
    shared: Shared | None = None,
) -> Mapping[Node, Trim]:
    """The trims that span all tensors, which are found before the first one is merged."""
    for number, model in enumerate(plan.models) if plan.spanning else ():
        if isinstance(model, ReadsAhead) and any(
            leaf.model == number for node in plan.spanning for leaf in leaves((node,))
        ):
            raise UnsupportedError(
                f"{model.label}: trim: model reads all tensors two or three times, which of a "
                "remote model would have to lie in memory; download it first, or trim by tensor"
            )
    return find_trims(plan.spanning, backend, fetch, shared)


def needs_host(item: TensorPlan) -> bool:
    """Whether the CPU alone makes a tensor: rows from several places (a merge has one or two such
    tensors), and whatever has to do with float64.
    """
    return item.in_float64 or item.dtype == F64 or reads_rows(item.root)


def on_host(item: TensorPlan) -> bool:
    """Whether the CPU makes a tensor in a merge on GPUs, with their bits: what it must, and what is
    only copied or read, or written as codes.
    """
    return item.encoding is not None or isinstance(item.root, Leaf) or needs_host(item)


def is_double(item: TensorPlan) -> bool:
    """Whether no kernel can write a tensor: its arithmetic is float64, or what is written."""
    root = item.root
    is_copied = isinstance(root, Stored) and root.dtype == F64
    return item.in_float64 or (item.dtype == F64 and not is_copied)


def write_tensor(
    backend: CpuBackend,
    inputs: Inputs,
    item: TensorPlan,
    slots: Sequence[_C.Sink],
    spanning: Mapping[Node, Trim] | None = None,
) -> Outcome:
    """One output tensor into the ``slots`` of what it fills: copied byte for byte when nothing is
    to be computed.
    """
    root = item.root
    computation = computation_of(backend, inputs, item, spanning)
    if item.encoding is None:
        if isinstance(root, Leaf) and not root.inputs and root.dtype == item.dtype:
            _C.copy(backend.pool, inputs.view(root, backend), slots[0])
            return Outcome()
        return computation.run(root, slots[0])
    same = _same_codes(root, item.encoding)
    if same is not None:
        for stored, slot in zip(same.stored, slots, strict=True):
            _C.copy(backend.pool, inputs.fetch(stored), slot)
        return Outcome(rounding=(0.0, 0.0))
    numbers, to = backend.scratch(item.count)
    outcome = computation.run(root, to)
    return replace(outcome, rounding=_encode(backend, item, numbers, slots, outcome.nonfinite))


def computation_of(
    backend: CpuBackend,
    inputs: Inputs,
    item: TensorPlan,
    spanning: Mapping[Node, Trim] | None,
) -> Computation[_C.View, _C.Sink]:
    """What computes the tensor with the kernels."""

    def view(leaf: Leaf) -> _C.View:
        return inputs.view(leaf, backend)

    def gather(leaf: Rows, sources: Mapping[Node, _C.View]) -> _C.View:
        return gathered(leaf, backend, sources)

    return Computation(backend, view, item.name, item.shape, spanning, gather)


def _same_codes(root: Node, encoding: Encoding) -> Dequantised | None:
    """The leaf whose codes and scales are those to write: a copy's."""
    if isinstance(root, Merge) and root.method.name == "passthrough":
        scale = root.operand_values[0].get("scale")
        root = root if scale is not None else root.operands[0]
    if not isinstance(root, Dequantised) or root.coding != encoding.coding:
        return None
    types = (root.codes.dtype, root.scales.dtype, root.scales.shape)
    wanted = (encoding.codes.dtype, encoding.scales.dtype, encoding.scales.shape)
    return root if types == wanted else None


def _encode(
    backend: CpuBackend,
    item: TensorPlan,
    numbers: _C.View,
    slots: Sequence[_C.Sink],
    nonfinite: int,
) -> tuple[float, float]:
    """Rounds a tensor's numbers to codes; the sums of squared errors and of squares."""
    assert item.encoding is not None
    coding = item.encoding.coding
    if nonfinite and coding.code == "mxfp4":
        raise ModelError(
            f"{item.name}: {nonfinite} merged numbers are NaN or infinite, which mxfp4 has no code "
            "for; write another type (out_dtype: bfloat16), or mend the models"
        )
    rows, cols, block = matrices(coding, item.shape)
    codes, scales = slots
    _, error, size = _C.quantise(
        backend.pool, numbers, coding.code, codes, scales, rows=rows, cols=cols,
        block_rows=block[0], block_cols=block[1], power_of_two=item.encoding.power_of_two,
    )  # fmt: skip
    return error, size
