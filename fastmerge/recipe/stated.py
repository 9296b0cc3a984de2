"""What every recipe may state of its output: a type, and a seed under either of its names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from fastmerge.dtypes import MERGEABLE, DType, parse
from fastmerge.recipe.section import Section


class Stating(Section):
    """A document whose fields these four are among."""

    dtype: str | None
    out_dtype: str | None
    seed: int | None
    random_seed: int | None

    types: ClassVar[Sequence[DType]] = MERGEABLE  # that it may state

    @property
    def stated_dtype(self) -> DType | None:
        """The type written: ``out_dtype``, else ``dtype``; RecipeError where there is no such."""
        for key, name in (("out_dtype", self.out_dtype), ("dtype", self.dtype)):
            if name is not None:
                return parse(name, f"{self.at(key)}: {key}", self.types)
        return None

    @property
    def arithmetic(self) -> DType | None:
        """What ``dtype`` says of the arithmetic, which is float64's or float32's; None: nothing."""
        return None if self.dtype is None else parse(self.dtype, f"{self.at('dtype')}: dtype")

    @property
    def own_seed(self) -> int | None:
        return self.random_seed if self.seed is None else self.seed

    def check_seed(self) -> None:
        """Raises RecipeError where it is given twice."""
        if self.seed is not None and self.random_seed is not None:
            self.refuse("random_seed", "'seed' and 'random_seed' say the same; keep one")
