"""What the four primitives take besides tensors and numbers: which elements are one vector, and how
deltas agree. (What `select` is asked and answers is in fastmerge.selection.)

The kernels take the fields as keywords: ``**vars(vectors)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Vectors:
    """Which elements of a tensor form one vector, for `gram` and `combine`: all of them (``axis``
    None), or each row (1) or each column (0) of it as a matrix of ``rows`` x ``cols`` elements.
    """

    axis: int | None = None
    rows: int = 1
    cols: int = 0

    @classmethod
    def of(cls, shape: Sequence[int], axis: int | None) -> Vectors:
        """Of a tensor of any shape, whose last axis makes the rows and whose first the columns."""
        if axis is None or not shape:
            return cls(None, 1, math.prod(shape))
        if axis == 1:
            return cls(1, math.prod(shape[:-1]), shape[-1])
        return cls(0, shape[0], math.prod(shape[1:]))

    @property
    def count(self) -> int:
        """How many vectors there are."""
        return 1 if self.axis is None else self.rows if self.axis == 1 else self.cols


WHOLE = Vectors()  # the tensor is one vector
VOTES = WEIGHTED, PLAIN, FREQUENCY = range(3)  # of an election


@dataclass(frozen=True)
class Agreement:
    """How one delta is made of several weighted ones.

    ``elect``: of those alone whose sign was elected. ``normalize``: divided by the sum of their
    weights. ``scale``: the factor on the result. ``origin``: the flat index of the first element,
    where a tensor is part of something longer. ``votes``: the sign elected is that of the sum of
    the deltas, WEIGHTED or as they are (PLAIN), or of their signs (FREQUENCY). ``counted``: divided
    by how many they are instead.
    """

    elect: bool
    normalize: bool
    scale: float = 1.0
    origin: int = 0
    votes: int = WEIGHTED
    counted: bool = False
