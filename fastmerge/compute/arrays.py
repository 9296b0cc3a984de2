"""Tensors that live in memory, seen as the back ends see them: NumPy arrays and torch tensors,
never copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge import _C
from fastmerge.compute.backend import Backend, triton
from fastmerge.compute.cpu import cpu, thread_count
from fastmerge.dtypes import BF16, BY_NAME, F32, MERGEABLE, DType
from fastmerge.errors import FastmergeError, UnsupportedError

if TYPE_CHECKING:
    import torch

Extent = tuple[int, int]


def is_torch(tensor: Any) -> bool:
    """Whether ``tensor`` is a torch tensor; torch itself is not imported for the answer."""
    return type(tensor).__module__.partition(".")[0] == "torch" or hasattr(tensor, "data_ptr")


def dtype_of(tensor: Any, where: str) -> DType:
    """The element type; uint16 NumPy arrays hold bfloat16 bits."""
    dtype = _named(tensor.dtype)
    if dtype is None or not dtype.mergeable:
        known = ", ".join(d.name for d in MERGEABLE)
        raise UnsupportedError(
            f"{where}: cannot merge {str(tensor.dtype).removeprefix('torch.')} tensors; convert "
            f"to one of {known}"
        )
    return dtype


@lru_cache  # NumPy takes 14 us to name a type, a kernel of 4096 elements 4
def _named(dtype: Any) -> DType | None:
    """The type that NumPy or torch calls ``dtype``."""
    if isinstance(dtype, np.dtype) and dtype == np.uint16:
        return BF16
    return BY_NAME.get(str(dtype).removeprefix("torch."))


def view_of(tensor: Any, where: str, *, writable: bool = False) -> _C.View:
    """A contiguous CPU tensor's memory."""
    dtype = dtype_of(tensor, where)
    if is_torch(tensor):
        if not tensor.is_contiguous():
            raise FastmergeError(f"{where}: the tensor is not contiguous; pass tensor.contiguous()")
        return _C.View(tensor.data_ptr(), tensor.numel(), dtype.code, tensor)
    if not tensor.flags.c_contiguous:
        raise FastmergeError(f"{where}: the array is not contiguous; pass np.ascontiguousarray(x)")
    if writable and not tensor.flags.writeable:
        raise FastmergeError(f"{where}: the array is read-only")
    return _C.View(tensor.ctypes.data, tensor.size, dtype.code, tensor)


def check_torch(tensor: Any, where: str) -> None:
    """Raises FastmergeError for a torch tensor that is not just its memory: reading that would give
    other numbers, or end the process.
    """
    import torch

    if tensor.layout != torch.strided or tensor.is_nested:
        raise UnsupportedError(f"{where}: a sparse, nested or packed tensor; pass a dense one")
    own = getattr(type(tensor), "__torch_dispatch__", None)
    if own not in (None, torch.Tensor.__torch_dispatch__):
        raise _no_memory(tensor, where)
    if tensor.is_neg() or tensor.is_conj():
        raise FastmergeError(f"{where}: the tensor is a negated view; pass tensor.resolve_neg()")
    try:
        held = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError) as error:  # inside vmap and grad
        raise _no_memory(tensor, where) from error
    if tensor.device.type == "meta" or not tensor.numel() or not tensor.is_contiguous():
        return
    if held < (tensor.storage_offset() + tensor.numel()) * tensor.element_size():
        raise FastmergeError(f"{where}: the tensor's memory has been freed")
    if not tensor.data_ptr():  # inside functionalize
        raise _no_memory(tensor, where)


def _no_memory(tensor: Any, where: str) -> FastmergeError:
    return FastmergeError(
        f"{where}: a {type(tensor).__name__} has no memory of its own; pass a plain tensor "
        "(of a DTensor: to_local() or full_tensor())"
    )


def written(tensor: Any) -> None:
    """Tells autograd that a torch tensor has changed, as torch's own in-place operations do."""
    import torch

    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def as_torch(array: np.ndarray[Any, Any], dtype: DType, shape: Sequence[int]) -> torch.Tensor:
    """``array``'s memory as a torch tensor of ``dtype``: through bytes, since NumPy has no
    bfloat16.
    """
    import torch

    raw = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return raw.view(getattr(torch, dtype.name)).reshape(tuple(shape))


def _imported(tensor: Any, where: str) -> Any:
    """A torch tensor or a NumPy array, of what speaks DLPack or NumPy's own protocols."""
    if is_torch(tensor) or isinstance(tensor, np.ndarray):
        return tensor
    if not hasattr(tensor, "__dlpack__"):
        return np.asarray(tensor)
    try:
        return np.from_dlpack(tensor)
    except (BufferError, TypeError, RuntimeError) as refused:  # another device, or bfloat16
        try:
            import torch
        except ImportError:
            raise UnsupportedError(
                f"{where}: NumPy does not take this {type(tensor).__name__} ({refused}); "
                "install torch, which may"
            ) from None
        try:
            return torch.utils.dlpack.from_dlpack(tensor)
        except (BufferError, TypeError, RuntimeError, ValueError) as error:
            raise UnsupportedError(f"{where}: a {type(tensor).__name__}: {error}") from error


class Operands:
    """The inputs of one call: same kind, shape and device, and what their output looks like."""

    def __init__(self, where: str, tensors: Sequence[Any]) -> None:
        """Raises FastmergeError, prefixed with ``where``, when they do not fit together."""
        self._where = where
        self._tensors = [_imported(tensor, where) for tensor in tensors]
        if not self._tensors:
            raise FastmergeError(f"{where}: no tensors")
        for tensor in self._tensors:
            if is_torch(tensor):
                check_torch(tensor, where)
        first = self._tensors[0]
        self.shape = tuple(int(size) for size in first.shape)
        self.count = math.prod(self.shape)
        self._torch = is_torch(first)
        self._device = str(first.device) if self._torch else "cpu"
        for tensor in self._tensors[1:]:
            if tuple(tensor.shape) != self.shape:
                raise FastmergeError(
                    f"{where}: shapes differ: {list(self.shape)} and {list(tensor.shape)}"
                )
            if is_torch(tensor) != self._torch:
                raise FastmergeError(f"{where}: torch tensors and NumPy arrays do not mix")
            if self._torch and str(tensor.device) != self._device:
                raise FastmergeError(
                    f"{where}: tensors on different devices: {self._device} and {tensor.device}"
                )
        self.dtypes = [dtype_of(tensor, where) for tensor in self._tensors]
        self.views: list[Any] = (
            [view_of(tensor, where) for tensor in self._tensors]
            if self._device == "cpu"
            else self._tensors
        )

    def zeros(self) -> Any:
        """A tensor of zeros like them, as the back end takes it: on the CPU without memory."""
        dtype = self.dtypes[0] if len(set(self.dtypes)) == 1 else F32
        if self._device == "cpu":
            return _C.zeros(self.count, dtype.code)
        import torch

        return torch.zeros(self.shape, dtype=getattr(torch, dtype.name), device=self._device)

    def equal(self, pool: _C.Pool) -> bool:
        """Whether they are several in memory with the same bytes."""
        first, *others = self.views
        return bool(others) and all(_C.equal(pool, first, other) for other in others)

    def backend(self, threads: int | None) -> Backend[Any, Any]:
        """The back end of the tensors' device."""
        if self._device == "cpu":
            return cpu(thread_count(threads))
        accelerator: Backend[Any, Any] = triton(self._where, self._device)
        return accelerator

    def output(self, out: Any) -> tuple[Any, Any]:
        """(tensor, where the back end writes): ``out`` checked, or a new tensor."""
        result = self._new() if out is None else out
        where = f"{self._where}: out"
        if out is not None:
            self._check_out(out, where)
        if self._device != "cpu":
            if out is not None:
                self._check_overlap(_extent(out), [_extent(t) for t in self._tensors], where)
            return result, result
        view = view_of(result, where, writable=True)
        if out is not None:
            self._check_overlap(_extent(view), [_extent(v) for v in self.views], where)
        return result, _C.MemorySink(view)

    def _new(self) -> Any:
        dtype = self.dtypes[0] if len(set(self.dtypes)) == 1 else F32
        if self._torch:
            import torch

            return torch.empty(self.shape, dtype=getattr(torch, dtype.name), device=self._device)
        first = self._tensors[self.dtypes.index(dtype)] if dtype in self.dtypes else None
        return np.empty(self.shape, dtype=dtype.numpy if first is None else first.dtype)

    def _check_out(self, out: Any, where: str) -> None:
        if is_torch(out) != self._torch or not (self._torch or isinstance(out, np.ndarray)):
            raise FastmergeError(f"{where}: must be of the inputs' kind, not {type(out).__name__}")
        if self._torch:
            check_torch(out, where)
        if tuple(out.shape) != self.shape:
            raise FastmergeError(
                f"{where}: shape {list(out.shape)} where the inputs have {list(self.shape)}"
            )
        if self._torch and str(out.device) != self._device:
            raise FastmergeError(f"{where}: on {out.device}, the inputs on {self._device}")
        dtype_of(out, where)
        if self._torch:
            written(out)

    @staticmethod
    def _check_overlap(out: Extent, inputs: Sequence[Extent], where: str) -> None:
        """In place is fine where entry i is read before it is written: the same memory, the same
        width.
        """
        for begin, end in inputs:
            if out != (begin, end) and out[0] < end and begin < out[1]:
                raise FastmergeError(f"{where}: overlaps an input in part")


def _extent(tensor: Any) -> Extent:
    """First address and the one past the last, of a `_C.View` or a torch tensor."""
    if isinstance(tensor, _C.View):
        return tensor.address, tensor.address + tensor.nbytes
    begin = int(tensor.data_ptr())
    return begin, begin + tensor.numel() * tensor.element_size()
