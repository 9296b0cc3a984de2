"""Tensors of one call, which live in memory: NumPy arrays and torch tensors, never copied but for
float8, which the kernels read as bfloat16.

What is checked about them takes Python 2 us a tensor, and the kernels of 4 Ki entries 1 us: tensors
like those of an earlier call are `known`, and `_C.Alike` takes them by comparison, for `Again`, or
merges them at once (`Known.run`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from fastmerge import _C
from fastmerge.compute.backend import Backend, triton
from fastmerge.compute.cpu import CpuBackend, cpu, thread_count
from fastmerge.dtypes import F32, DType
from fastmerge.errors import FastmergeError, UnsupportedError, brief, first_sentences
from fastmerge.models.memory import (
    Extent,
    check_torch,
    dtype_of,
    extent,
    is_result,
    is_torch,
    view_of,
    widened,
    written,
)

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

T = TypeVar("T", bound="torch.Tensor | NDArray[Any]")
"""What a call is given and returns: torch tensors, or NumPy arrays. What else speaks DLPack is
taken, and comes back as one of them."""


def _imported(tensor: Any, where: str) -> Any:
    """A torch tensor or a NumPy array, of what speaks DLPack or NumPy's own protocols."""
    if is_torch(tensor) or isinstance(tensor, np.ndarray):
        return tensor
    if not hasattr(tensor, "__dlpack__"):
        try:
            array = np.asarray(tensor)
            if array.dtype.kind in "OUS":  # None, text and bytes are arrays, too
                raise TypeError(f"a {type(tensor).__name__}")
            return array
        except Exception as error:  # its protocol is foreign code
            raise FastmergeError(
                f"{where}: {brief(tensor)} is no tensor and no array "
                f"({first_sentences(str(error))})"
            ) from error
    try:
        return np.from_dlpack(tensor)
    except Exception as refused:  # noqa: BLE001 - another device, bfloat16, or foreign code's own
        try:
            import torch
        except ImportError:
            raise UnsupportedError(
                f"{where}: NumPy does not take this {type(tensor).__name__} "
                f"({first_sentences(str(refused))}); install torch, which may"
            ) from None
        try:
            return torch.utils.dlpack.from_dlpack(tensor)
        except Exception as error:
            raise UnsupportedError(
                f"{where}: a {type(tensor).__name__}: {first_sentences(str(error))}"
            ) from error


_MOST_KINDS = 1024  # of tensors that are known


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
        self._tensors = [widened(tensor) for tensor in self._tensors]
        first = self._tensors[0]
        self.shape: tuple[int, ...] = tuple(first.shape)
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
    def kind(self) -> tuple[object, ...]:
        """What they are but for their numbers: equal for tensors of the same types and shape."""
        return (self.shape, *[tensor.dtype for tensor in self._tensors])

    def zeros(self) -> Any:
        """A tensor of zeros like them, as the back end takes it: on the CPU without memory."""
        if self._device == "cpu":
            return _C.zeros(math.prod(self.shape), self._dtype.code)
        import torch

        return torch.zeros(self.shape, dtype=getattr(torch, self._dtype.name), device=self._device)

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
            result = self._maker()(self._tensors[0])
            if self._torch:
                check_torch(result, f"{self._where}: the result")  # inside FakeTensorMode
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

    def _maker(self) -> Callable[[Any], Any]:
        """What makes a new output, given the first tensor."""
        dtype, shape, device = self._dtype, self.shape, self._device
        if self._torch:
            import torch

            if type(self._tensors[0]) is torch.Tensor and self.dtypes[0] is dtype:
                return torch.empty_like  # 1 us, by shape 5
            of_torch = getattr(torch, dtype.name)
            return lambda _: torch.empty(shape, dtype=of_torch, device=device)
        first = self._tensors[self.dtypes.index(dtype)] if dtype in self.dtypes else None
        of_numpy = dtype.numpy if first is None else first.dtype
        return lambda _: np.empty(shape, of_numpy)

    def known(self, tensors: Sequence[Any]) -> Known | None:
        """What the next call needs for tensors like these; None where they are on a GPU, of several
        types, or not the caller's own.
        """
        own = all(mine is given for mine, given in zip(self._tensors, tensors, strict=True))
        if not own or self._device != "cpu" or self.dtypes.count(self._dtype) < len(self.dtypes):
            return None
        alike = _C.Alike(self._tensors, [dtype.code for dtype in self.dtypes])
        return Known(alike, self._maker(), self.shape, self.dtypes, self.kind)

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
        if self._torch and is_result(out):
            raise FastmergeError(
                f"{where}: torch has recorded how it was computed; pass out.detach()"
            )
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


class Known(NamedTuple):
    """Of tensors on the CPU that were checked before."""

    alike: _C.Alike
    make: Callable[[Any], Any]  # a new output, given the first tensor
    shape: tuple[int, ...]
    dtypes: list[DType]
    kind: tuple[object, ...]

    def run(
        self,
        program: _C.Program,
        tensors: list[T],
        out: T | None,
        threads: int | None,
        keeps_equal: Callable[[], bool] | None = None,
    ) -> T | None:
        """`_C.Alike.run`: the result, or None where something is not as it was."""
        if out is not None and is_torch(out) and is_result(out):
            return None
        pool = cpu(thread_count(threads)).pool
        made: T | None = self.alike.run(program, pool, tensors, out, self.make, keeps_equal)
        if out is not None and made is not None and is_torch(out):
            written(out)
        return made


_known: dict[tuple[object, ...], Known] = {}


def known(tensors: Sequence[Any]) -> Known | None:
    """What is known of tensors of these types and shape, whatever else they are."""
    try:
        return _known.get((tensors[0].shape, *[tensor.dtype for tensor in tensors]))
    except (AttributeError, IndexError, RuntimeError, TypeError):  # no tensors, or odd ones
        return None


class Again(Generic[T]):
    """`Operands` of tensors like some that were checked before."""

    def __init__(self, where: str, tensors: list[T], views: list[_C.View], known: Known) -> None:
        self._where, self._tensors, self._known = where, tensors, known
        self.views = views
        self.shape, self.dtypes, self.kind = known.shape, known.dtypes, known.kind

    def zeros(self) -> _C.View:
        return _C.zeros(self.views[0].count, self.dtypes[0].code)

    @staticmethod
    def backend(threads: int | None) -> CpuBackend:
        return cpu(thread_count(threads))

    def output(self, out: T | None) -> tuple[T, _C.Sink]:
        alike, make, *_ = self._known
        result: T = make(self._tensors[0]) if out is None else out
        refused = out is not None and is_torch(out) and is_result(out)
        sink = None if refused else alike.sink(result, () if out is None else self.views)
        if sink is None:  # of another type, or not to be written
            return Operands(self._where, self._tensors).output(out)
        if out is not None and is_torch(out):
            written(out)
        return result, sink


def operands(where: str, tensors: list[T]) -> Operands[T] | Again[T]:
    """The tensors of a call, checked: NumPy's or torch's, of one shape, contiguous, of types that
    have kernels. Raises FastmergeError, prefixed with ``where``, for others.
    """
    found = known(tensors)
    views = None if found is None else found.alike.views(tensors)
    if found is not None and views is not None:
        return Again(where, tensors, views, found)
    made = Operands(where, tensors)
    new = made.known(tensors)
    if new is not None:
        if len(_known) >= _MOST_KINDS:
            _known.clear()
        _known[new.kind] = new
    return made


def equal(pool: _C.Pool, views: Sequence[_C.View]) -> bool:
    """Whether they are several of one type with the same bytes; reads little where they differ."""
    if len(views) < 2 or not _C.equal(pool, views[0], views[1]):
        return False
    return all(_C.equal(pool, views[0], other) for other in views[2:])
