"""The merges that are measured, as recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SPARSE = {"weight": 0.5, "density": 0.5}
_OF_EQUALS = ("linear", "slerp", "multislerp")  # list every model, the base among them


@dataclass(frozen=True)
class Job:
    """One merge; ``models`` counts the base."""

    method: str
    models: int
    parameters: dict[str, Any] = field(default_factory=dict)
    per_model: dict[str, Any] = field(default_factory=dict)
    most: int | None = None  # models that it takes

    @property
    def title(self) -> str:
        density = f", density {self.per_model['density']}" if "density" in self.per_model else ""
        return f"{self.method}, {self.models} models{density}"

    def of(self, models: int) -> Job:
        """The same of so many models."""
        return replace(self, models=models)

    def recipe(self, models: Sequence[Path], dtype: str | None) -> dict[str, Any]:
        """Of the first ``models``, whose first is the base; ``dtype`` None: the base's own."""
        base, *tunes = (str(path) for path in models[: self.models])
        listed = [base, *tunes] if self.method in _OF_EQUALS else tunes
        own = {"parameters": dict(self.per_model)} if self.per_model else {}
        recipe: dict[str, Any] = {
            "merge_method": self.method,
            "models": [{"model": path, **own} for path in listed],
        }
        if dtype is not None:
            recipe["dtype"] = dtype
        if self.method not in ("linear", "multislerp"):
            recipe["base_model"] = base
        if self.parameters:
            recipe["parameters"] = self.parameters
        return recipe


JOBS = {
    job.method: job
    for job in (
        Job("linear", 2, {}, {"weight": 0.5}),
        Job("slerp", 2, {"t": 0.4}, {}, 2),
        Job("ties", 3, {}, SPARSE),
        Job("dare_ties", 3, {}, SPARSE),
        Job("dare_linear", 3, {}, SPARSE),
        Job("multislerp", 3, {}, {"weight": 0.33}),
        Job("breadcrumbs", 3, {}, {**SPARSE, "gamma": 0.01}),
        Job("breadcrumbs_ties", 3, {}, {**SPARSE, "gamma": 0.01}),
        Job("della", 3, {}, {**SPARSE, "epsilon": 0.1}),
        Job("della_linear", 3, {}, {**SPARSE, "epsilon": 0.1}),
        Job("sce", 3, {"select_topk": 0.3}),
        Job("ram", 3),
        Job("ramplus_tl", 3),
        Job("nearswap", 2, {"t": 0.001}, {}, 2),
        Job("arcee_fusion", 2, {}, {}, 2),
    )
}
DEGRADE, RETRACE = 0.35, 0.6  # t of a walk's steps


def walk(models: Sequence[Path], steps: int) -> dict[str, Any]:
    """A schedule: toward each of the others in turn, and back."""
    away = {"degrade": {"partner": "next", "method": "slerp", "t": DEGRADE}}
    back = {"retrace": {"toward": "baseline", "method": "slerp", "t": RETRACE}}
    return {
        "baseline": str(models[0]),
        "pool": [str(path) for path in models[1:]],
        "schedule": {"steps": [back if number % 2 else away for number in range(steps)]},
        "seed": 0,
    }


def one_shot(models: Sequence[Path], dtype: str | None) -> dict[str, Any]:
    """What a walk over the models is compared with: one merge of all of them."""
    return JOBS["multislerp"].of(len(models)).recipe(models, dtype)


def step(state: Path, other: Path, number: int, dtype: str | None) -> dict[str, Any]:
    """Step ``number`` of a walk, from 0, as a recipe of its own."""
    recipe: dict[str, Any] = {
        "merge_method": "slerp",
        "base_model": str(state),
        "models": [{"model": str(state)}, {"model": str(other)}],
        "parameters": {"t": t_of(number)},
    }
    return recipe | ({} if dtype is None else {"dtype": dtype})


def t_of(number: int) -> float:
    """Of step ``number``: away in even ones, back in odd ones."""
    return RETRACE if number % 2 else DEGRADE


def partner_of(number: int, models: int) -> int:
    """Which model step ``number`` goes toward: the baseline (0) in odd ones."""
    return 0 if number % 2 else 1 + number // 2 % (models - 1)
