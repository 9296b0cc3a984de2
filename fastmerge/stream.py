"""Tensors from mapped files through a GPU to the writer: the engine's ``--device cuda``.

Every thread of the engine's window has a lane: a CUDA stream and a ring of pinned pieces. A tensor
is copied piece by piece into pinned memory and from there to the device, computed, and copied back
the same way, all on its lane's stream; with several tensors in flight, copies in, kernels, copies
out and the disk overlap. Device memory is handed out against a budget. A tensor that does not fit
is computed on the CPU, which gives the same bits, and the report says so.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from fastmerge import _C, algebra
from fastmerge.algebra import Merge, Node, Source
from fastmerge.compute import Computation, Outcome
from fastmerge.dtypes import BY_CODE, DType
from fastmerge.errors import FastmergeError

if TYPE_CHECKING:
    import torch

GPU_MEMORY_BYTES = 2 << 30
PIECE_BYTES = 4 << 20  # 0.1 ms of PCIe; a lane pins four: two on the way in, two on the way out


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


class Streamer:
    """Computes tensors on GPUs for the threads of one merge."""

    def __init__(
        self,
        devices: Sequence[str],
        pool: _C.Pool,
        fetch: Callable[[Source], _C.View],
        *,
        gpu_memory: int = GPU_MEMORY_BYTES,
    ) -> None:
        """``gpu_memory``: bytes of tensors in flight on each device."""
        from fastmerge.kernels.backend import TritonBackend

        self._pool, self._fetch = pool, fetch
        self._budget = gpu_memory
        self._backends = {device: TritonBackend(device) for device in devices}
        self._used = dict.fromkeys(devices, 0)
        self._free = threading.Condition()
        self._lanes = threading.local()
        self.too_large: list[str] = []  # names of the tensors that were left to the CPU

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, in sentences."""
        if not self.too_large:
            return ()
        note = (
            f"{len(self.too_large)} tensors did not fit in {self._budget >> 20} MiB of GPU memory "
            f"and were merged on the CPU (the first: {self.too_large[0]}); raise --gpu-memory"
        )
        return (note,)

    def run(
        self,
        name: str,
        root: Node,
        shape: tuple[int, ...],
        dtype: DType,
        sinks: Callable[[int], Sequence[_C.Sink]],
    ) -> Outcome | None:
        """Computes one tensor; None, with nothing written, where it does not fit on a device.

        ``sinks(piece_bytes)`` gives RAW sinks of the output's bytes, that many each but the last.
        """
        import torch

        need = device_bytes(root, shape, dtype, [self._fetch(s).nbytes for s in _sources(root)])
        if need > self._budget:
            self.too_large.append(name)
            return None
        with self._admitted(need) as device:
            lane = self._lane(device)
            try:
                with lane.current():
                    held = {s: lane.upload(self._pool, self._fetch(s)) for s in _sources(root)}
                    out = torch.empty(
                        math.prod(shape), dtype=getattr(torch, dtype.name), device=device
                    )
                    computation = Computation(self._backends[device], held.__getitem__, name, shape)
                    outcome = computation.run(root, out)
                    held.clear()
                    lane.download(self._pool, out, sinks(PIECE_BYTES))
            except torch.OutOfMemoryError:  # others use the device too
                torch.cuda.empty_cache()
                self.too_large.append(name)
                return None
        return outcome

    @contextmanager
    def _admitted(self, need: int) -> Iterator[str]:
        """Waits until some device has room for ``need`` bytes, and takes it there."""
        with self._free:
            self._free.wait_for(lambda: min(self._used.values()) + need <= self._budget)
            device = min(self._used, key=self._used.__getitem__)
            self._used[device] += need
        try:
            yield device
        finally:
            with self._free:
                self._used[device] -= need
                self._free.notify_all()

    def _lane(self, device: str) -> _Lane:
        lanes: dict[str, _Lane] = self._lanes.__dict__.setdefault("by_device", {})
        if device not in lanes:
            lanes[device] = _Lane(device)
        return lanes[device]


class _Lane:
    """One thread's stream on one device, and its pinned pieces."""

    def __init__(self, device: str) -> None:
        torch: Any = _torch()
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"  # the interpreter's tensors are on the CPU
        self._pieces = [
            torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(4)
        ]
        self._copied: list[Any] = [None] * 4  # the event after each piece's last copy
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None

    def current(self) -> Any:
        """A context in which torch and Triton use this lane's stream."""
        import torch

        return torch.cuda.stream(self._stream) if self._cuda else nullcontext()

    def upload(self, pool: _C.Pool, view: _C.View) -> torch.Tensor:
        """A device copy of a mapped tensor."""
        import torch

        name = BY_CODE[view.dtype].name
        raw = torch.empty(view.nbytes, dtype=torch.uint8, device=self._device)
        for number, begin in enumerate(range(0, view.nbytes, PIECE_BYTES)):
            piece = number % 2
            nbytes = min(PIECE_BYTES, view.nbytes - begin)
            self._wait(piece)
            source = _C.View(view.address + begin, nbytes, "RAW", view)
            _C.copy(pool, source, _C.MemorySink(self._view(piece, nbytes)))
            raw[begin : begin + nbytes].copy_(self._pieces[piece][:nbytes], non_blocking=True)
            self._mark(piece)
        return raw.view(getattr(torch, name))

    def download(self, pool: _C.Pool, tensor: torch.Tensor, sinks: Sequence[_C.Sink]) -> None:
        """Hands a device tensor's bytes to the sinks; the next piece is copied meanwhile."""
        import torch

        raw = tensor.view(torch.uint8)
        waiting: tuple[int, int, _C.Sink] | None = None
        for number, sink in enumerate(sinks):
            begin = number * PIECE_BYTES
            nbytes = min(PIECE_BYTES, raw.numel() - begin)
            piece = 2 + number % 2
            self._pieces[piece][:nbytes].copy_(raw[begin : begin + nbytes], non_blocking=True)
            self._mark(piece)
            if waiting is not None:
                self._drain(pool, *waiting)
            waiting = (piece, nbytes, sink)
        if waiting is not None:
            self._drain(pool, *waiting)

    def _drain(self, pool: _C.Pool, piece: int, nbytes: int, sink: _C.Sink) -> None:
        self._wait(piece)
        _C.copy(pool, self._view(piece, nbytes), sink)

    def _view(self, piece: int, nbytes: int) -> _C.View:
        pinned = self._pieces[piece]
        return _C.View(pinned.data_ptr(), nbytes, "RAW", pinned)

    def _mark(self, piece: int) -> None:
        if self._cuda:
            torch: Any = _torch()
            self._copied[piece] = torch.cuda.Event()
            self._copied[piece].record()

    def _wait(self, piece: int) -> None:
        if self._copied[piece] is not None:
            self._copied[piece].synchronize()


def _torch() -> Any:
    """torch, parts of which have no types."""
    import torch

    return torch


def _sources(root: Node) -> list[Source]:
    return algebra.leaves([root])


def device_bytes(
    root: Node, shape: tuple[int, ...], dtype: DType, source_bytes: Sequence[int]
) -> int:
    """Device memory that one tensor's merge takes: sources, output, intermediates, what select
    gathers (1/64 of the entries, 512 KiB at least, of four bytes, for each delta) and tables.
    """
    count = math.prod(shape)
    merges = [node for node in algebra.walk(root) if isinstance(node, Merge)]
    intermediates = 4 * count * max(0, len(merges) - 1)
    deltas = max((len(node.operands) for node in merges), default=0)
    gathered = deltas * max(1 << 19, count // 16)
    return sum(source_bytes) + dtype.bytes_for(count) + intermediates + gathered + (1 << 20)


def choose_devices(device: str, views: Sequence[_C.View]) -> tuple[list[str], str]:
    """The CUDA devices for ``--device``, none of them for the CPU, and a note on what auto chose.

    auto: the GPUs, where the inputs (``views``) are in the page cache; from a disk, the GPU would
    only wait for it. Raises FastmergeError where ``cuda`` is asked for and there is none.
    """
    if device == "cpu":
        return [], ""
    if device == "cuda":
        return cuda_devices(), ""
    try:
        found = cuda_devices()
    except FastmergeError:
        return [], "device auto: merged on the CPU, as there is no usable CUDA device"
    if cached_share(views) < 0.5:
        return [], "device auto: merged on the CPU, as the files are on disk and a GPU would wait"
    return found, "device auto: merged on the GPU"


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
