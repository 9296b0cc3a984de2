"""Rows of the method table in pickles and copies, where they are their names.

A row holds functions, which no pickle has; a plan that goes to a process pool or a cluster's worker
finds the row of the same name there, registered ones and plugins included.
"""

from __future__ import annotations

import copyreg
from typing import Any

from fastmerge.methods.plugins import find
from fastmerge.methods.shapes import Combination, Consensus, Elementwise, Function, Pointwise
from fastmerge.methods.table import METHODS
from fastmerge.methods.types import Method


def _reduced(row: Method) -> Any:
    if METHODS.get(row.name) is row:
        return find, (row.name,)
    return row.__reduce_ex__(4)  # nobody else knows it


for _shape in (Combination, Consensus, Elementwise, Function, Pointwise):
    copyreg.pickle(_shape, _reduced)
