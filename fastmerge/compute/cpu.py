"""The CPU back end: ``_C`` on one pool of threads."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastmerge import _C
from fastmerge.errors import FastmergeError, ResourceError, argument, brief, is_whole
from fastmerge.methods.entries import Program
from fastmerge.methods.types import Float32, Float64
from fastmerge.primitives import WHOLE, Agreement, Vectors
from fastmerge.selection import ALL, RANDOM, RANKED, Selection, Sparsify
from fastmerge.tree.nodes import Merge, Node

Passes = Callable[[int, Callable[[int], bytes]], Sequence[bytes]]

_MOST_THREADS = 1024
_MASKED_FROM = 1 << 16  # entries: fewer are drawn again in the time that their mask's array takes


def thread_count(threads: int | None = None) -> int:
    """``threads``, else FASTMERGE_NUM_THREADS, else the CPUs this process may use."""
    if threads is None and (usual := _C.usual_threads()):
        return usual
    if type(threads) is int and 1 <= threads <= _MOST_THREADS:  # as nearly all: 1 us of a call
        return threads
    text = os.environ.get("FASTMERGE_NUM_THREADS")
    where = argument("threads")
    if threads is None and text:
        where = "FASTMERGE_NUM_THREADS"
        try:
            threads = int(text)
        except ValueError as error:
            raise FastmergeError(f"{where}: '{text}' is not a whole number of threads") from error
    if threads is None:
        return len(os.sched_getaffinity(0))
    if not is_whole(threads):
        raise FastmergeError(f"{where}: {brief(threads)} is not a whole number of threads")
    if not 1 <= threads <= _MOST_THREADS:
        raise FastmergeError(f"{where}: {brief(threads)} threads; use 1 to {_MOST_THREADS}")
    return int(threads)


def isa() -> str:
    """The CPU instruction set in use; an unusable FASTMERGE_ISA is an error that names the known
    ones.
    """
    try:
        return _C.isa()
    except (ValueError, RuntimeError) as error:
        raise FastmergeError(str(error)) from error


class _Memory:
    """An fp32 view's memory for NumPy, which keeps the view; read-only, as it may be a file."""

    def __init__(self, view: _C.View) -> None:
        self.view = view
        self.__array_interface__ = {
            "version": 3, "typestr": "<f4", "shape": (view.count,), "data": (view.address, True)
        }  # fmt: skip


class CpuBackend:
    """The C++ kernels on one thread pool. Tensors are `_C.View`, outputs are `_C.Sink`."""

    name = "cpu"
    kind = np.float32

    def __init__(
        self, threads: int, *, scratch_folder: Path | None = None, scratch_bytes: int = 64 << 20
    ) -> None:
        """Intermediate tensors for which ``scratch_bytes``, shared by all that exist at a time, has
        no room lie in an unlinked file in ``scratch_folder``, so that anonymous memory stays
        bounded whatever their size and number.
        """
        isa()
        try:
            self.pool = _C.Pool(threads)
        except RuntimeError as error:
            raise ResourceError(
                f"{argument('threads')}: no room for {threads} threads ({error})"
            ) from error
        self._scratch_folder = scratch_folder
        self._scratch_left = scratch_bytes
        self._lock = threading.RLock()  # a collection inside it may free an array

    @staticmethod
    def takes(_node: Merge, _parts: Sequence[Node], /) -> str | None:
        return None

    def gram(
        self,
        inputs: Sequence[_C.View],
        base: _C.View | None = None,
        vectors: Vectors = WHOLE,
    ) -> Float64:
        if vectors.axis is None:
            return _C.gram(self.pool, inputs, base)
        return _C.gram(self.pool, inputs, base, **vars(vectors))

    def combine(
        self,
        inputs: Sequence[_C.View],
        coefficients: Float64,
        out: _C.Sink,
        *,
        divisor: float | None = None,
        vectors: Vectors = WHOLE,
        wide: bool = False,
    ) -> int:
        if vectors.axis is None:  # 1 us less than with what is not asked for
            return _C.combine(self.pool, inputs, coefficients, out, divisor=divisor, wide=wide)
        return _C.combine(
            self.pool, inputs, coefficients, out, divisor=divisor, wide=wide, **vars(vectors)
        )

    def select(
        self, inputs: Sequence[_C.View], base: _C.View, specs: Sequence[Sparsify]
    ) -> list[Selection]:
        # Where there is nothing to find, spare the pass over the weights.
        if all(spec.kind == ALL for spec in specs):
            return [Selection(kept=view.count) for view in inputs]
        masks = [self._mask(base.count, spec) for spec in specs]
        if all(mask is None for mask in masks):
            return _C.select(self.pool, inputs, base, specs)
        chosen = _C.select(self.pool, inputs, base, specs, masks)
        return [s._replace(mask=mask) for s, mask in zip(chosen, masks, strict=True)]

    def consensus(
        self,
        inputs: Sequence[_C.View],
        base: _C.View,
        weights: Sequence[float],
        selections: Sequence[Selection],
        out: _C.Sink,
        agreement: Agreement,
    ) -> int:
        masks = [selection.mask for selection in selections]
        return _C.consensus(
            self.pool, inputs, base, weights, selections, out, masks, **vars(agreement)
        )

    def pointwise(
        self,
        formula: str,
        inputs: Sequence[_C.View],
        base: _C.View,
        numbers: Sequence[float] = (),
        *,
        selection: Selection | None = None,
        factors: Float64 | None = None,
    ) -> _C.View:
        each = None if factors is None else factors.astype(np.float32)
        return _C.pointwise(formula, inputs, base, numbers, selection=selection, factors=each)

    def expression(
        self, program: Program, inputs: Sequence[_C.View], base: _C.View | None
    ) -> _C.View:
        return _C.pointwise(
            "expression", inputs, inputs[0] if base is None else base, program.numbers,
            operations=program.operations,
        )  # fmt: skip

    def divergences(self, x: _C.View, base: _C.View, cols: int) -> Float64:
        return _C.divergences(self.pool, x, base, cols)

    def select_across(
        self,
        inputs: Sequence[Sequence[_C.View]],
        bases: Sequence[_C.View],
        origins: Sequence[int],
        specs: Sequence[Sparsify],
        ends: Sequence[int] = (),
        passes: Passes | None = None,
    ) -> list[Selection]:
        """`select` of several tensors as one long vector; with ``passes`` in pieces, of which other
        processes may count some.
        """
        return _C.select_across(self.pool, inputs, bases, origins, specs, ends, passes)

    @staticmethod
    def is_fp32(out: _C.Sink) -> bool:
        return out.dtype == "F32"

    def _mask(self, count: int, spec: Sparsify) -> _C.View | None:
        """Where to put the bits of a draw: by rank there is no other answer, and what is drawn at
        random need not be drawn twice, where memory has room.
        """
        words = -(-count // 32)
        if spec.kind == RANKED:
            return self.scratch(words)[0]
        if spec.kind != RANDOM or not 0 < spec.keep_below < 1 << 32 or count < _MASKED_FROM:
            return None
        array = self._memory(words)
        return None if array is None else self.tensor(array)

    def _memory(self, count: int) -> Float32 | None:
        """A new array; None where what intermediate tensors may take has no room for it."""
        if self._scratch_folder is None:
            return np.empty(count, dtype=np.float32)
        if not self._take_scratch(4 * count):
            return None
        array = np.empty(count, dtype=np.float32)
        weakref.finalize(array, self._take_scratch, -4 * count)
        return array

    def scratch(self, count: int) -> tuple[_C.View, _C.Sink]:
        array, nbytes = self._memory(count), 4 * count
        if array is None:
            try:
                with tempfile.TemporaryFile(dir=self._scratch_folder) as file:
                    # A page that the disk has no room for would end the process with SIGBUS.
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                    array = np.memmap(file, dtype=np.float32, mode="r+", shape=(count,))
            except OSError as error:
                raise ResourceError(
                    f"{self._scratch_folder}: no room for an intermediate tensor of {nbytes} "
                    f"bytes ({error.strerror}); free some, or raise {argument('memory_limit')}"
                ) from error
        view = _C.View(array.ctypes.data, count, "F32", array)
        return view, _C.MemorySink(view)

    def array(self, tensor: _C.View) -> Float32:
        if tensor.dtype != "F32" or tensor.is_gathered:
            narrow, (tensor, sink) = tensor, self.scratch(tensor.count)
            self.combine([narrow], np.ones(1), sink)
        return np.asarray(_Memory(tensor))

    def tensor(self, array: Float32) -> _C.View:
        return _C.View(array.ctypes.data, array.size, "F32", array)

    def _take_scratch(self, nbytes: int) -> bool:
        with self._lock:
            if nbytes > self._scratch_left:
                return False
            self._scratch_left -= nbytes
            return True


@lru_cache(maxsize=4)  # each keeps its threads
def cpu(threads: int) -> CpuBackend:
    """The process-wide CPU back end of this many threads."""
    return CpuBackend(threads)
