"""One CUDA stream and its ring of pinned pieces, through which tensors go to a device and back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge import _C
from fastmerge.dtypes import BY_CODE, DType

if TYPE_CHECKING:
    import torch
PIECE_BYTES = 8 << 20  # 0.2 ms of PCIe; a lane pins four: two on the way in, two on the way out


class Place(NamedTuple):
    """Where a tensor goes: ``sink(begin, nbytes)`` takes a part of its bytes, as RAW."""

    dtype: DType
    sink: Callable[[int, int], _C.Sink]


class Lane:
    """A stream on one device and its pinned pieces; one thread at a time uses it."""

    def __init__(self, device: str, pool: _C.Pool) -> None:
        from fastmerge.kernels.backend import TritonBackend

        torch: Any = torch_untyped()
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
        """A device copy of a mapped tensor; uint8 where that is RAW. The elements of one that is
        computed where it is read are made in the pinned pieces.
        """
        import torch

        raw = torch.empty(view.nbytes, dtype=torch.uint8, device=self._device)
        size = view.nbytes // max(1, view.count)  # of an element
        for number, begin in enumerate(range(0, view.nbytes, PIECE_BYTES)):
            piece = number % 2
            nbytes = min(PIECE_BYTES, view.nbytes - begin)
            self._wait(piece)
            if view.is_gathered:
                source = view.slice(begin // size, (begin + nbytes) // size)
                to = _C.View(self._pieces[piece].data_ptr(), nbytes // size, view.dtype, view)
            else:
                source = _C.View(view.address + begin, nbytes, "RAW", view)
                to = self._view(piece, nbytes)
            _C.copy(self._pool, source, _C.MemorySink(to))
            raw[begin : begin + nbytes].copy_(self._pieces[piece][:nbytes], non_blocking=True)
            self._mark(piece)
        if view.dtype == "RAW":
            return raw
        return raw.view(getattr(torch, BY_CODE[view.dtype].name))

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


def reserved(device: str) -> int:
    """Bytes of the device that torch holds now, in use or not."""
    torch: Any = torch_untyped()
    return int(torch.cuda.memory_reserved(device)) if device.startswith("cuda") else 0


def torch_untyped() -> Any:
    """torch, parts of which have no types."""
    import torch

    return torch
