"""breadcrumbs and della against mergekit 0.1.5, by the rules of test_mergekit_parity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests import test_mergekit_parity as parity
from tests.test_mergekit_parity import Merged, deltas, listed, steps

models, both = parity.models, parity.both  # fixtures


BANDS = {
    "defaults": ({"a": 0.5, "b": 0.3}, 0.01, {}),
    "three, rescaled": ({"a": 0.5, "b": 0.3, "c": 0.53}, 0.1, {"lambda": 0.9, "rescale": True}),
    "normalized": ({"a": 0.2, "b": 0.05}, 0.5, {"normalize": True}),
    "none too small": ({"a": 0.97, "b": 0.9}, 0.3, {}),
}


def band(density: float, gamma: float, size: int) -> tuple[int, int]:
    """How many entries survive, and how many larger ones do not."""
    keep = int(density * size)
    return keep, min(int(gamma * size), size - keep)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("density, gamma, parameters", BANDS.values(), ids=BANDS)
def test_breadcrumbs(
    both: Callable[..., Merged], models, shared_zoo, method, density, gamma, parameters
) -> None:
    """Bit-equal except where some delta lies exactly at one of its two edges; with ``rescale`` to
    one step, as mergekit's factor is a quotient of fp32 sums."""
    ours, theirs = both(
        {
            "merge_method": method,
            "base_model": "base",
            "models": listed(
                **{m: {"density": d, "gamma": gamma, "weight": 0.7} for m, d in density.items()}
            ),
            "parameters": parameters,
        }
    )
    free = {m: deltas(models, shared_zoo, m) for m in density}
    compared = 0
    for name in ours:
        tied = np.zeros(ours[name].shape, np.bool_)
        for m, d in density.items():
            size = np.abs(free[m][name])
            keep, skip = band(d, gamma, size.size)
            falling = np.sort(size.ravel())[::-1]
            for rank in (skip, skip + keep):
                if 0 < rank < size.size:
                    tied |= size == falling[rank - 1]
        if parameters.get("rescale") and not tied.all():
            assert steps(ours[name][~tied], theirs[name][~tied])[0] <= 1
        else:
            assert np.array_equal(
                ours[name][~tied].view(np.uint32), theirs[name][~tied].view(np.uint32)
            )
        compared += int((~tied).sum())
    assert compared > 0.8 * sum(x.size for x in ours.values())


@pytest.mark.parametrize("density, gamma", [(0.5, 0.01), (0.1, 0.2), (0.003, 0.01), (0.9, 0.4)])
def test_breadcrumbs_keeps_as_many(
    both: Callable[..., Merged], models, shared_zoo, density: float, gamma: float
) -> None:
    """Of one model with weight 1: the entries that left the base, none where int(density * size)
    is 0."""
    merged = both(
        {
            "merge_method": "breadcrumbs",
            "base_model": "base",
            "models": listed(a={"density": density, "gamma": gamma, "weight": 1.0}),
        }
    )
    base, delta = shared_zoo.read(models["base"]), deltas(models, shared_zoo, "a")
    for name, start in base.items():
        keep, skip = band(density, gamma, start.size)
        falling = np.sort(np.abs(delta[name]).ravel())[::-1]
        expected = int((falling[skip : skip + keep] != 0).sum())
        assert [int((state[name] != start).sum()) for state in merged] == [expected] * 2


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("rescale", [True, False])
def test_della_keeps_by_rank_and_rescales_alike(
    both: Callable[..., Merged], models, shared_zoo, method: str, rescale: bool
) -> None:
    """Both keep an entry with a chance that rises from density - epsilon to density + epsilon with
    its rank in its row, within five standard deviations in each quarter of the ranks, and with
    ``rescale`` give each delta its L1 norm back."""
    density, epsilon = 0.4, 0.3
    merged = both(
        {
            "merge_method": method,
            "base_model": "base",
            "models": listed(a={"density": density, "epsilon": epsilon, "weight": 1.0}),
            "parameters": {"rescale": rescale},
            "out_dtype": "float32",
        }
    )
    base = shared_zoo.read(models["base"])
    delta = deltas(models, shared_zoo, "a")
    for state in merged:
        drawn, expected, counts = np.zeros(4), np.zeros(4), np.zeros(4)
        for name, start in base.items():
            size = np.abs(delta[name].reshape(1, -1) if start.ndim < 2 else delta[name])
            columns = size.shape[1]
            alive = (state[name] != start).reshape(size.shape)
            rank = np.argsort(np.argsort(size, axis=1), axis=1) / (columns - 1)
            # Where no other entry of the row ties, the rank is both programs' own.
            lone = np.zeros(size.shape, np.bool_)
            for row, values in enumerate(size):
                _, of, many = np.unique(values, return_inverse=True, return_counts=True)
                lone[row] = (many[of] == 1) & (values != 0)
            part = np.minimum((4 * rank).astype(int), 3)
            for p in range(4):
                here = lone & (part == p)
                drawn[p] += (alive & here).sum()
                expected[p] += (density - epsilon + 2 * epsilon * rank[here]).sum()
                counts[p] += here.sum()
            full, left = size.sum(), size[alive].sum()
            if rescale and left:
                assert np.abs(state[name] - start).sum() == pytest.approx(full, rel=1e-4)
            elif left:
                assert np.abs(state[name] - start).sum() == pytest.approx(left, rel=1e-4)
        assert counts.sum() > 10_000
        assert (np.abs(drawn - expected) < 5 * np.sqrt(counts / 4)).all()
