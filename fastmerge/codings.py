"""How numbers are stored as codes of few bits with scales: as files and kernels mean it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Coding(NamedTuple):
    """One way to store matrices. ``code``: "e4m3", "e5m2" (one byte a number, times the scale of
    its block) or "mxfp4" (`fastmerge._C.dequantised` has the layout). ``block``: rows and columns
    that share a scale, those at the ends cut short; None: the whole tensor has one.
    """

    code: str
    block: tuple[int, int] | None

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Blocks of a matrix, down and across."""
        if self.block is None:
            return (1, 1)
        down, across = self.block
        return (-(-rows // down), -(-cols // across))

    def __str__(self) -> str:
        if self.block is None:
            return f"{self.code}, one scale a tensor"
        return f"{self.code}, a scale for {self.block[0]} x {self.block[1]}"


@lru_cache(maxsize=64)  # of 45 000 tensors most have the same
def in_full(coding: Coding) -> str:
    """All that it says, as text."""
    return repr(coding)
