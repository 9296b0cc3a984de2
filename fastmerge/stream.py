"""Tensors from mapped files through a GPU to the writer: the engine's ``--device cuda``.

A tensor takes a lane: a CUDA stream and a ring of pinned pieces. It is copied piece by piece into
pinned memory and from there to the device, computed, and copied back the same way, all on its
lane's stream; with several tensors in flight, copies in, kernels, copies out and the disk overlap.
Device memory is handed out against a budget. A tensor that needs more than the budget, or more than
the device has left, goes through several lanes in pieces, with the same bits.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from fastmerge import _C, algebra
from fastmerge.algebra import Float64, Merge, Node, Source
from fastmerge.backends import CpuBackend
from fastmerge.compute import Computation, Outcome, Trim, matrix, steps
from fastmerge.dtypes import BY_CODE, DType
from fastmerge.errors import FastmergeError
from fastmerge.sparsity import Selection, Sparsify

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

GPU_MEMORY_BYTES = 2 << 30
PIECE_BYTES = 8 << 20  # 0.2 ms of PCIe; a lane pins four: two on the way in, two on the way out
LANES = 3  # pieces of one tensor in flight on a device: on the way in, computed, on the way out


def cuda_devices(where: str = "device cuda") -> list[str]:
    """The CUDA devices of this machine; FastmergeError where there is none to use."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise FastmergeError(
            f"{where}: {error.name} is not installed; pip install 'fastmerge[gpu]', or use cpu"
        ) from error
    if not torch.cuda.is_available():
        raise FastmergeError(f"{where}: this machine has no usable CUDA device; use --device cpu")
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


class Place(NamedTuple):
    """Where a tensor goes: ``sink(begin, nbytes)`` takes a part of its bytes, as RAW."""

    dtype: DType
    sink: Callable[[int, int], _C.Sink]


class Streamer:
    """Computes tensors on GPUs for the threads of one merge."""

    def __init__(
        self,
        devices: Sequence[str],
        cpu: CpuBackend,
        fetch: Callable[[Source], _C.View],
        *,
        gpu_memory: int = GPU_MEMORY_BYTES,
        trims: Mapping[Node, Trim] | None = None,
    ) -> None:
        """``gpu_memory``: bytes of tensors in flight on each device."""
        self._trims = trims
        self.devices, self.cpu, self.budget = devices, cpu, gpu_memory
        self._fetch = fetch
        self._used = dict.fromkeys(devices, 0)
        self._free = threading.Condition()
        # An eighth for the allocator's rounding: giving memory back waits for the whole device.
        self._limits = {d: _reserved(d) + gpu_memory * 9 // 8 for d in devices}
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
                "went through it in pieces; a larger --gpu-memory is faster"
            )
        if self._squeezed:
            said.append(
                f"the GPU ran out of memory: {_some(self._squeezed)} went through it in smaller "
                "pieces; a smaller --gpu-memory, or fewer programs on the GPU, is faster"
            )
        return tuple(said)

    def run(self, name: str, root: Node, shape: tuple[int, ...], place: Place) -> Outcome:
        """Computes one tensor into ``place``; raises FastmergeError if not even pieces fit."""
        sources = algebra.leaves([root])
        need = device_bytes(root, shape, place.dtype, [self._fetch(s).nbytes for s in sources])
        if need > self.budget:
            self._split[name] = None
        else:
            outcome = self.attempt(name, lambda: self._whole(name, root, shape, place, need))
            if outcome is not None:
                return outcome
        pieces = _Pieces(self, name)
        return Computation(pieces, self._fetch, name, shape, self._trims).run(root, place)

    def _whole(
        self, name: str, root: Node, shape: tuple[int, ...], place: Place, need: int
    ) -> Outcome:
        with self.lane(need) as lane:
            held = {s: lane.upload(self._fetch(s)) for s in algebra.leaves([root])}
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

        if _reserved(device) + max(0, need - lane.held) > self._limits[device]:
            torch.cuda.empty_cache()
            for other in (lane, *self._idle[device]):
                other.held = 0
        lane.held = max(lane.held, need)


def _some(names: dict[str, None]) -> str:
    first = next(iter(names))
    return first if len(names) == 1 else f"{len(names)} tensors (the first: {first})"


class _Pieces:
    """The back end of one tensor too large for the device: inputs stay where they are mapped, and
    every primitive takes them through the lanes piece by piece. The bits are those of the whole.

    `select` stays on the CPU: a threshold is found in two or three readings of every entry, and the
    host's memory is nearer to the host's cores than to the device.
    """

    name = "triton"

    def __init__(self, streamer: Streamer, tensor: str) -> None:
        self._streamer, self._tensor = streamer, tensor
        self._cpu = streamer.cpu

    def gram(
        self,
        inputs: Sequence[_C.View],
        base: _C.View | None,
        *,
        axis: int | None,
        rows: int,
        cols: int,
    ) -> Float64:
        from fastmerge.kernels.gram import gram_partials, gram_total

        if axis == 0:  # the sum of a column runs through all pieces, one after another
            return self._cpu.gram(inputs, base, axis=axis, rows=rows, cols=cols)
        views = [*inputs, *([] if base is None else [base])]

        def sums(lane: Lane, tensors: list[torch.Tensor], begin: int, end: int) -> Float64:
            xs, b = (tensors, None) if base is None else (tensors[:-1], tensors[-1])
            shape = {"axis": axis, "rows": end - begin, "cols": cols}
            made: Float64 = (
                gram_partials(xs, b) if axis is None else lane.backend.gram(xs, b, **shape)
            )
            return made

        found = np.concatenate(self._each(views, axis, rows, cols, 0, sums))
        return found if axis == 1 else gram_total(found, self._streamer.devices[0])

    def combine(
        self,
        inputs: Sequence[_C.View],
        coefficients: Float64,
        out: Place,
        *,
        divisor: float | None,
        axis: int | None,
        rows: int,
        cols: int,
    ) -> int:
        width = 1 if axis is None else cols

        def sum_up(lane: Lane, tensors: list[torch.Tensor], begin: int, end: int) -> int:
            made = lane.empty((end - begin) * width, out.dtype)
            own = coefficients[begin:end] if axis == 1 else coefficients
            shape = {"axis": axis, "rows": end - begin, "cols": cols}
            bad: int = lane.backend.combine(tensors, own, made, divisor=divisor, **shape)
            lane.download(made, out, out.dtype.bytes_for(begin * width))
            return bad

        return sum(self._each(inputs, axis, rows, cols, out.dtype.bytes_for(width), sum_up))

    def select(
        self, inputs: Sequence[_C.View], base: _C.View, specs: Sequence[Sparsify]
    ) -> list[Selection]:
        return self._cpu.select(inputs, base, specs)

    def consensus(
        self,
        inputs: Sequence[_C.View],
        base: _C.View,
        weights: Sequence[float],
        selections: Sequence[Selection],
        out: Place,
        *,
        elect: bool,
        normalize: bool,
        scale: float,
        origin: int = 0,
    ) -> int:
        def agree(lane: Lane, tensors: list[torch.Tensor], begin: int, end: int) -> int:
            made = lane.empty(end - begin, out.dtype)
            bad: int = lane.backend.consensus(
                tensors[:-1], tensors[-1], weights, selections, made,
                elect=elect, normalize=normalize, scale=scale, origin=origin + begin,
            )  # fmt: skip
            lane.download(made, out, out.dtype.bytes_for(begin))
            return bad

        return sum(self._each([*inputs, base], None, 1, 0, out.dtype.bytes_for(1), agree))

    def scratch(self, count: int) -> tuple[_C.View, Place]:
        view, _ = self._cpu.scratch(count)

        def sink(begin: int, nbytes: int) -> _C.Sink:
            return _C.MemorySink(_C.View(view.address + begin, nbytes, "RAW", view))

        return view, Place(BY_CODE[view.dtype], sink)

    def _each(
        self,
        views: Sequence[_C.View],
        axis: int | None,
        rows: int,
        cols: int,
        out_bytes: int,
        work: Callable[[Lane, list[torch.Tensor], int, int], T],
    ) -> list[T]:
        """``work(lane, tensors, begin, end)`` on pieces of whole chunks, or with an axis of whole
        rows, results in order. ``out_bytes``: what it makes of an element, or of a row.
        """
        from fastmerge.kernels.common import CHUNK

        count, width, step = (views[0].count, 1, CHUNK) if axis is None else (rows, cols, 1)
        row_bytes = out_bytes + sum(BY_CODE[view.dtype].bytes_for(width) for view in views)
        budget = self._streamer.budget
        if min(step, count) * row_bytes > budget:
            raise FastmergeError(
                f"--gpu-memory: {budget} bytes do not hold the smallest piece of {self._tensor}; "
                f"give at least {min(step, count) * row_bytes}"
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
                raise FastmergeError(
                    f"{self._tensor}: the GPU has no room for {(end - begin) * row_bytes} bytes; "
                    "end other programs on it, or use --device cpu"
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


class Lane:
    """A stream on one device and its pinned pieces; one thread at a time uses it."""

    def __init__(self, device: str, pool: _C.Pool) -> None:
        from fastmerge.kernels.backend import TritonBackend

        torch: Any = _torch()
        self.backend = TritonBackend(device)
        self._pool = pool
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"  # the interpreter's tensors are on the CPU
        self._pieces = [
            torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(4)
        ]
        # After each piece's last copy. Waiting for them must not take a core from the pool.
        self._copied: list[Any] = [
            torch.cuda.Event(blocking=True) if self._cuda else None for _ in range(4)
        ]
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None
        self.held = 0  # bytes that torch keeps for its stream, about

    def current(self) -> Any:
        """A context in which torch and Triton use this lane's stream."""
        import torch

        return torch.cuda.stream(self._stream) if self._cuda else nullcontext()

    def wait(self) -> None:
        """Until everything asked of the lane is done, so that any stream may use what it made."""
        if self._stream is not None:
            self._stream.synchronize()

    def empty(self, count: int, dtype: DType) -> torch.Tensor:
        """Device memory for ``count`` elements."""
        import torch

        return torch.empty(count, dtype=getattr(torch, dtype.name), device=self._device)

    def upload(self, view: _C.View) -> torch.Tensor:
        """A device copy of a mapped tensor."""
        import torch

        name = BY_CODE[view.dtype].name
        raw = torch.empty(view.nbytes, dtype=torch.uint8, device=self._device)
        for number, begin in enumerate(range(0, view.nbytes, PIECE_BYTES)):
            piece = number % 2
            nbytes = min(PIECE_BYTES, view.nbytes - begin)
            self._wait(piece)
            source = _C.View(view.address + begin, nbytes, "RAW", view)
            _C.copy(self._pool, source, _C.MemorySink(self._view(piece, nbytes)))
            raw[begin : begin + nbytes].copy_(self._pieces[piece][:nbytes], non_blocking=True)
            self._mark(piece)
        return raw.view(getattr(torch, name))

    def download(self, tensor: torch.Tensor, place: Place, first_byte: int = 0) -> None:
        """Hands a device tensor's bytes to ``place``, from ``first_byte`` of it on; the next piece
        is copied meanwhile.
        """
        import torch

        raw = tensor.view(torch.uint8)
        waiting: tuple[int, int, _C.Sink] | None = None
        for number, begin in enumerate(range(0, raw.numel(), PIECE_BYTES)):
            nbytes = min(PIECE_BYTES, raw.numel() - begin)
            piece = 2 + number % 2
            self._pieces[piece][:nbytes].copy_(raw[begin : begin + nbytes], non_blocking=True)
            self._mark(piece)
            if waiting is not None:
                self._drain(*waiting)
            waiting = (piece, nbytes, place.sink(first_byte + begin, nbytes))
        if waiting is not None:
            self._drain(*waiting)

    def _drain(self, piece: int, nbytes: int, sink: _C.Sink) -> None:
        self._wait(piece)
        _C.copy(self._pool, self._view(piece, nbytes), sink)

    def _view(self, piece: int, nbytes: int) -> _C.View:
        pinned = self._pieces[piece]
        return _C.View(pinned.data_ptr(), nbytes, "RAW", pinned)

    def _mark(self, piece: int) -> None:
        if self._cuda:
            self._copied[piece].record()

    def _wait(self, piece: int) -> None:
        if self._cuda:
            self._copied[piece].synchronize()  # at once, if nothing was recorded


def _reserved(device: str) -> int:
    """Bytes of the device that torch holds now, in use or not."""
    torch: Any = _torch()
    return int(torch.cuda.memory_reserved(device)) if device.startswith("cuda") else 0


def _torch() -> Any:
    """torch, parts of which have no types."""
    import torch

    return torch


def device_bytes(
    root: Node, shape: tuple[int, ...], dtype: DType, source_bytes: Sequence[int]
) -> int:
    """Device memory that one tensor's merge takes: sources, output, intermediates, what select
    gathers of each delta, inner products of rows, and 1 MiB for tables.
    """
    from fastmerge.kernels.select import gathered_bytes

    count = math.prod(shape)
    merges = [node for node in algebra.walk(root) if isinstance(node, Merge)]
    intermediates = 4 * count * max(0, len(merges) - 1)
    sparse = [node for node in merges if not node.method.is_combination]
    deltas = max((len(node.operands) for node in sparse), default=0)
    gathered = deltas * int(gathered_bytes(count))
    products = 0
    for node in merges:
        if node.axis is not None:
            rows, cols = matrix(shape, node.axis)
            vectors = rows if node.axis == 1 else cols
            products = max(products, 8 * vectors * (len(node.inputs) + 1) ** 2)
    most = sum(source_bytes) + dtype.bytes_for(count) + intermediates + gathered
    return most + products + (1 << 20)


def choose_devices(
    device: str, roots: Sequence[tuple[str, Node]], fetch: Callable[[Source], _C.View]
) -> tuple[list[str], str]:
    """The CUDA devices for ``--device``, none of them for the CPU, and a note on what auto chose.

    ``roots``: the tensors to merge, by name. auto: the GPUs, where the inputs are in the page
    cache; from a disk, the GPU would only wait for it. Raises FastmergeError where ``cuda`` is
    asked for and there is none, or where its kernels cannot take as many inputs.
    """
    if device == "cpu":
        return [], ""
    try:
        found = cuda_devices()
    except FastmergeError:
        if device == "cuda":
            raise
        return [], "device auto: merged on the CPU, as there is no usable CUDA device"
    from fastmerge.kernels.combine import MAX_INPUTS

    name, count = max(((name, _widest(root)) for name, root in roots), key=lambda pair: pair[1])
    if count > MAX_INPUTS:
        if device == "auto":
            return [], f"device auto: merged on the CPU, as {name} has {count} inputs"
        raise FastmergeError(
            f"device cuda: {name} has {count} inputs and the GPU kernels take {MAX_INPUTS}; "
            "use --device cpu"
        )
    views = [fetch(source) for source in algebra.leaves(root for _, root in roots)]
    if device == "auto" and cached_share(views) < 0.5:
        return [], "device auto: merged on the CPU, as the files are on disk and a GPU would wait"
    return found, "device auto: merged on the GPU" if device == "auto" else ""


def _widest(root: Node) -> int:
    """The most tensors that one kernel of a tree reads, a base apart."""
    if isinstance(root, Source):
        return 1
    return max(len(step.node.operands if step.tree is None else step.parts) for step in steps(root))


def cached_share(views: Sequence[_C.View], samples: int = 16) -> float:
    """The share of mapped tensors' pages that are in memory, from ``samples`` pages of each."""
    libc = ctypes.CDLL(None)
    flag = ctypes.c_ubyte()
    present = asked = 0
    for view in views:
        first = view.address // mmap.PAGESIZE
        pages = (view.address + view.nbytes - 1) // mmap.PAGESIZE - first + 1
        for i in range(min(samples, pages)):
            page = first + i * pages // min(samples, pages)
            where = ctypes.c_void_p(page * mmap.PAGESIZE)
            if libc.mincore(where, ctypes.c_size_t(1), ctypes.byref(flag)) == 0:
                present += flag.value & 1
            asked += 1
    return present / max(asked, 1)
