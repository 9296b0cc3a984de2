"""Runs an extraction: the factors of each difference, by a randomised range finder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmerge import _C
from fastmerge.compute.cpu import cpu, thread_count
from fastmerge.compute.factors import (
    OVERSAMPLING,
    Difference,
    Spectrum,
    nearest_of_rank,
)
from fastmerge.compute.reference import round_to, widen
from fastmerge.engine.adapters import Made, Piece, write_adapter
from fastmerge.engine.report import MergeReport
from fastmerge.engine.window import in_order
from fastmerge.errors import ModelError, argument, in_a_line
from fastmerge.methods.types import Float32
from fastmerge.models.adapter import PREFIX
from fastmerge.models.header import show
from fastmerge.output.provenance import names as names_of
from fastmerge.planning.adapter_plan import peft_config
from fastmerge.planning.extraction import Extraction, Saved, Target
from fastmerge.planning.peft_names import is_expert
from fastmerge.progress import Progress
from fastmerge.selection import random_key

_MOST_NORM = 1e30  # of a difference; its products are in float32, which ends at 3.4e38


class Found(NamedTuple):
    """What an extraction came to. ``modules``: by name, ``rank``, ``norm`` (Frobenius, of the
    difference), ``error`` (of what is written, relative to it) and ``singular_values`` (the largest
    and the smallest that is kept).
    """

    report: MergeReport
    modules: Mapping[str, Mapping[str, Any]]

    def __repr__(self) -> str:
        return in_a_line(self, "report", "modules")

    @property
    def error(self) -> float:
        """Of all matrices as one: relative, Frobenius."""
        norms = np.array([own["norm"] for own in self.modules.values() if "norm" in own])
        errors = np.array([own["error"] for own in self.modules.values() if "norm" in own])
        return float(np.linalg.norm(norms * errors) / max(float(np.linalg.norm(norms)), 1e-300))


def extract(
    plan: Extraction,
    out: Path,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Found:
    """Writes the adapter that ``plan`` decides on to the folder ``out``; as `merge_plan` does, it
    is absent or whole, and an interrupted one is continued.

    Several matrices are decomposed at a time, as many as ``threads``, each with a block of 8 MiB
    and what its factors take.
    """
    run = _Run(plan, thread_count(threads))
    ranks = run.ranks()
    targets = [target for target in plan.targets if ranks[target.module]]
    pieces = [run.factors(target, ranks[target.module]) for target in targets]
    pieces += [run.copy(saved) for saved in plan.saved]
    reduced = replace(plan, targets=tuple(targets))
    kept = {name: rank for name, rank in ranks.items() if rank}
    base = {"base_model_name_or_path": names_of(plan)[1]}
    found = reduced.named
    keyed = {key: rank for n, rank in kept.items() for key in found.rank_keys.get(n, (n,))}
    r = None if found.rank_of is None else kept[found.rank_of]
    config = peft_config({**plan.config, **base}, keyed, found.modules, r)
    if found.parameters:
        config["target_parameters"] = found.parameters
    report, modules = write_adapter(
        plan, pieces, config, _method(plan), out,
        threads=run.threads, overwrite=overwrite, fresh=fresh, progress=progress,
    )  # fmt: skip
    return Found(report, modules)


def _method(plan: Extraction) -> list[str]:
    how = (
        "each matrix of tuned - base to its rank by a randomised range finder (Halko, Martinsson "
        "and Tropp 2011, [doi:10.1137/090771806](https://doi.org/10.1137/090771806)), "
        f"{OVERSAMPLING} directions of oversampling, {plan.choice.power_iterations} power "
        "iterations"
    )
    return [
        how,
        f"random seed: {plan.seed}",
        "products in float32, factorisations in float64",
    ]


class _Run:
    def __init__(self, plan: Extraction, threads: int) -> None:
        self.plan, self.threads = plan, threads
        self._pool: _C.Pool = cpu(threads).pool

    def ranks(self) -> dict[str, int]:
        """Of each target, by module. With an epsilon every matrix is decomposed for it first, and
        again for its factors: a file's header comes before what would tell.
        """
        choice = self.plan.choice
        most = {t.module: min(choice.rank, *t.shape) for t in self.plan.targets}
        if not choice.sv_epsilon:
            return most

        def above(target: Target) -> int:
            found = self._spectrum(self._difference(target), target)
            return int((found.s > choice.sv_epsilon).sum())

        with closing(in_order(above, self.plan.targets, self.threads)) as finished:
            ranks = {target.module: rank for target, rank in finished}
        experts = [name for name in ranks if is_expert(f"{name}.weight")]
        ranks |= dict.fromkeys(experts, max((ranks[name] for name in experts), default=0))
        if not any(ranks.values()):
            raise ModelError(
                f"no singular value is above {choice.sv_epsilon:g} ({argument('sv_epsilon')}); "
                "give a smaller one"
            )
        return ranks

    def factors(self, target: Target, rank: int) -> Piece:
        nbytes = target.tuned.nbytes + target.base.nbytes
        make = partial(self._factors, target, rank)
        return Piece(target.module, target.named(rank), nbytes, make)

    def copy(self, saved: Saved) -> Piece:
        tuned, info = self.plan.models[0], saved.tuned
        module = saved.name.removeprefix(PREFIX).rpartition(".")[0]
        return Piece(
            module,
            ((saved.name, info.dtype, info.shape),),
            info.nbytes,
            lambda: Made([tuned.view(info.name)], {}),
        )

    def _factors(self, target: Target, rank: int) -> Made:
        difference = self._difference(target)
        found = self._spectrum(difference, target).cut(rank)
        b, a = _distributed(found, rank, evenly=self.plan.choice.distribute_scale)
        if target.transposed and not self.plan.choice.distribute_scale:
            # The singular values belong into PEFT's A, which is the transpose's other factor.
            b, a = _distributed(Spectrum(found.vt.T, found.s, found.u.T), rank, evenly=False)
            b, a = a.T, b.T
        b, a = self._rounded(b, target), self._rounded(a, target)
        norm = difference.norm()
        told = {
            "rank": rank,
            "norm": norm,
            "error": difference.norm_without(b, a) / norm if norm else 0.0,
            "singular_values": [float(found.s[0]), float(found.s[-1])] if len(found.s) else [],
        }
        for model, info in zip(self.plan.models, (target.tuned, target.base), strict=True):
            model.drop(info.name)
        return Made([b.T, a.T] if target.transposed else [a, b], told)

    def _difference(self, target: Target) -> Difference:
        tuned, base = self.plan.models
        for model, info in ((tuned, target.tuned), (base, target.base)):
            model.prefetch(info.name)
        return Difference(
            self._pool,
            tuned.view(target.tuned.name),
            base.view(target.base.name),
            target.shape,
        )

    def _spectrum(self, difference: Difference, target: Target) -> Spectrum:
        """Checked first: LAPACK's answer to a NaN is an error without the tensor's name."""
        norm = difference.norm()
        if not norm:  # an expert that was not tuned, or a layer of whose biases some were
            rows, cols = target.shape
            return Spectrum(np.zeros((rows, 0)), np.zeros(0), np.zeros((0, cols)))
        if not norm < _MOST_NORM:
            raise ModelError(
                f"'{self.plan.references[0]}': {show(target.tuned.name)} has NaN or infinite "
                f"values, or some near {_MOST_NORM:g}, or its base has; nothing near it is of low "
                "rank"
            )
        return nearest_of_rank(
            difference,
            min(self.plan.choice.rank, *target.shape),
            random_key(self.plan.seed or 0, target.tuned.name, 0),
            power_iterations=self.plan.choice.power_iterations,
        )

    @staticmethod
    def _rounded(factor: Float32, target: Target) -> Float32:
        """As it will be read again, so that the error is of what is written."""
        return widen(round_to(factor, target.dtype.code))


def _distributed(found: Spectrum, rank: int, *, evenly: bool) -> tuple[Float32, Float32]:
    """The factors b and a in float32: the roots of the singular values go into either, or all of
    them into a. What a matrix of less than ``rank`` lacks is zero.
    """
    left = np.sqrt(found.s) if evenly else np.ones_like(found.s)
    b = np.zeros((found.u.shape[0], rank), np.float32)
    a = np.zeros((rank, found.vt.shape[1]), np.float32)
    b[:, : len(left)] = found.u * left
    a[: len(left)] = (found.s / np.where(left > 0, left, 1))[:, None] * found.vt
    return b, a
