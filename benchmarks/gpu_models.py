"""Whole models that lie in device memory: the part of gpu.py that times compute.batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.bench.checkpoints import SHAPES
from fastmerge.compute.batch import Batch, Job
from fastmerge.methods import find
from fastmerge.tree.collapse import weighted_sum
from fastmerge.tree.nodes import Merge, Stored

if TYPE_CHECKING:
    from gpu import Bench


def models(bench: Bench) -> None:
    """SLERP and TIES of whole models that lie in device memory, 7 B where that fits."""
    torch = bench.torch
    size = "tiny"
    if not bench.rehearse:  # base, two tunes, output, and room to work
        size = "7b" if torch.cuda.mem_get_info()[0] > 5 * 13.5e9 else "1.1b"
    shape = SHAPES[size]
    tensors, parameters = shape.tensors(), shape.parameters
    bench.put("model", {"size": size, "parameters": parameters, "tensors": len(tensors)})
    base = {n: bench.normal(size, 0.02, i) for i, (n, size) in enumerate(tensors.items())}
    tunes = [
        {n: bench.tune(x, 1000 * m + i) for i, (n, x) in enumerate(base.items())} for m in (1, 2)
    ]
    held = [base, *tunes]
    outs = {n: torch.empty_like(x) for n, x in base.items()}

    def fetch(source: Stored) -> Any:
        return held[source.model][source.name]

    def timed(
        method: str, passes: int, models: Sequence[int], own: dict[str, float], **values: Any
    ) -> None:
        """A row: our kernels on the whole model, mergekit's (if there) one tensor after another."""

        def mergekit() -> None:
            from mergekit.merge_methods import merge_tensors

            for n in tensors:
                given = [held[m][n] for m in models]
                merge_tensors(given, method, parameters={**own, **values}, base_index=0)

        def root(n: str) -> Merge:
            sources = Stored(1, n), Stored(2, n)
            based = Stored(0, n) if 0 in models else None
            return Merge(find(method), sources, based, values, (own, own))

        jobs = [Job(n, root(n), outs[n]) for n in tensors]
        batch = Batch(jobs, fetch)
        moved = 2 * parameters * passes
        bench.record(f"{method} model", moved, batch.run, mergekit=mergekit)

    timed("slerp", 5, (1, 2), {}, t=0.4)
    half = {"weight": 0.5, "density": 0.5}
    timed("ties", 4, (0, 1, 2), half, normalize=True, rescale=False, **{"lambda": 1.0})

    # As `live.merge_into` takes a walk's candidates: prepared once, each with coefficients of its
    # own. Every step is timed with what the host does for it.
    walk = [
        [weighted_sum([Stored(m, n) for m in range(3)], (0.9 - t, t, 0.1)) for n in tensors]
        for t in (step / 10 for step in range(10))
    ]
    batch = Batch([Job(n, root, outs[n]) for n, root in zip(tensors, walk[1], strict=True)], fetch)
    candidates = itertools.cycle(walk)

    def step() -> None:
        if not batch.adopt(next(candidates)):
            raise RuntimeError("a candidate of the walk is of another form than the first")
        batch.run()

    bench.record("walk step model", 2 * parameters * 4, step)
