"""Every merge method is a row of one table: its parameters, its arity, its paper, and its shape.

The rows are in `table`, the shapes (what a method is computed by) in `shapes`; the four primitives
behind them are in csrc/ and kernels/. `register` adds rows of others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmerge.lazily import loading
from fastmerge.methods import travel  # noqa: F401 - how rows are pickled
from fastmerge.methods.plugins import Option, find, known, load, method
from fastmerge.methods.registry import register, unregister
from fastmerge.methods.shapes import Combination, Consensus, Elementwise, Function, Pointwise
from fastmerge.methods.table import METHODS
from fastmerge.methods.types import REQUIRED, Method, Parameter

__all__ = [
    "METHODS",
    "REQUIRED",
    "Combination",
    "Consensus",
    "Elementwise",
    "Function",
    "Method",
    "Option",
    "Parameter",
    "Pointwise",
    "find",
    "known",
    "load",
    "method",
    "register",
    "unregister",
]

if not TYPE_CHECKING:  # which would make every misspelt name one that is there
    __getattr__ = loading(__name__)
