"""One set of items as two that share none: those that steer, and the hold-out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fastmerge.errors import RecipeError
from fastmerge.recipe.section import Section, field, real, whole


class Split(Section):
    """How the items of each task are drawn, without replacement: ``steer`` and ``holdout`` are
    shares (below 1) or numbers of items (1 and more); the hold-out is by default the rest.
    """

    steer: float = field(real(above=0), 0.5)
    holdout: float | None = field(real(above=0), None)
    seed: int = field(whole(0, below=2**63), 0)

    def check(self) -> None:
        for key, size in (("steer", self.steer), ("holdout", self.holdout)):
            if size is not None and size > 1 and size % 1:
                raise RecipeError(
                    f"{self.at(key)}: '{key}' is a share below 1 or a whole number of items, not "
                    f"{size:g}"
                )
        if self.holdout is not None and max(self.steer, self.holdout) < 1 < sum(self.shares):
            raise RecipeError(f"{self.where}: the shares add up to {sum(self.shares):g}, above 1")

    @property
    def shares(self) -> tuple[float, float]:
        """Of both parts, as they are written; 0 for a rest."""
        return self.steer, self.holdout or 0.0

    def drawn(self, name: str, items: Sequence[int], side: str) -> list[int]:
        """The items of ``side`` ('steer' or 'holdout') in the order in which a limit takes them: a
        smaller limit's are among a larger one's. Raises FastmergeError where there are too few.
        """
        count = len(items)
        steer = self._size(self.steer, count)
        held = count - steer if self.holdout is None else self._size(self.holdout, count)
        if held < 1 or steer + held > count:
            raise RecipeError(
                f"{self.where}: '{name}' has {count} items, too few for {steer} that steer and "
                f"{max(held, 1)} held out"
            )
        # By the task's name: the items of one do not depend on which others are there.
        own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        order = np.random.default_rng([self.seed, own]).permutation(count)
        chosen = order[:steer] if side == "steer" else order[steer : steer + held]
        return [items[i] for i in chosen]

    @staticmethod
    def _size(wanted: float, count: int) -> int:
        return int(wanted) if wanted >= 1 else max(1, round(wanted * count))
