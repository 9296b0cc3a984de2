"""Whether what is measured is right: before a figure is shown, its result is compared with NumPy's.

Every check says in words what it compared, and raises `WrongResultError` otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.bench import recipes
from fastmerge.bench.numpy_backend import NumpyBackend, array_of
from fastmerge.bench.rows import WrongResultError
from fastmerge.compute.reference import round_to, widen
from fastmerge.compute.tensor import Computation
from fastmerge.engine.inputs import Inputs
from fastmerge.methods import Elementwise, find
from fastmerge.methods.types import Float64
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.header import show
from fastmerge.models.side_files import LINEAGE_FILE
from fastmerge.planning.inputs import TensorPlan
from fastmerge.tree.nodes import Leaf, LowRank, Merge, Stored, leaves, walk

_OF_NUMPY = 3  # tensors of a model
_MOST_ENTRIES = 1 << 22  # of a tensor that NumPy makes again: a second, 200 MB
_STEP = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-21}  # one in the last place, or four
_LEAST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}  # between subnormal numbers
_NEAR_ZERO = 1e-6  # of the root mean square: what cancels keeps the rounding of its terms


def near(made: NDArray[Any], right: Float64, dtype: str, what: str) -> None:
    """Raises WrongResultError where an entry is further from ``right`` than one rounding to
    ``dtype`` and one of a coefficient to fp32 can bring it.
    """
    found, wanted = widen(made).astype(np.float64).ravel(), right.ravel()
    with np.errstate(invalid="ignore"):
        size = np.sqrt(np.mean(np.square(wanted[np.isfinite(wanted)]))) if wanted.size else 0.0
        allowed = _STEP[dtype] * np.abs(wanted) + _NEAR_ZERO * size + _LEAST[dtype]
        off = np.abs(found - wanted) > allowed
    bad = np.flatnonzero(np.where(np.isfinite(wanted), ~np.isfinite(found) | off, False))
    if bad.size:
        first = int(bad[0])
        raise WrongResultError(
            f"{what}: wrong: {bad.size} of {wanted.size} entries differ from NumPy's, entry "
            f"{first} is {found[first]:.9g}, not {wanted[first]:.9g}; no figure is given. This "
            "is a defect of fastmerge, or of this machine's memory: please report it"
        )


def written(folder: Path, recipe: Any = None) -> str:
    """A merged model: every byte against the checksums taken while it was merged, some tensors
    against NumPy's merge by the same recipe (without one: none). Nothing stays mapped: what is in
    use by a process cannot be made cold.
    """
    from fastmerge import api

    found = api.verify(folder)
    if not found.whole:
        raise WrongResultError(f"{found.differences[0]}: what was written is not what was merged")
    said = f"{found.checked} tensors by checksum"
    if recipe is None:
        return said
    plan = api.plan(recipe)
    out, inputs = Checkpoint.open(folder), Inputs(plan.models)
    names = {item.name for item in plan.tensors}
    missing = names - set(out.tensors)
    if missing:
        raise WrongResultError(f"{folder}: has no tensor {show(min(missing))}")
    chosen = sample([item for item in plan.tensors if _in_numpy(item)], _OF_NUMPY)
    for item in chosen:
        to = np.empty(item.count, np.float32)
        fetch = partial(_fetched, inputs)
        Computation(NumpyBackend(), fetch, item.name, item.shape).run(item.root, to)
        right = widen(round_to(to, item.dtype.code)).astype(np.float64)
        near(array_of(out.view(item.name)), right, item.dtype.code, f"{folder.name}: {item.name}")
    return f"{said}, {len(chosen)} against NumPy" if chosen else said


def _fetched(inputs: Inputs, leaf: Leaf) -> NDArray[Any]:
    """A stored tensor, or what an adapter makes of one, in float64 and rounded once."""
    if isinstance(leaf, Stored):
        return array_of(inputs.fetch(leaf))
    assert isinstance(leaf, LowRank) and isinstance(leaf.base, Stored)
    base, b, a = (
        widen(array_of(inputs.fetch(stored))).astype(np.float64)
        for stored in (leaf.base, leaf.b, leaf.a)
    )
    product = b.reshape(-1, leaf.rank) @ a.reshape(leaf.rank, -1)
    added = product.T if leaf.transposed else product
    return (base + leaf.scale * added.ravel()).astype(np.float32)


def _in_numpy(item: TensorPlan) -> bool:
    """Whether something is computed for the tensor, which `NumpyBackend` knows how to."""
    parts = [node for node in walk(item.root) if isinstance(node, Leaf)]
    return (
        not isinstance(item.root, Stored)
        and item.encoding is None
        and item.dtype.kernels
        and not any(isinstance(merge.method, Elementwise) for merge in item.merges)
        and all(source.dtype.kernels for source in leaves([item.root]))
        and all(isinstance(part, Stored) or _is_plain(part) for part in parts)
    )


def _is_plain(leaf: Leaf) -> bool:
    """Whether it is a LoRA's on a stored tensor, without DoRA's lengths."""
    return isinstance(leaf, LowRank) and leaf.magnitude is None and isinstance(leaf.base, Stored)


def sample(items: Sequence[TensorPlan], count: int) -> list[TensorPlan]:
    """From the smallest to the largest that NumPy makes in a second; one at least."""
    by_size = sorted(items, key=lambda item: item.count)
    fit = [item for item in by_size if item.count <= _MOST_ENTRIES] or by_size[:1]
    places = np.linspace(0, len(fit) - 1, num=min(count, len(fit))).round().astype(int)
    return [fit[place] for place in dict.fromkeys(places.tolist())]


def walked(folder: Path, models: Sequence[Path], steps: int) -> str:
    """A walk's last state: every byte by checksum, some tensors against NumPy's merges, one step
    after another.
    """
    from fastmerge import api

    plan = api.plan(recipes.one_shot(models, None))
    said = written(folder, None)
    out, opened = Checkpoint.open(folder), [Checkpoint.open(model) for model in models]
    chosen = sample([item for item in plan.tensors if _in_numpy(item)], _OF_NUMPY)
    for item in chosen:
        stored = [array_of(model.view(item.name)) for model in opened]
        state: NDArray[Any] = stored[0]
        for number in range(steps):
            values = {"t": recipes.t_of(number)}
            root = Merge(find("slerp"), (Stored(0, ""), Stored(1, "")), None, values, ({}, {}))
            parts = state, stored[recipes.partner_of(number, len(models))]
            to = np.empty(item.count, np.float32)
            fetch = partial(_of_pair, parts)
            Computation(NumpyBackend(), fetch, item.name, item.shape).run(root, to)
            state = to
        dtype = out.info(item.name).dtype.code
        right = widen(round_to(state, dtype)).astype(np.float64)
        near(array_of(out.view(item.name)), right, dtype, f"{folder.name}: {item.name}")
    return f"{said}, {len(chosen)} against NumPy, step by step"


def _of_pair(pair: tuple[NDArray[Any], NDArray[Any]], leaf: Leaf) -> NDArray[Any]:
    assert isinstance(leaf, Stored)
    return pair[leaf.model]


def checksums(folder: Path) -> Any:
    """Of every tensor, as the merge took them: equal for every repetition."""
    return json.loads((folder / LINEAGE_FILE).read_text())["tensors"]
