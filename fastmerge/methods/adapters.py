"""The methods that merge adapters alone: PEFT's combination types, by its names.

(peft 0.21, ``LoraModel.add_weighted_adapter``.) They are no rows of the method table: what they
merge are factors, and ``linear`` or ``ties`` of factors are not those of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmerge.methods.types import DARE, REQUIRED, TASK_ARITHMETIC, TIES, Method, Parameter


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(Method):
    """``over``: what is merged, as `fastmerge.compute.adapters` says. ``prune``: which entries stay
    at a density. ``elect``: whether the sign of the majority is elected, entry by entry.
    """

    over: Literal["factors", "sum", "products"]
    prune: Literal["", "magnitude", "random"] = ""
    elect: bool = False

    def cuts(self, rank: int | None) -> bool:
        """Whether the output is an SVD at a rank; of a sum only where one is asked for."""
        return self.name.endswith("svd") or (self.over == "sum" and rank is not None)


_WEIGHT = Parameter("weight", float, REQUIRED, "factor on the adapter", per_model=True)
_NORMALIZE = Parameter(
    "normalize", bool, False, "divide the weights by their sum, which PEFT does not"
)
_TARGETS = Parameter(
    "targets",
    str,
    "same",
    "whether all must adapt the same modules, or each is taken where it is there, as PEFT does",
    choices=("same", "any"),
)
_DENSITY = Parameter(
    "density", float, 1.0, "fraction of entries kept", per_model=True, low=0, high=1
)
_SIGNS = Parameter(
    "majority_sign_method",
    str,
    "total",
    "whether signs are elected by sum or by number",
    choices=("total", "frequency"),
)
_RANK = Parameter("rank", int, None, "of the output; without it the adapters' largest", low=1)
_CLAMP = Parameter(
    "svd_clamp", float, None, "quantile of the factors' entries that bounds them", low=0, high=1
)


def _row(
    name: str,
    summary: str,
    paper: str,
    over: Literal["factors", "sum", "products"],
    prune: Literal["", "magnitude", "random"] = "",
    *,
    elect: bool = False,
) -> AdapterMethod:
    sparse = (_DENSITY,) if prune else ()
    signs = (_SIGNS,) if elect else ()
    cut = () if over == "factors" or name == "cat" else (_RANK, _CLAMP)
    return AdapterMethod(
        name, summary, paper, (_WEIGHT, _NORMALIZE, _TARGETS, *sparse, *signs, *cut),
        base="none", min_operands=1, max_operands=None, random=prune == "random",
        over=over, prune=prune, elect=elect,
    )  # fmt: skip


_ROWS = (
    _row("linear", "factors weighted and added: cheap, and not the sum of the deltas", "-",
         "factors"),
    _row("cat", "factors side by side: the sum of the deltas, of as many ranks as all have", "-",
         "sum"),
    _row("svd", "the sum of the deltas, cut to a rank", "-", "sum"),
    _row("task_arithmetic", "the sum of the deltas, as cat, or cut to a rank, as svd",
         TASK_ARITHMETIC, "sum"),
    _row("magnitude_prune", "factors trimmed by magnitude, added", "-", "factors", "magnitude"),
    _row("ties", "factors trimmed by magnitude, merged where signs agree", TIES, "factors",
         "magnitude", elect=True),
    _row("dare_linear", "factors' entries dropped at random, added", DARE, "factors", "random"),
    _row("dare_ties", "factors' entries dropped at random, merged where signs agree", DARE,
         "factors", "random", elect=True),
    _row("magnitude_prune_svd", "deltas trimmed by magnitude, added, cut to a rank", "-",
         "products", "magnitude"),
    _row("ties_svd", "deltas trimmed by magnitude, merged where signs agree, cut to a rank", TIES,
         "products", "magnitude", elect=True),
    _row("dare_linear_svd", "deltas' entries dropped at random, added, cut to a rank", DARE,
         "products", "random"),
    _row("dare_ties_svd", "deltas' entries dropped at random, merged where signs agree, cut to a "
         "rank", DARE, "products", "random", elect=True),
)  # fmt: skip

ADAPTER_METHODS: dict[str, AdapterMethod] = {row.name: row for row in _ROWS}
