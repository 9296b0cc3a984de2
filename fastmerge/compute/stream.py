"""Tensors from mapped files through a GPU to the writer: the engine's ``--device cuda``.

A tensor takes a lane: a CUDA stream and a ring of pinned pieces. It is copied piece by piece into
pinned memory and from there to the device, computed, and copied back the same way, all on its
lane's stream; with several tensors in flight, copies in, kernels, copies out and the disk overlap.
Device memory is handed out against a budget. A tensor that needs more than the budget, or more than
the device has left, goes through several lanes in pieces, with the same bits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, cast

import numpy as np

from fastmerge import _C
from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.devices import GPU_MEMORY_BYTES, device_bytes
from fastmerge.compute.lane import Lane, Place, reserved
from fastmerge.compute.on_device import OnDevice
from fastmerge.compute.tensor import Computation, Outcome, Trim
from fastmerge.dtypes import BY_CODE, F32
from fastmerge.errors import ResourceError, argument
from fastmerge.methods.types import Float32, Float64
from fastmerge.primitives import WHOLE, Agreement, Vectors
from fastmerge.selection import RANKED, Selection, Sparsify
from fastmerge.tree.nodes import Leaf, Merge, Node, Stored, walk

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
LANES = 3  # pieces of one tensor in flight on a device: on the way in, computed, on the way out


class Reader(Protocol):
    """What reads a plan's models."""

    def fetch(self, source: Stored) -> _C.View:
        """The tensor's memory."""
        ...

    def view(self, leaf: Leaf, backend: CpuBackend) -> _C.View:
        """The leaf's elements, computed where they are read."""
        ...

    def check(self, leaf: Leaf) -> None:
        """Raises ModelError where what the leaf reads is damaged."""
        ...


class Streamer:
    """Computes tensors on GPUs for the threads of one merge."""

    def __init__(
        self,
        devices: Sequence[str],
        cpu: CpuBackend,
        inputs: Reader,
        *,
        gpu_memory: int = GPU_MEMORY_BYTES,
        trims: Mapping[Node, Trim] | None = None,
    ) -> None:
        """``gpu_memory``: bytes of tensors in flight on each device."""
        self._trims = trims
        self.devices, self.cpu, self.budget = devices, cpu, gpu_memory
        self._inputs = inputs
        self._used = dict.fromkeys(devices, 0)
        self._free = threading.Condition()
        # An eighth for the allocator's rounding: giving memory back waits for the whole device.
        self._limits = {d: reserved(d) + gpu_memory * 9 // 8 for d in devices}
        self._idle: dict[str, list[Lane]] = {device: [] for device in devices}
        self._split: dict[str, None] = {}  # tensors larger than the budget, in order
        self._squeezed: dict[str, None] = {}  # tensors that the device had no room for

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, in sentences."""
        said = []
        if self._split:
            said.append(
                f"{_some(self._split)} needed more than {self.budget >> 20} MiB of GPU memory and "
                f"went through it in pieces; a larger {argument('gpu_memory')} is faster"
            )
        if self._squeezed:
            said.append(
                f"the GPU ran out of memory: {_some(self._squeezed)} went through it in smaller "
                f"pieces; a smaller {argument('gpu_memory')}, or fewer programs on the GPU, is "
                "faster"
            )
        return tuple(said)

    def run(self, name: str, root: Node, shape: tuple[int, ...], place: Place) -> Outcome:
        """Computes one tensor into ``place``; raises FastmergeError if not even pieces fit."""
        need = device_bytes(root, shape, place.dtype)
        if need > self.budget:
            self._split[name] = None
        else:
            outcome = self.attempt(name, lambda: self._whole(name, root, shape, place, need))
            if outcome is not None:
                return outcome
        pieces = _Pieces(self, name)

        def view(leaf: Leaf) -> _C.View:
            return self._inputs.view(leaf, self.cpu)

        return Computation(pieces, view, name, shape, self._trims).run(root, place)

    def _whole(
        self, name: str, root: Node, shape: tuple[int, ...], place: Place, need: int
    ) -> Outcome:
        with self.lane(need) as lane:
            leaves = [node for node in walk(root) if isinstance(node, Leaf)]
            for leaf in leaves:
                self._inputs.check(leaf)

            def fetch(stored: Stored) -> torch.Tensor:
                return lane.upload(self._inputs.fetch(stored))

            held = OnDevice(leaves, fetch, lane.backend)
            held.make(leaves)
            out = lane.empty(math.prod(shape), place.dtype)
            computation = Computation(lane.backend, held.__getitem__, name, shape, self._trims)
            outcome = computation.run(root, out)
            held.clear()
            lane.download(out, place)
            return outcome

    def attempt(self, name: str, work: Callable[[], T]) -> T | None:
        """``work()``, or None where the device has no room for it: others use it too.

        What the attempt held is given back first. Nothing of the tensor has reached its place by
        then: a lane's download takes no device memory.
        """
        import torch

        try:
            return work()
        except torch.cuda.OutOfMemoryError:
            self._squeezed[name] = None
        # Not in the handler: there the exception's frames still hold the tensors.
        torch.cuda.empty_cache()
        return None

    @contextmanager
    def lane(self, need: int) -> Iterator[Lane]:
        """A lane of the device with most room, for this thread, once ``need`` bytes are free there.

        The lane used last is taken first: torch keeps what a stream frees for that stream alone, so
        that memory in use by few lanes at a time must not spread over all of them.
        """
        with self._free:
            self._free.wait_for(lambda: min(self._used.values()) + need <= self.budget)
            device = min(self._used, key=self._used.__getitem__)
            self._used[device] += need
            idle = self._idle[device]
            lane = idle.pop() if idle else None
        try:
            lane = lane or Lane(device, self.cpu.pool)
            self._trim(device, lane, need)
            with lane.current():
                yield lane
        finally:
            with self._free:
                self._used[device] -= need
                if lane is not None:
                    idle.append(lane)
                self._free.notify_all()

    def _trim(self, device: str, lane: Lane, need: int) -> None:
        """Gives back what torch keeps for other streams, where more would go beyond the budget."""
        import torch

        if reserved(device) + max(0, need - lane.held) > self._limits[device]:
            torch.cuda.empty_cache()
            for other in (lane, *self._idle[device]):
                other.held = 0
        lane.held = max(lane.held, need)


def _some(names: dict[str, None]) -> str:
    first = next(iter(names))
    return first if len(names) == 1 else f"{len(names)} tensors (the first: {first})"


class _Computed(NamedTuple):
    """What `pointwise` gives: to the CPU's primitives a view, to the GPU what it follows from."""

    view: _C.View
    formula: str
    inputs: Sequence[_C.View]
    base: _C.View
    numbers: Sequence[float]
    selection: Selection | None
    factors: Float64 | None


def _piece(lane: Lane, selection: Selection, begin: int, end: int) -> Selection:
    """With the mask's words of these elements on the device, where its kernels read a mask."""
    if selection.kind != RANKED:
        return selection
    words = selection.mask.slice(begin // 32, -(-end // 32))
    return selection._replace(mask=lane.upload(words))


def _viewed(tensor: _C.View | _Computed) -> _C.View:
    return tensor.view if isinstance(tensor, _Computed) else tensor


class _Pieces:
    """The back end of one tensor too large for the device: inputs stay where they are mapped, and
    every primitive takes them through the lanes piece by piece. The bits are those of the whole.

    `select` stays on the CPU, as do all passes before the last of a `Pointwise` merge: a threshold
    is found in two or three readings of every entry, and the host's memory is nearer to the host's
    cores than to the device.
    """

    name = "triton"
    kind = np.float32

    def __init__(self, streamer: Streamer, tensor: str) -> None:
        self._streamer, self._tensor = streamer, tensor
        self._cpu = streamer.cpu

    @staticmethod
    def takes(node: Merge, parts: Sequence[Node], /) -> str | None:
        from fastmerge.kernels.backend import TritonBackend

        refusal: str | None = TritonBackend.takes(node, parts)
        return refusal

    def gram(
        self,
        inputs: Sequence[_C.View | _Computed],
        base: _C.View | None = None,
        vectors: Vectors = WHOLE,
    ) -> Float64:
        if any(isinstance(x, _Computed) for x in inputs):
            return self._cpu.gram([_viewed(x) for x in inputs], base, vectors)
        return self._gram(cast(Sequence[_C.View], inputs), base, vectors)

    def _gram(self, inputs: Sequence[_C.View], base: _C.View | None, vectors: Vectors) -> Float64:
        from fastmerge.kernels.gram import gram_partials, gram_total

        if vectors.axis == 0:  # the sum of a column runs through all pieces, one after another
            return self._cpu.gram(inputs, base, vectors)
        views = [*inputs, *([] if base is None else [base])]

        def sums(lane: Lane, tensors: list[torch.Tensor], begin: int, end: int) -> Float64:
            xs, b = (tensors, None) if base is None else (tensors[:-1], tensors[-1])
            part = replace(vectors, rows=end - begin)
            whole = vectors.axis is None
            made: Float64 = gram_partials(xs, b) if whole else lane.backend.gram(xs, b, part)
            return made

        found = np.concatenate(self._each(views, vectors, 0, sums))
        return found if vectors.axis == 1 else gram_total(found, self._streamer.devices[0])

    def combine(
        self,
        inputs: Sequence[_C.View | _Computed],
        coefficients: Float64,
        out: Place,
        *,
        divisor: float | None = None,
        vectors: Vectors = WHOLE,
        wide: bool = False,
    ) -> int:
        if isinstance(inputs[0], _Computed):
            return self._compute(inputs[0], out)
        width = 1 if vectors.axis is None else vectors.cols

        def sum_up(lane: Lane, tensors: list[torch.Tensor], begin: int, end: int) -> int:
            made = lane.empty((end - begin) * width, out.dtype)
            own = coefficients[begin:end] if vectors.axis == 1 else coefficients
            part = replace(vectors, rows=end - begin)
            bad: int = lane.backend.combine(
                tensors, own, made, divisor=divisor, vectors=part, wide=wide
            )
            lane.download(made, out, out.dtype.bytes_for(begin * width))
            return bad

        views = cast(Sequence[_C.View], inputs)
        return sum(self._each(views, vectors, out.dtype.bytes_for(width), sum_up))

    def select(
        self,
        inputs: Sequence[_C.View | _Computed],
        base: _C.View | _Computed,
        specs: Sequence[Sparsify],
    ) -> list[Selection]:
        return self._cpu.select([_viewed(x) for x in inputs], _viewed(base), specs)

    def consensus(
        self,
        inputs: Sequence[_C.View],
        base: _C.View,
        weights: Sequence[float],
        selections: Sequence[Selection],
        out: Place,
        agreement: Agreement,
    ) -> int:
        def agree(lane: Lane, tensors: list[torch.Tensor], begin: int, end: int) -> int:
            made = lane.empty(end - begin, out.dtype)
            own = [_piece(lane, selection, begin, end) for selection in selections]
            bad: int = lane.backend.consensus(
                tensors[:-1], tensors[-1], weights, own, made,
                replace(agreement, origin=agreement.origin + begin),
            )  # fmt: skip
            lane.download(made, out, out.dtype.bytes_for(begin))
            return bad

        return sum(self._each([*inputs, base], WHOLE, out.dtype.bytes_for(1), agree))

    def pointwise(
        self,
        formula: str,
        inputs: Sequence[_C.View],
        base: _C.View,
        numbers: Sequence[float] = (),
        *,
        selection: Selection | None = None,
        factors: Float64 | None = None,
    ) -> _Computed:
        given = (formula, inputs, base, numbers, selection, factors)
        view = self._cpu.pointwise(
            formula, inputs, base, numbers, selection=selection, factors=factors
        )
        return _Computed(view, *given)

    def divergences(self, x: _C.View, base: _C.View, cols: int) -> Float64:
        return self._cpu.divergences(x, base, cols)

    def _compute(self, made: _Computed, out: Place) -> int:
        factors = made.factors
        cols = 0 if factors is None else made.base.count // max(1, len(factors))

        def compute(lane: Lane, tensors: list[torch.Tensor], begin: int, end: int) -> int:
            to = lane.empty(end - begin, out.dtype)
            part = lane.backend.pointwise(
                made.formula, tensors[:-1], tensors[-1], made.numbers, selection=made.selection,
                factors=factors, origin=begin, cols=cols,
            )  # fmt: skip
            bad: int = part.into(to)
            lane.download(to, out, out.dtype.bytes_for(begin))
            return bad

        return sum(self._each([*made.inputs, made.base], WHOLE, out.dtype.bytes_for(1), compute))

    @staticmethod
    def is_fp32(out: Place) -> bool:
        return out.dtype is F32

    def scratch(self, count: int) -> tuple[_C.View, Place]:
        view, _ = self._cpu.scratch(count)

        def sink(begin: int, nbytes: int) -> _C.Sink:
            return _C.MemorySink(_C.View(view.address + begin, nbytes, "RAW", view))

        return view, Place(BY_CODE[view.dtype], sink)

    def array(self, tensor: _C.View) -> Float32:
        return self._cpu.array(tensor)

    def tensor(self, array: Float32) -> _C.View:
        return self._cpu.tensor(array)

    def _each(
        self,
        views: Sequence[_C.View],
        vectors: Vectors,
        out_bytes: int,
        work: Callable[[Lane, list[torch.Tensor], int, int], T],
    ) -> list[T]:
        """``work(lane, tensors, begin, end)`` on pieces of whole chunks, or with an axis of whole
        rows, results in order. ``out_bytes``: what it makes of an element, or of a row.
        """
        from fastmerge.kernels.common import CHUNK

        count, width, step = vectors.rows, vectors.cols, 1
        if vectors.axis is None:
            count, width, step = views[0].count, 1, CHUNK
        row_bytes = out_bytes + sum(BY_CODE[view.dtype].bytes_for(width) for view in views)
        budget = self._streamer.budget
        if min(step, count) * row_bytes > budget:
            raise ResourceError(
                f"{argument('gpu_memory')}: {budget} bytes do not hold the smallest piece of "
                f"{self._tensor}; give at least {min(step, count) * row_bytes}"
            )

        def piece(begin: int, end: int) -> list[T]:
            with self._streamer.lane((end - begin) * row_bytes) as lane:
                parts = [view.slice(begin * width, end * width) for view in views]
                return [work(lane, [lane.upload(part) for part in parts], begin, end)]

        def run(begin: int, end: int) -> list[T]:
            done = self._streamer.attempt(self._tensor, lambda: piece(begin, end))
            if done is not None:
                return done
            half = -(-(end - begin) // (2 * step)) * step  # whole steps
            if half >= end - begin:
                raise ResourceError(
                    f"{self._tensor}: the GPU has no room for {(end - begin) * row_bytes} bytes; "
                    f"end other programs on it, or use {argument('device', 'cpu')}"
                )
            return [*run(begin, begin + half), *run(begin + half, end)]

        size = max(1, budget // LANES // row_bytes // step) * step
        pieces = [(begin, min(begin + size, count)) for begin in range(0, count, size)]
        with ThreadPoolExecutor(LANES * len(self._streamer.devices)) as threads:
            running = [threads.submit(run, *piece) for piece in pieces]
            try:
                return [result for future in running for result in future.result()]
            finally:
                for future in running:
                    future.cancel()
