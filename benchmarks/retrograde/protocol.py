"""The comparison: every family of merges gets the same budget, the same items and one test score.

A family is a way to draw K candidates. All K are scored on the *search* items, the best three of
them on the *val* items, the best of those once on the *test* items. See README.md for the families.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from merging import Candidate, OneShot, State, Step, Walk, merge
from scoring import Items, Score, score

if TYPE_CHECKING:
    from train import Regime
    from transformers import LlamaForCausalLM

CANDIDATES = 12
FINALISTS = 3
MASK_SEEDS = 8
ITEMS_PER_SKILL = {"search": 100, "val": 300, "test": 500}
WALK_METHODS = ("linear", "slerp", "ties", "dare_ties")


@dataclass(frozen=True)
class Family:
    """Candidates to choose from; ``fixed`` is the choice where there is nothing to choose."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Result:
    """One family's chosen candidate, and everything that was seen on the way."""

    family: str
    record: dict[str, Any]
    right: np.ndarray  # on test, (skills, items): hits, bool; or hits over MASK_SEEDS masks, uint8


class Bench:
    """One regime of one training seed: models, items, and one resident model to score with."""

    def __init__(
        self, regime: Regime, states: Mapping[str, State], model: LlamaForCausalLM, seed: int
    ) -> None:
        self.regime = regime
        self.states = states
        self.seed = seed
        self.items = {
            split: Items.draw(regime.skills, split, count, seed)
            for split, count in ITEMS_PER_SKILL.items()
        }
        self._model = model
        self._parameters = dict(model.named_parameters())
        self.evaluations = 0

    @torch.no_grad()
    def score(self, state: State, split: str) -> Score:
        for name, parameter in self._parameters.items():
            parameter.copy_(state[name])
        self.evaluations += 1
        return score(self._model, self.items[split])

    def merge(self, candidate: Candidate) -> State:
        return merge(candidate, self.states, self.regime.base)

    def rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(purpose.encode())])


def best_single(bench: Bench) -> str:
    """The model with the best score on val."""
    return max(bench.regime.models, key=lambda name: bench.score(bench.states[name], "val").key)


def draw_walks(bench: Bench, start: str, purpose: str) -> tuple[Walk, ...]:
    """K random schedules of one to three cycles from the best single model, with linear steps."""
    rng = bench.rng(purpose)
    partners = [name for name in bench.regime.models if name != start]
    walks = []
    for _ in range(CANDIDATES):
        steps = tuple(
            Step(str(rng.choice(partners)), rng.uniform(0.1, 0.8), rng.uniform(0.1, 0.8))
            for _ in range(rng.integers(1, 4))
        )
        walks.append(Walk("linear", start, steps, seed=int(rng.integers(2**31))))
    return tuple(walks)


def families(bench: Bench, start: str) -> list[Family]:
    """Every family but best_single and greedy_soup, which look at scores as they go."""
    models, base = bench.regime.models, bench.regime.base
    tuned = [name for name in models if name != base]  # the base's own delta is zero

    def draw(name: str, make: Callable[[np.random.Generator], OneShot]) -> Family:
        rng = bench.rng(name)
        return Family(name, tuple(make(rng) for _ in range(CANDIDATES)))

    def simplex(rng: np.random.Generator, names: Sequence[str]) -> dict[str, float]:
        return dict(zip(names, rng.dirichlet(np.ones(len(names))).tolist(), strict=True))

    def one_slerp(rng: np.random.Generator) -> OneShot:
        first, second = rng.permutation(models)[:2].tolist()
        t = rng.uniform()
        return OneShot("slerp", {first: 1 - t, second: t})

    def task_arithmetic(rng: np.random.Generator) -> OneShot:
        return OneShot("task_arithmetic", {name: rng.uniform(0, 1.2) for name in tuned})

    def ties(rng: np.random.Generator) -> OneShot:
        return OneShot(
            "ties",
            simplex(rng, tuned),
            density=rng.uniform(0.1, 1),
            scale=rng.uniform(0.4, 1.4),
            normalize=True,
        )

    def dare_ties(rng: np.random.Generator) -> OneShot:
        return OneShot(
            "dare_ties",
            simplex(rng, tuned),
            density=rng.uniform(0.4, 1),
            scale=rng.uniform(0.4, 1.2),
            normalize=True,
            seed=int(rng.integers(2**31)),
        )

    subsets = [s for size in range(2, len(tuned) + 1) for s in combinations(tuned, size)]
    walks = draw_walks(bench, start, "walks")
    density = {
        "linear": np.ones(CANDIDATES),
        "slerp": np.ones(CANDIDATES),
        "ties": bench.rng("walk density ties").uniform(0.3, 0.9, CANDIDATES),
        "dare_ties": bench.rng("walk density dare_ties").uniform(0.6, 0.95, CANDIDATES),
    }
    # The four kinds of walk share their partners and fractions, so candidate i of one kind differs
    # from candidate i of another, and from its own collapsed one-shot, by the method's path alone.
    walked = {
        method: tuple(
            replace(walk, method=method, density=float(d))
            for walk, d in zip(walks, density[method], strict=True)
        )
        for method in WALK_METHODS
    }

    def collapsed(method: str) -> tuple[OneShot, ...]:
        return tuple(
            OneShot(method, walk.weights, density=walk.density, seed=walk.seed)
            for walk in walked[method]
        )

    return [
        draw("linear", lambda rng: OneShot("linear", simplex(rng, models))),
        draw("slerp", one_slerp),
        draw("task_arithmetic", task_arithmetic),
        draw("ties", ties),
        draw("dare_ties", dare_ties),
        Family(
            "model_stock",
            tuple(OneShot("model_stock", dict.fromkeys(s, 1.0)) for s in subsets[:CANDIDATES]),
        ),
        Family("line_search", line_search(models, start)),
        *(Family(f"walk_{method}", walked[method]) for method in WALK_METHODS),
        Family("walk_ties_moving", tuple(replace(w, moving_base=True) for w in walked["ties"])),
        Family("collapsed_linear", collapsed("linear")),
        Family("collapsed_ties", collapsed("ties")),
        Family("collapsed_dare_ties", collapsed("dare_ties")),
        Family(
            "anchored",
            tuple(OneShot("linear", w.weights) for w in draw_walks(bench, start, "anchored")),
        ),
        Family("random_step", tuple(replace(walk, decoy=True) for walk in walks)),
    ]


def line_search(models: Sequence[str], start: str) -> tuple[OneShot, ...]:
    """An even grid of t on the line from the start to each other model, K points in all."""
    others = [name for name in models if name != start]
    points = CANDIDATES // len(others)
    return tuple(
        OneShot("linear", {start: 1 - t, other: t})
        for other in others
        for t in (np.arange(1, points + 1) / (points + 1)).tolist()
    )


def greedy_soup(bench: Bench) -> tuple[OneShot, list[float]]:
    """Models from best to worst, each kept if the average improves (arXiv:2203.05482, alg. 1)."""
    seen = {name: bench.score(bench.states[name], "search").key for name in bench.regime.models}
    ranked = sorted(seen, key=lambda name: seen[name], reverse=True)
    chosen, best = [ranked[0]], seen[ranked[0]]
    scores = [best[0]]
    for name in ranked[1:]:
        trial = bench.score(bench.merge(_uniform([*chosen, name])), "search").key
        scores.append(trial[0])
        if trial >= best:
            chosen, best = [*chosen, name], trial
    return _uniform(chosen), scores


def _uniform(names: Sequence[str]) -> OneShot:
    return OneShot("linear", dict.fromkeys(names, 1 / len(names)))


def run_family(bench: Bench, family: Family) -> Result:
    """Search, choose on val, report once on test."""
    search = [bench.score(bench.merge(c), "search") for c in family.candidates]
    ranked = sorted(range(len(search)), key=lambda i: search[i].key, reverse=True)
    val = {i: bench.score(bench.merge(family.candidates[i]), "val") for i in ranked[:FINALISTS]}
    choice = max(val, key=lambda i: val[i].key)
    return report(
        bench,
        family.name,
        family.candidates[choice],
        {
            "search": [round(s.accuracy, 4) for s in search],
            "val": {str(i): round(s.accuracy, 4) for i, s in val.items()},
            "choice": choice,
        },
    )


def report(bench: Bench, family: str, candidate: Candidate | str, record: dict[str, Any]) -> Result:
    """Score the choice on test; a method that draws masks with fresh ones, all counted."""
    if isinstance(candidate, str):
        right = bench.score(bench.states[candidate], "test").right
        record = record | {"chosen": candidate}
    elif candidate.method == "dare_ties":
        seeds = bench.rng(f"masks {family}").integers(2**31, size=MASK_SEEDS).tolist()
        hits = [
            bench.score(bench.merge(replace(candidate, seed=seed)), "test").right for seed in seeds
        ]
        right = np.sum(hits, axis=0, dtype=np.uint8)
        record = record | {"mask_accuracy": [round(100 * float(h.mean()), 4) for h in hits]}
    else:
        right = bench.score(bench.merge(candidate), "test").right
    if not isinstance(candidate, str):
        record = record | {"chosen": candidate.record()}
    per_skill = 100 * rate(right).mean(1)
    record = record | {
        "test": round(float(per_skill.mean()), 4),
        "skills": dict(zip(bench.regime.skills, per_skill.round(2).tolist(), strict=True)),
    }
    return Result(family, record, right)


def rate(right: np.ndarray) -> np.ndarray:
    """Per item, the fraction of hits: 0 or 1, or over the mask seeds."""
    return right.astype(np.float64) / (1 if right.dtype == bool else MASK_SEEDS)


def identities(bench: Bench, walks: Sequence[Walk]) -> list[dict[str, float]]:
    """For every walk and its collapsed linear one-shot: agreement on search items, in percent."""
    rows = []
    for walk in walks:
        one = bench.merge(OneShot("linear", walk.weights))
        step_by_step = bench.merge(walk)
        agree = (
            bench.score(one, "search").right == bench.score(step_by_step, "search").right
        ).mean()
        distance = _norm([step_by_step[n] - one[n] for n in one]) / _norm(list(one.values()))
        rows.append({"agree": 100 * float(agree), "distance": distance})
    return rows


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(
        torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))
    )


def run_regime(
    bench: Bench, progress: Callable[[str], None] = lambda family: None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run every family; return the record and, per family, the test items' hits."""
    start = best_single(bench)
    results = [report(bench, "best_single", start, {})]
    soup, scores = greedy_soup(bench)
    results.append(report(bench, "greedy_soup", soup, {"search": scores}))
    identity = {}
    for family in families(bench, start):
        results.append(run_family(bench, family))
        if family.name in ("walk_linear", "walk_slerp"):
            walks = [c for c in family.candidates if isinstance(c, Walk)]
            identity[family.name] = identities(bench, walks)
        chosen = family.candidates[results[-1].record["choice"]]
        if family.name.startswith("walk_") and isinstance(chosen, Walk):
            results += paired_collapse(bench, family.name, chosen)
        progress(family.name)
    record = {
        "start": start,
        "base": bench.regime.base,
        "singles": {
            name: round(bench.score(bench.states[name], "test").accuracy, 4)
            for name in bench.regime.models
        },
        "evaluations": bench.evaluations,
        "identity": identity,
        "families": {result.family: result.record for result in results},
    }
    return record, {result.family: result.right for result in results}


def paired_collapse(bench: Bench, family: str, walk: Walk) -> list[Result]:
    """The chosen schedule's own one-shots: linear at its effective weights, and its own method."""
    linear = OneShot("linear", walk.weights)
    rows = [report(bench, f"{family}>linear", linear, {})]
    if walk.method in ("ties", "dare_ties") and not walk.moving_base:
        own = OneShot(walk.method, walk.weights, density=walk.density, seed=walk.seed)
        rows.append(report(bench, f"{family}>own", own, {}))
    return rows
