"""From a plan of all models to their space: the Gram matrices of one pass over the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastmerge.engine import products
from fastmerge.methods.types import Float64
from fastmerge.planning.build import position
from fastmerge.planning.inputs import View
from fastmerge.planning.plan import Plan
from fastmerge.progress import Progress
from fastmerge.search.grams import keep_grams
from fastmerge.search.space import Space, merged
from fastmerge.tree.nodes import Leaf, Merge


def space_of(
    template: Plan,
    known: Mapping[str, Float64],
    *,
    origin: int = 0,
    cache: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Space:
    """The space with Gram matrices: those ``known`` by tensor, the others from the weights. Angles
    are taken from the model ``origin``; ``cache``: where the matrices are kept.
    """
    items = merged(template)
    missing = {
        item.name: [part for part in item.root.operands if isinstance(part, Leaf)]
        for item in items
        if isinstance(item.root, Merge) and item.name not in known
    }
    found = dict(known)
    if missing:
        found |= products.grams(template.models, missing, threads=threads, progress=progress)
        if cache is not None:
            keep_grams(cache, template, found)
    grams = np.stack([found[item.name] for item in items])
    return Space(template, grams, positions(template), origin)


def positions(template: Plan) -> list[float]:
    """Where each merged tensor's layer lies in its stack, for gradients."""
    whole = View("", template.config, {t.name: t for t in template.tensors}, template.donor_model)
    return [position(whole, item.name) for item in merged(template)]
