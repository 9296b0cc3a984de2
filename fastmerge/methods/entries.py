"""Expressions of entries: a Python function of `Entry`s, called once, becomes the operations that
the kernels run over every entry.

Each operation is one of float32, rounded on its own, in the order in which Python runs them;
numbers are float64 until they meet an entry. `where`, `minimum` and `maximum` take NumPy arrays as
well, so that a formula can be tried out on them.
"""

from __future__ import annotations

from itertools import count
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fastmerge.errors import FastmergeError

_serial = count()
_INPUT, _CONSTANT = "input", "constant"


class Entry:
    """What an entry is or becomes; made by arithmetic on others: ``+ - * /``, ``abs``, and
    comparisons, which are 1 where they hold and 0 elsewhere.
    """

    __array_ufunc__ = None  # a NumPy number on the left leaves the operation to this class
    __slots__ = ("of", "operation", "serial")

    def __init__(self, operation: str, *of: Any) -> None:
        self.operation = operation
        self.of = of
        self.serial = next(_serial)

    def __add__(self, other: Any) -> Entry:
        return _made("add", self, other)

    def __radd__(self, other: Any) -> Entry:
        return _made("add", other, self)

    def __sub__(self, other: Any) -> Entry:
        return _made("subtract", self, other)

    def __rsub__(self, other: Any) -> Entry:
        return _made("subtract", other, self)

    def __mul__(self, other: Any) -> Entry:
        return _made("multiply", self, other)

    def __rmul__(self, other: Any) -> Entry:
        return _made("multiply", other, self)

    def __truediv__(self, other: Any) -> Entry:
        return _made("divide", self, other)

    def __rtruediv__(self, other: Any) -> Entry:
        return _made("divide", other, self)

    def __neg__(self) -> Entry:
        return _made("negative", self)

    def __abs__(self) -> Entry:
        return _made("absolute", self)

    def __lt__(self, other: Any) -> Entry:
        return _made("less", self, other)

    def __gt__(self, other: Any) -> Entry:
        return _made("less", other, self)

    def __le__(self, other: Any) -> Entry:
        return _made("less_equal", self, other)

    def __ge__(self, other: Any) -> Entry:
        return _made("less_equal", other, self)

    def __eq__(self, other: object) -> NoReturn:
        raise FastmergeError("entries are not compared with == or !=; use <= and >=")

    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise FastmergeError(
            "an entry is no truth value, as each tensor has many; use where(condition, a, b), "
            "minimum and maximum in place of if, min and max"
        )


def where(condition: Any, a: Any, b: Any) -> Any:
    """One of two, entry by entry: a where the condition is not 0, else b.

    ``condition``, ``a``, ``b``: symbols of entries, numbers, or NumPy arrays. Returns a symbol
    where one of them is, else an array. Raises FastmergeError for what is no symbol beside one.
    """
    if _symbolic(condition, a, b):
        return _made("where", condition, a, b)
    return np.where(np.not_equal(condition, 0), a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two, entry by entry: b where it is less than a, else a (so a where either is
    NaN).

    ``a``, ``b``: symbols of entries, numbers, or NumPy arrays. Returns a symbol where one of them
    is, else an array. Raises FastmergeError for what is no symbol beside one.
    """
    return _made("minimum", a, b) if _symbolic(a, b) else np.where(np.less(b, a), b, a)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two, entry by entry: b where it is more than a, else a (so a where either is
    NaN).

    ``a``, ``b``: symbols of entries, numbers, or NumPy arrays. Returns a symbol where one of them
    is, else an array. Raises FastmergeError for what is no symbol beside one.
    """
    return _made("maximum", a, b) if _symbolic(a, b) else np.where(np.greater(b, a), b, a)


def _symbolic(*operands: Any) -> bool:
    return any(isinstance(operand, Entry) for operand in operands)


def _made(operation: str, *operands: Any) -> Entry:
    return Entry(operation, *map(_entry, operands))


def _entry(value: Any) -> Entry:
    if isinstance(value, Entry):
        return value
    try:
        return Entry(_CONSTANT, float(value))
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise FastmergeError(f"an entry is computed with entries and numbers, not {kind}") from None


class Program(NamedTuple):
    """What `_C.pointwise` runs as ``expression``: operations (name, result, operands), and the
    numbers of its constants.
    """

    operations: tuple[tuple[str, int, int, int, int], ...]
    numbers: tuple[float, ...]


def inputs(models: int) -> tuple[list[Entry], Entry]:
    """The models' entries, and the base's."""
    *each, base = (Entry(_INPUT, i) for i in range(models + 1))
    return each, base


def compiled(root: Any, models: int) -> Program:
    """The operations that give ``root``, of what `inputs` gave for as many models.

    A result's place is taken again once nothing reads it any more, but never by what reads it.
    """
    root = _entry(root)
    order = _reached(root)
    last = {of: entry for entry in order for of in entry.of if isinstance(of, Entry)}
    free: list[int] = []
    place: dict[Entry, int] = {}
    places = count(models + 1)
    operations, numbers = [], list[float]()

    def operand(of: Entry) -> int:
        if of.operation == _INPUT:
            return int(of.of[0])
        if of.operation == _CONSTANT:  # at every use, or its place would be kept for long
            numbers.append(of.of[0])
            operations.append((_CONSTANT, at := taken(), len(numbers) - 1, 0, 0))
            return at
        return place[of]

    def taken() -> int:
        return free.pop() if free else next(places)

    for entry in order:
        if entry.operation in (_INPUT, _CONSTANT):
            continue
        found = [operand(of) for of in entry.of]
        place[entry] = taken()
        a, b, c = (*found, 0, 0)[:3]
        operations.append((entry.operation, place[entry], a, b, c))
        done = {of for of in entry.of if of.operation == _CONSTANT or last[of] is entry}
        free += {at for at, of in zip(found, entry.of, strict=True) if of in done and at > models}
    if root.operation in (_INPUT, _CONSTANT):
        operations.append(("copy", next(places), operand(root), 0, 0))
    return Program(tuple(operations), tuple(numbers))


def _reached(root: Entry) -> list[Entry]:
    """Each entry that ``root`` follows from, after those it follows from itself."""
    found, todo = {root}, [root]
    while todo:  # not recursive: a sum over a thousand models is a thousand deep
        for of in todo.pop().of:
            if isinstance(of, Entry) and of not in found:
                found.add(of)
                todo.append(of)
    return sorted(found, key=lambda entry: entry.serial)
