"""The tree that one output tensor is made by: `Merge` nodes over leaves."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmerge.codings import Coding, in_full
from fastmerge.dtypes import F32, DType
from fastmerge.methods import Combination, Method
from fastmerge.once import cached_property
from fastmerge.records import record


class Leaf:
    """What the numbers of a tree come from: a stored tensor, or what follows from several.

    Not an ABC, of which `isinstance` takes five times as long: a million times in 90 000 tensors.
    """

    shape: tuple[int, ...]
    dtype: DType

    @property
    def inputs(self) -> tuple[Node, ...]:
        """Merges that it is made from, which are to be computed first."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.dtype.bytes_for(math.prod(self.shape))

    @property
    @abstractmethod
    def own(self) -> Stored | None:
        """The stored tensor that it stands for; None where that is a merge."""

    @property
    @abstractmethod
    def stored(self) -> tuple[Stored, ...]:
        """The tensors of models that it reads."""

    @property
    @abstractmethod
    def key(self) -> str:
        """What decides its numbers, as text; models by their place in the plan."""


@record()
class Stored(Leaf):
    """One tensor of one input model: ``model`` indexes Plan.models, ``name`` is its name there."""

    model: int
    name: str
    shape: tuple[int, ...] = field(default=(), compare=False)
    dtype: DType = field(default=F32, compare=False)

    def __hash__(self) -> int:
        return hash(self.name) ^ self.model  # a name's hash is kept, and models share names

    @property
    def own(self) -> Stored:
        return self

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self,)

    @property
    def key(self) -> str:
        return f"{self.model}/{self.name!r}"


@record()
class Dequantised(Leaf):
    """The numbers of a tensor that is stored as codes of few bits, and scales in another.

    ``shape``: of the numbers, the last two being a matrix's.
    """

    codes: Stored
    scales: Stored
    coding: Coding
    shape: tuple[int, ...] = field(default=(), compare=False)
    dtype: DType = field(default=F32, compare=False)

    def __hash__(self) -> int:
        return hash(self.codes)

    @property
    def own(self) -> Stored:
        return self.codes

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.codes, self.scales)

    @property
    def key(self) -> str:
        return f"{self.codes.key} times {self.scales.key} {in_full(self.coding)}"


@record()
class Narrowed(Leaf):
    """A float64 tensor where the arithmetic is float32: each number rounded once."""

    source: Stored
    shape: tuple[int, ...] = field(default=(), compare=False)
    dtype: DType = field(default=F32, compare=False)

    def __hash__(self) -> int:
        return hash(self.source)

    @property
    def own(self) -> Stored:
        return self.source

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.source,)

    @property
    def key(self) -> str:
        return f"{self.source.key} as float32"


class Stack(NamedTuple):
    """Factors of several matrices in one (models/parameters.py): rows e*rank + k of A and columns
    k*matrices + e of B are matrix e's. one: the only one that is meant, of whose product the rows
    from ``begin`` to ``end`` are; None: all.
    """

    matrices: int
    one: int | None = None
    begin: int = 0
    end: int = 0


@dataclass(frozen=True)
class LowRank(Leaf):
    """``base + scale * B @ A``: what an adapter makes of a weight (models/adapter.py).

    a: (rank, in, ...), b: (out, rank, ...). transposed: the weight is (in, out), to which the
    product's transpose is added. magnitude: ``out`` numbers, the lengths that DoRA gives the sum's
    rows, or its columns where it is transposed. stack: of experts, whose factors are in one.
    """

    base: Leaf  # not made from merges
    a: Stored
    b: Stored
    scale: float
    transposed: bool
    magnitude: Stored | None
    shape: tuple[int, ...]
    dtype: DType = F32
    stack: Stack | None = None

    def __hash__(self) -> int:
        return hash((self.a.model, self.a.name))

    @property
    def rank(self) -> int:
        return self.a.shape[0] // (1 if self.stack is None else self.stack.matrices)

    @property
    def factor_count(self) -> int:
        """Numbers of A and B that it is made with."""
        if self.stack is not None and self.stack.one is not None:
            return (self.stack.end - self.stack.begin + self.a.shape[1]) * self.rank
        return math.prod(self.a.shape) + math.prod(self.b.shape)

    @property
    def own(self) -> Stored | None:
        return self.base.own

    @property
    def stored(self) -> tuple[Stored, ...]:
        more = () if self.magnitude is None else (self.magnitude,)
        return (*self.base.stored, self.a, self.b, *more)

    @property
    def key(self) -> str:
        lengths = None if self.magnitude is None else self.magnitude.key
        factors = f"{self.b.key} {self.a.key} {self.transposed} {lengths}"
        if self.stack is not None:
            factors += f" {tuple(self.stack)}"
        return f"{self.base.key} + {self.scale.hex()} * {factors}"


ZERO, MEAN = -1, -2  # in RowMap.source


@dataclass(frozen=True, eq=False)
class RowMap:
    """Where each row of a matrix comes from: row ``row[i]`` of source ``source[i]``; nothing but
    zeros (ZERO); or a mean (MEAN), number ``row[i]`` of ``means``, each of which is a list of
    (source, row). Rows from ``real`` on have no token: they hold the mean of those before.

    source: int32, row: int64, of shape (real,). total: rows in all.
    """

    source: NDArray[np.int32]
    row: NDArray[np.int64]
    means: tuple[tuple[tuple[int, int], ...], ...]
    total: int

    @property
    def real(self) -> int:
        return len(self.source)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of all of it."""
        found = hashlib.sha256(self.source.tobytes() + self.row.tobytes())
        found.update(f"{self.means} {self.total}".encode())
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class Rows(Leaf):
    """A matrix (or vector) made of rows of others of its width: what another vocabulary makes of a
    model's embeddings. ``sources[0]`` is the model's own; ``heights`` are the sources' rows.
    """

    sources: tuple[Node, ...]
    heights: tuple[int, ...]
    rows: RowMap
    shape: tuple[int, ...]
    dtype: DType

    @property
    def inputs(self) -> tuple[Node, ...]:
        return tuple(source for source in self.sources if not isinstance(source, Stored))

    @property
    def own(self) -> Stored | None:
        own = self.sources[0]
        return own.own if isinstance(own, Leaf) else None

    @property
    def stored(self) -> tuple[Stored, ...]:
        return tuple(source for source in self.sources if isinstance(source, Stored))

    @property
    def key(self) -> str:
        return f"rows {self.rows.digest} of {' '.join(stored.key for stored in self.stored)}"


@dataclass(frozen=True, eq=False)
class Made(Leaf):
    """Numbers that no file holds, few enough to be made when they are wanted: a router's rows.

    make: gives them, fp32, of this shape; from any thread. text: what decides them. kind: what they
    are, for people.
    """

    make: Callable[[], NDArray[np.float32]]
    text: str
    kind: str
    shape: tuple[int, ...]
    dtype: DType = F32

    @property
    def own(self) -> None:
        return None

    @property
    def stored(self) -> tuple[Stored, ...]:
        return ()

    @property
    def key(self) -> str:
        return f"made {self.text}"


Kind = TypeVar("Kind")  # of a tree's nodes
R = TypeVar("R")


class Based(Generic[Kind]):
    """A node of operands, and of a base apart where there is one."""

    operands: tuple[Kind, ...]
    base: Kind | None

    @property
    def inputs(self) -> tuple[Kind, ...]:
        """The base, when there is one, then the operands: the order of a rule's coefficients."""
        return self.operands if self.base is None else (self.base, *self.operands)

    def parted(self, results: Sequence[R]) -> tuple[R | None, tuple[R, ...]]:
        """Of what is parallel to `inputs`: the base's, None without one, and the operands'."""
        if self.base is None:
            return None, tuple(results)
        return results[0], tuple(results[1:])


@record(eq=False)
class Merge(Based["Node"]):
    """One merge of operands, in recipe order; ``base`` apart unless the method takes it as one."""

    method: Method
    operands: tuple[Node, ...]
    base: Node | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    operand_values: tuple[Mapping[str, Any], ...] = ()
    seed: int | None = None  # random methods: the recipe's seed
    # The tensor it makes in its own document, for which random methods draw; "" where that is the
    # output's. Another document may use it under other names, but must find it as it was drawn.
    name: str = ""
    # The operands' places in the recipe, by which random methods draw; () where all are there.
    numbers: tuple[int, ...] = ()
    # What the recipe calls what stands at those places, for people.
    labels: tuple[str, ...] = ()

    @cached_property
    def is_flat(self) -> bool:
        """Whether it merges leaves alone, as most of 90 000 trees do: nothing to walk."""
        return not any(node.inputs for node in self.inputs)

    @property
    def axis(self) -> int | None:
        """Along what the method takes its vectors: None = whole tensor, 1 = rows, 0 = columns."""
        return self.method.axis(self.values) if isinstance(self.method, Combination) else None


Node: TypeAlias = Leaf | Merge


class HasInputs(Protocol):
    """A node of any tree: of tensors here, of whole models in fastmerge.search."""

    @property
    def inputs(self) -> tuple[Any, ...]: ...


N = TypeVar("N", bound=HasInputs)


def walk(root: N, stop: Container[N] = ()) -> list[N]:
    """Every node below ``root`` once, inputs before the nodes that use them; not below ``stop``.

    An explicit stack: a schedule of a thousand steps is a tree a thousand deep.
    """
    if root in stop:
        return [root]
    if not any(node.inputs for node in root.inputs):
        return [*dict.fromkeys(root.inputs), root]  # what most of 90 000 tensors are
    order: list[N] = []
    seen: set[N] = set()
    stack: list[tuple[N, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if node not in stop:
                stack.extend((child, False) for child in reversed(node.inputs))
    return order


def leaves(roots: Iterable[Node]) -> list[Stored]:
    """The distinct stored tensors that ``roots`` read, in order of first use."""
    found: dict[Stored, None] = {}
    seen: set[Node] = set()
    for root in roots:
        stack: list[Node] = [root]
        while stack:  # a walk that need not come back: half its time
            node = stack.pop()
            if isinstance(node, Leaf):
                for stored in node.stored:
                    found[stored] = None
            inputs = node.inputs
            if inputs and node not in seen:
                seen.add(node)
                stack.extend(reversed(inputs))
    return list(found)


def reads_rows(root: Node) -> bool:
    """Whether a tree reads rows from several places, or numbers that no file holds as they are."""
    return any(isinstance(_innermost(node), (Rows, Made, Narrowed)) for node in walk(root))


def _innermost(node: Node) -> Node:
    """What adapters are added to."""
    while isinstance(node, LowRank):
        node = node.base
    return node
