"""The primitives in float64, for what is merged in it: `compute.reference` and `compute.formulas`
over a tensor's parts.

NumPy computes it, at a fraction of the kernels' speed and in operations that IEEE 754 fixes, so
that the bits are those of every machine. No tensor is ever whole in memory: stored ones are read a
part at a time, and what follows from them is computed where it is read, but for merges that
another merge reads, which lie in the CPU back end's bounded scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.compute import formulas, reference
from fastmerge.compute.cpu import CpuBackend, Passes
from fastmerge.compute.lane import Place
from fastmerge.methods.entries import Program
from fastmerge.methods.noise import exp, log
from fastmerge.methods.types import Float64
from fastmerge.models.model import stored_bytes
from fastmerge.primitives import WHOLE, Agreement, Vectors
from fastmerge.selection import ALL, EVERY, MAGNITUDE, RANKED, Selection, Sparsify
from fastmerge.tree.nodes import Merge, Node

_PART = 1 << 16  # entries: ten arrays of them stay in a core's cache
_FEW = 1 << 18  # keys that are sorted in memory
_NONE = (1 << 63) - 1  # the bits that no magnitude is above
_SMALL = 1e-7  # sums up to which mergekit 0.1.5 leaves deltas alone

P = ParamSpec("P")
R = TypeVar("R")
Read = Callable[[int, int], Float64]  # entries [begin, end) of a tensor, flat


@dataclass(frozen=True, eq=False)
class Numbers:
    """``count`` float64 numbers, by parts."""

    count: int
    read: Read


@dataclass(frozen=True, eq=False)
class Output:
    """Where parts go: ``write(begin, numbers)``, each once and in order, which says how many are
    not finite as they are kept.
    """

    count: int
    write: Callable[[int, Float64], int]


def output(place: Place, count: int, pool: _C.Pool) -> Output:
    """The numbers rounded once to the place's type."""
    size = place.dtype.bytes_for(1)

    def write(begin: int, numbers: Float64) -> int:
        made = np.ascontiguousarray(reference.round_to(numbers, place.dtype.code))
        raw = _C.View(made.ctypes.data, made.nbytes, "RAW", made)
        _C.copy(pool, raw, place.sink(begin * size, made.nbytes))
        return _nonfinite(reference.widen(made))

    return Output(count, write)


def widened(view: _C.View, backend: CpuBackend) -> Numbers:
    """A view's numbers; of RAW bytes they are float64 already."""
    is_double = view.dtype == "RAW"

    def read(begin: int, end: int) -> Float64:
        if is_double:
            return stored_bytes(view.slice(8 * begin, 8 * end)).view("<f8")
        return backend.array(view.slice(begin, end)).astype(np.float64)

    return Numbers(view.count // 8 if is_double else view.count, read)


def parts(count: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Where the parts of so many entries begin and end: at multiples of a number."""
    step = max(1, _PART // max(1, multiple)) * max(1, multiple)
    for begin in range(0, count, step):
        yield begin, min(count, begin + step)


def _quietly(function: Callable[P, R]) -> Callable[P, R]:
    """Without NumPy's warnings: what is not finite is counted where it is written."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return run


class DoubleBackend:
    """`compute.backend.Backend` and `methods.shapes.Primitives` in float64."""

    name = "cpu"
    kind = np.float64

    def __init__(self, cpu: CpuBackend) -> None:
        """``cpu``: whose scratch is taken."""
        self._cpu = cpu

    @staticmethod
    def takes(_node: Merge, _parts: Sequence[Node], /) -> str | None:
        return None

    # -------- combinations

    @_quietly
    def gram(
        self, inputs: Sequence[Numbers], base: Numbers | None = None, vectors: Vectors = WHOLE
    ) -> Float64:
        of = [*([] if base is None else [base]), *inputs]
        m, axis, cols = len(of), vectors.axis, vectors.cols
        total = np.zeros((m, m) if axis is None else (vectors.count, m, m))
        for begin, end in parts(of[0].count, 1 if axis is None else cols):
            x = [each.read(begin, end) for each in of]
            if base is not None:
                x = [x[0], *(own - x[0] for own in x[1:])]
            rows = slice(None) if axis != 1 else slice(begin // cols, end // cols)
            for i in range(m):
                for j in range(i, m):
                    product = x[i] * x[j]
                    if axis is None:
                        total[i, j] += product.sum()
                    else:
                        total[rows, i, j] += product.reshape(-1, cols).sum(axis=axis)
        upper = np.triu(np.ones((m, m), bool))
        return np.where(upper, total, np.swapaxes(total, -1, -2))

    @_quietly
    def combine(
        self,
        inputs: Sequence[Numbers],
        coefficients: Float64,
        out: Output,
        *,
        divisor: float | None = None,
        vectors: Vectors = WHOLE,
        wide: bool = False,
    ) -> int:
        del wide  # it always is
        axis = vectors.axis if coefficients.ndim > 1 else None
        cols = 1 if axis is None else vectors.cols
        bad = 0
        # Of fp32 it is the same sum.
        total = None if divisor is None else float(np.cumsum(coefficients)[-1])
        for begin, end in parts(out.count, cols):
            x = [each.read(begin, end) for each in inputs]
            own = coefficients
            if axis is not None:
                x = [part.reshape(-1, cols) for part in x]
                own = own[begin // cols : end // cols] if axis == 1 else own
            made = reference.combine(x, own, divisor=total, axis=axis)
            bad += out.write(begin, made.reshape(-1))
        return bad

    # -------- deltas

    def select(
        self, inputs: Sequence[Numbers], base: Numbers, specs: Sequence[Sparsify]
    ) -> list[Selection]:
        return self.select_across([inputs], [base], [0], specs)

    @_quietly
    def select_across(
        self,
        inputs: Sequence[Sequence[Numbers]],
        bases: Sequence[Numbers],
        origins: Sequence[int],
        specs: Sequence[Sparsify],
        _ends: Sequence[int] = (),
        _passes: Passes | None = None,
    ) -> list[Selection]:
        """`select` of several tensors as one long vector; of parts of a merge each counts all."""
        tensors = list(zip(inputs, bases, origins, strict=True))
        return [
            _select([_Delta(own[i], base, origin) for own, base, origin in tensors], spec)
            for i, spec in enumerate(specs)
        ]

    @_quietly
    def consensus(
        self,
        inputs: Sequence[Numbers],
        base: Numbers,
        weights: Sequence[float],
        selections: Sequence[Selection],
        out: Output,
        agreement: Agreement,
    ) -> int:
        said = {name: value for name, value in vars(agreement).items() if name != "origin"}
        bad = 0
        for begin, end in parts(out.count):
            made = reference.consensus(
                [x.read(begin, end) for x in inputs], base.read(begin, end), weights, selections,
                first=agreement.origin + begin, **said,
            )  # fmt: skip
            bad += out.write(begin, made.reshape(-1))
        return bad

    # -------- formulas

    def pointwise(
        self,
        formula: str,
        inputs: Sequence[Numbers],
        base: Numbers,
        numbers: Sequence[float] = (),
        *,
        selection: Selection | None = None,
        factors: Float64 | None = None,
    ) -> Numbers:
        cols = 1 if factors is None else base.count // max(1, len(factors))

        def read(begin: int, end: int) -> Float64:
            each = None if factors is None else factors[np.arange(begin, end) // cols]
            made = formulas.pointwise(
                formula, [x.read(begin, end) for x in inputs], base.read(begin, end), numbers,
                selection=selection, factors=each, first=begin,
            )  # fmt: skip
            return made.astype(np.float64, copy=False)

        return Numbers(base.count, read)

    @_quietly
    def divergences(self, x: Numbers, base: Numbers, cols: int) -> Float64:
        found = [
            formulas.divergences(x.read(*part), base.read(*part), cols, exp=exp, log=log)
            for part in parts(base.count, cols)
        ]
        return np.concatenate([np.zeros(0), *found])

    def expression(
        self, program: Program, inputs: Sequence[Numbers], base: Numbers | None
    ) -> Numbers:
        of = [*inputs, inputs[0] if base is None else base]

        def read(begin: int, end: int) -> Float64:
            return formulas.expression(program, [each.read(begin, end) for each in of])

        return Numbers(of[0].count, read)

    # -------- tensors

    @staticmethod
    def is_fp32(_out: Output, /) -> bool:
        return False

    def scratch(self, count: int) -> tuple[Numbers, Output]:
        view, _ = self._cpu.scratch(2 * count)

        def memory() -> Float64:
            return stored_bytes(view).view("<f8")  # as long as the view is

        def write(begin: int, numbers: Float64) -> int:
            memory()[begin : begin + numbers.size] = numbers
            return _nonfinite(numbers)

        return Numbers(count, lambda begin, end: memory()[begin:end]), Output(count, write)

    @staticmethod
    @_quietly
    def array(tensor: Numbers) -> Float64:
        made = tensor.read(0, tensor.count).view()
        made.flags.writeable = False  # it may be a file
        return made

    @staticmethod
    def tensor(array: NDArray[Any]) -> Numbers:
        flat = array.reshape(-1).astype(np.float64, copy=False)
        return Numbers(flat.size, lambda begin, end: flat[begin:end])


def _nonfinite(numbers: NDArray[Any]) -> int:
    return int((~np.isfinite(numbers)).sum())


# ---------------------------------------------------------------- thresholds


@dataclass(frozen=True)
class _Delta:
    x: Numbers
    base: Numbers
    origin: int  # the flat index of its first entry

    def keys(self, multiple: int = 1) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """The magnitudes' bits by parts, and each part's flat index."""
        for begin, end in parts(self.base.count, multiple):
            found = reference.magnitude_keys(self.x.read(begin, end), self.base.read(begin, end))
            yield self.origin + begin, found


def _select(deltas: Sequence[_Delta], spec: Sparsify) -> Selection:
    count = sum(delta.base.count for delta in deltas)
    found = Selection.asked(spec, count)._replace(ceiling_bits=_NONE)
    if spec.kind == ALL or not count:
        return found

    def keys() -> Iterator[tuple[int, NDArray[np.uint64]]]:
        for delta in deltas:
            yield from delta.keys()

    if spec.kind == MAGNITUDE and spec.keep == 0:
        found = found._replace(threshold_bits=_NONE, tie_bound=0, kept=0)
    elif spec.kind == MAGNITUDE:
        threshold, bound = _cut(keys, count, spec.skip + spec.keep, spec.tie_rule)
        found = found._replace(threshold_bits=threshold, tie_bound=bound, kept=spec.keep)
        if spec.skip:
            ceiling, bound = _cut(keys, count, spec.skip, spec.tie_rule)
            found = found._replace(ceiling_bits=ceiling, ceiling_bound=bound)
    elif spec.kind == RANKED:
        found = found._replace(mask=_mask(deltas[0], spec))
    if spec.tie_rule == EVERY:
        return found
    kept, before, after = 0, 0.0, 0.0
    for first, own in keys():
        stays = reference.survivors(found, own, first)
        size = own.view(np.float64)
        kept += int(np.count_nonzero(stays))
        before, after = before + float(size.sum()), after + float(size[stays].sum())
    found = found._replace(kept=kept)
    if spec.rescale and kept < count and not (before < _SMALL or after < _SMALL):
        found = found._replace(rescale=before / after)
    return found


def _mask(delta: _Delta, spec: Sparsify) -> NDArray[np.uint32]:
    """A RANKED request's, whole vectors at a time."""
    made = np.zeros(-(-delta.base.count // 32) * 4, np.uint8)
    left, done = np.zeros(0, bool), 0  # bits that fill no byte yet
    for first, keys in delta.keys(spec.length * spec.stride):
        bits = np.concatenate([left, reference.drawn(keys, spec, first)])
        whole = len(bits) // 8
        made[done : done + whole] = np.packbits(bits[: 8 * whole], bitorder="little")
        left, done = bits[8 * whole :], done + whole
    if left.size:
        made[done] = np.packbits(left, bitorder="little")[0]
    return made.view(np.uint32)


def _cut(
    keys: Callable[[], Iterable[tuple[int, NDArray[np.uint64]]]],
    count: int,
    rank: int,
    tie_rule: int,
) -> tuple[int, int | None]:
    """The threshold and the tie bound that leave the ``rank`` largest of the keys, at least one."""
    threshold, tied, wanted = _ranked(lambda: (own for _, own in keys()), count, rank)
    if wanted == tied or tie_rule == EVERY:
        return threshold, None

    def first() -> Iterator[NDArray[np.uint64]]:
        for at, own in keys():
            yield ~reference.order_of(tie_rule, own.size, at)[own == np.uint64(threshold)]

    last, _, _ = _ranked(first, tied, wanted)
    return threshold, ((1 << 64) - 1 - last) + 1


def _ranked(
    numbers: Callable[[], Iterable[NDArray[np.uint64]]], count: int, rank: int
) -> tuple[int, int, int]:
    """The ``rank``th largest of ``count`` numbers, how many equal it, and how many of these are
    among the ``rank`` largest. 16 bits a reading, until so few are left that they can be sorted.
    """
    prefix, shift = 0, 64  # numbers >> shift is the prefix of those that are left
    while shift and count > _FEW:
        shift -= 16
        digits = np.zeros(1 << 16, np.int64)
        for part in numbers():
            own = _left(part, prefix, shift + 16) >> np.uint64(shift) & _DIGIT
            digits += np.bincount(own.astype(np.int64), minlength=1 << 16)
        upto = digits[::-1].cumsum()
        place = int(np.searchsorted(upto, rank))
        count = int(digits[::-1][place])
        rank -= int(upto[place]) - count
        prefix = prefix << 16 | (1 << 16) - 1 - place
    if not shift:
        return prefix, count, rank
    few = np.sort(np.concatenate([_left(part, prefix, shift) for part in numbers()]))
    found = few[count - rank]
    larger = count - int(np.searchsorted(few, found, side="right"))
    return int(found), int(np.count_nonzero(few == found)), rank - larger


_DIGIT = np.uint64((1 << 16) - 1)


def _left(part: NDArray[np.uint64], prefix: int, shift: int) -> NDArray[np.uint64]:
    return part if shift == 64 else part[part >> np.uint64(shift) == np.uint64(prefix)]
