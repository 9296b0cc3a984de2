"""Tensors of one call, which live in memory: NumPy arrays and torch tensors, never copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from fastmerge import _C
from fastmerge.compute.backend import Backend, triton
from fastmerge.compute.cpu import cpu, thread_count
from fastmerge.dtypes import F32
from fastmerge.errors import FastmergeError, UnsupportedError, brief, first_sentences
from fastmerge.models.memory import (
    Extent,
    check_torch,
    dtype_of,
    extent,
    is_torch,
    view_of,
    written,
)

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# What a call is given and returns. What else speaks DLPack is taken, and comes back as one of them.
T = TypeVar("T", bound="torch.Tensor | NDArray[Any]")


def _imported(tensor: Any, where: str) -> Any:
    """A torch tensor or a NumPy array, of what speaks DLPack or NumPy's own protocols."""
    if is_torch(tensor) or isinstance(tensor, np.ndarray):
        return tensor
    if not hasattr(tensor, "__dlpack__"):
        try:
            return np.asarray(tensor)
        except (TypeError, ValueError, RuntimeError) as error:
            raise FastmergeError(
                f"{where}: {brief(tensor)} is no tensor and no array "
                f"({first_sentences(str(error))})"
            ) from error
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


class Operands(Generic[T]):
    """The inputs of one call: same kind, shape and device, and what their output looks like."""

    def __init__(self, where: str, tensors: Sequence[T]) -> None:
        """Raises FastmergeError, prefixed with ``where``, when they do not fit together."""
        self._where = where
        self._tensors = [_imported(tensor, where) for tensor in tensors]
        if not self._tensors:
            raise FastmergeError(f"{where}: no tensors")
        for tensor in self._tensors:
            if is_torch(tensor):
                check_torch(tensor, where)
        first = self._tensors[0]
        self.shape: tuple[int, ...] = tuple(first.shape)
        self.count = math.prod(self.shape)
        self._torch = is_torch(first)
        self._device = "cpu" if not self._torch or first.is_cpu else str(first.device)
        for tensor in self._tensors[1:]:
            if tensor.shape != self.shape:
                raise FastmergeError(
                    f"{where}: shapes differ: {list(self.shape)} and {list(tensor.shape)}"
                )
            if is_torch(tensor) != self._torch:
                raise FastmergeError(f"{where}: torch tensors and NumPy arrays do not mix")
            if self._torch and tensor.device != first.device:
                raise FastmergeError(
                    f"{where}: tensors on different devices: {self._device} and {tensor.device}"
                )
        self.dtypes = [dtype_of(tensor, where) for tensor in self._tensors]
        of_one = self.dtypes.count(self.dtypes[0]) == len(self.dtypes)
        self._dtype = self.dtypes[0] if of_one else F32
        self.views: list[Any] = (
            [
                view_of(tensor, where, dtype=dtype)
                for tensor, dtype in zip(self._tensors, self.dtypes, strict=True)
            ]
            if self._device == "cpu"
            else self._tensors
        )

    @property
    def form(self) -> tuple[object, ...]:
        """What they are but for their numbers: equal for tensors of the same types and shape."""
        return (self.shape, *[tensor.dtype for tensor in self._tensors])

    def zeros(self) -> Any:
        """A tensor of zeros like them, as the back end takes it: on the CPU without memory."""
        if self._device == "cpu":
            return _C.zeros(self.count, self._dtype.code)
        import torch

        return torch.zeros(self.shape, dtype=getattr(torch, self._dtype.name), device=self._device)

    def equal(self, pool: _C.Pool) -> bool:
        """Whether they are several in memory with the same bytes."""
        if len(self.views) < 2 or not _C.equal(pool, self.views[0], self.views[1]):
            return False
        return all(_C.equal(pool, self.views[0], other) for other in self.views[2:])

    def backend(self, threads: int | None) -> Backend[Any, Any]:
        """The back end of the tensors' device."""
        if self._device == "cpu":
            return cpu(thread_count(threads))
        accelerator: Backend[Any, Any] = triton(self._where, self._device)
        return accelerator

    def output(self, out: T | None) -> tuple[T, Any]:
        """(tensor, where the back end writes): ``out`` checked, or a new tensor."""
        where = f"{self._where}: out"
        if out is None:
            result = self._new()
            if self._device == "cpu":
                return result, _C.MemorySink(
                    view_of(result, where, dtype=self._dtype), checked=False
                )
            return result, result
        self._check_out(out, where)
        if self._device != "cpu":
            self._check_overlap(extent(out), [extent(t) for t in self._tensors], where)
            return out, out
        view = view_of(out, where, writable=True)
        self._check_overlap(extent(view), [extent(v) for v in self.views], where)
        return out, _C.MemorySink(view, checked=False)

    def _new(self) -> Any:
        dtype, like = self._dtype, self._tensors[0]
        if self._torch:
            import torch

            if type(like) is torch.Tensor and self.dtypes[0] is dtype:
                return torch.empty_like(like)  # 2 us, by shape 5
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
