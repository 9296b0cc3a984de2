"""What every plan has: the models that it reads, and the text that says how they are merged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from fastmerge.errors import FastmergeError
from fastmerge.models.model import Model


@dataclass(frozen=True, kw_only=True)
class AnyPlan:
    """A plan of a model or of an adapter; `Plan` says what its fields are."""

    models: tuple[Model, ...]
    references: tuple[str, ...]
    seed: int | None
    seed_derived: bool
    recipe_text: str
    notes: tuple[str, ...]
    keep_paths: bool = False

    @property
    def places(self) -> list[Path]:
        """The files and folders that are read, which no output may touch."""
        return [place for model in self.models for place in model.places]

    @property
    def stamps(self) -> list[Any]:
        """What must not change between an interrupted run and the one that continues it."""
        return [stamp for model in self.models for stamp in model.stamp]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if int(protocol) < 2:  # which have no words for classes with slots
            raise FastmergeError(f"a plan: pickle it with protocol 2 or later, not {protocol}")
        return super().__reduce_ex__(protocol)

    def check_unchanged(self) -> None:
        """Raises FastmergeError where a model is not what it was when it was opened."""
        for model in self.models:
            model.check_unchanged()
