"""Every merge method is a row of one table: its parameters, its arity, its paper, and its rule.

A row has one of two shapes (see csrc/ and kernels/ for the four primitives behind them):

* a *combination*: ``rule`` turns the operands' Gram matrix into coefficients; the weights are read
  by
  ``gram`` and ``combine`` only;
* a *consensus*: ``sparsify`` says which delta entries survive; ``select`` and ``consensus`` do the
  work.
"""

from __future__ import annotations

from fastmerge.methods.table import METHODS, find
from fastmerge.methods.types import REQUIRED, Method, Parameter

__all__ = ["METHODS", "REQUIRED", "Method", "Parameter", "find"]
