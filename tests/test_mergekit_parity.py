"""The compatibility contract with mergekit 0.1.5: the same recipe, run by both, compared bit by
bit.

Both run with ``dtype: float32, out_dtype: bfloat16`` (fp32 arithmetic, one rounding at the end),
which is what fastmerge always does. Where the results may differ, the test says by how much and
why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

import fastmerge

State = dict[str, NDArray[np.float32]]
Merged = tuple[State, State]  # fastmerge's and mergekit's

GRADIENT = [0.2, 0.9, 0.4]
BY_FILTER = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]


@pytest.fixture(scope="module")
def models(shared_zoo) -> dict[str, Path]:
    """A base in two shards and fine-tunes of it; the last two are stored in other types."""
    base = shared_zoo.base("parity", layers=5, hidden=96, vocab=300, scale=0.02, shards=2)

    def tune(name: str, **how: Any) -> Path:
        return shared_zoo.tune(base, f"parity-{name}", size=0.001, **how)

    return {
        "base": base,
        "a": tune("a", seed=1),
        "b": tune("b", seed=2, shards=3),
        "c": tune("c", seed=3),
        "half": tune("half", seed=4, dtype="F16"),
        "single": tune("single", seed=5, dtype="F32"),
    }


@pytest.fixture(scope="module")
def both(
    models: dict[str, Path], shared_zoo, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[State, State]]:
    """Runs one recipe (its model names replaced by paths) through both; also compares names and
    configs."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def run(recipe: Mapping[str, Any]) -> Merged:
        text = yaml.safe_dump(
            {"dtype": "float32", "out_dtype": "bfloat16", **_with_paths(recipe, models)},
            sort_keys=False,
        )
        folder = tmp_path_factory.mktemp("parity")
        fastmerge.merge(text, folder / "ours", threads=2)
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(text)),
            out_path=str(folder / "theirs"),
            options=MergeOptions(quiet=True, random_seed=7, copy_tokenizer=False),
            config_source=text,
        )
        ours, theirs = (shared_zoo.read(folder / name) for name in ("ours", "theirs"))
        configs = [
            json.loads((folder / name / "config.json").read_text()) for name in ("ours", "theirs")
        ]
        assert sorted(ours) == sorted(theirs)
        assert configs[0]["num_hidden_layers"] == configs[1]["num_hidden_layers"]
        assert configs[0]["architectures"] == configs[1]["architectures"]
        return ours, theirs

    return run


def _with_paths(node: Any, models: Mapping[str, Path]) -> Any:
    if isinstance(node, Mapping):
        return {
            key: str(models[value])
            if key in ("model", "base_model")
            else _with_paths(value, models)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_with_paths(item, models) for item in node]
    return node


def listed(**per_model: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The ``models:`` section, in the given order."""
    return [{"model": m, **({"parameters": dict(p)} if p else {})} for m, p in per_model.items()]


def different(merged: Merged) -> dict[str, int]:
    """Tensor -> entries whose bits differ."""
    ours, theirs = merged
    counts = {
        name: int((x.view(np.uint32) != theirs[name].view(np.uint32)).sum())
        for name, x in ours.items()
    }
    return {name: count for name, count in counts.items() if count}


def steps(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> tuple[float, int]:
    """Largest distance in bf16 steps, and how many entries differ at all.

    Entries below 1/256 of their tensor's mean magnitude are measured in the steps of that
    magnitude:
    where models cancel (a = -b at t = 0.5), mergekit's three roundings leave 0 and one FMA leaves
    1e-11.
    """
    floor = np.abs(theirs).mean() / 256
    size = np.maximum(np.maximum(np.abs(ours), np.abs(theirs)), floor)
    step = np.exp2(np.floor(np.log2(size)) - 7)
    return float((np.abs(ours - theirs) / step).max()), int((ours != theirs).sum())


def apart(one: State, other: State) -> tuple[float, float]:
    """Largest distance in steps over all tensors, and the fraction of entries that differ."""
    found = [steps(one[name], other[name]) for name in one]
    return max(d for d, _ in found), sum(n for _, n in found) / sum(x.size for x in one.values())


# --- bit-equal ------------------------------------------------------------------------------------

EXACT = {
    "linear": {
        "merge_method": "linear",
        "models": listed(a={"weight": 0.3}, b={"weight": 0.7}, c={"weight": 0.45}),
    },
    "linear, gradient and filter": {
        "merge_method": "linear",
        "models": listed(a={"weight": GRADIENT}, b={"weight": BY_FILTER}, c={"weight": 0.1}),
    },
    "linear, not normalized": {
        "merge_method": "linear",
        "models": listed(a={"weight": 1.5}, b={"weight": -0.5}),
        "parameters": {"normalize": False},
    },
    "linear, mixed dtypes": {
        "merge_method": "linear",
        "models": listed(base={"weight": 1}, half={"weight": 0.6}, single={"weight": 0.3}),
    },
    "linear, slices": {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": "a", "layer_range": [0, 3], "parameters": {"weight": GRADIENT}},
                    {"model": "b", "layer_range": [1, 4], "parameters": {"weight": 0.4}},
                ]
            },
            {
                "sources": [
                    {"model": "b", "layer_range": [2, 5], "parameters": {"weight": 0.8}},
                    {"model": "c", "layer_range": [2, 5], "parameters": {"weight": 0.1}},
                ]
            },
        ],
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": listed(base=None, a={"weight": 0.6}, b={"weight": 0.35}),
    },
    "task_arithmetic, normalized, lambda": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": listed(a={"weight": GRADIENT}, b={"weight": 0.2}, c={"weight": BY_FILTER}),
        "parameters": {"normalize": True, "lambda": 0.8},
    },
    "task_arithmetic, mixed dtypes": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": listed(half={"weight": 0.5}, single={"weight": 0.7}),
    },
    "ties, density 1": {
        "merge_method": "ties",
        "base_model": "base",
        "models": listed(base=None, a={"weight": 0.5}, b={"weight": 0.3}, c={"weight": 0.4}),
        "parameters": {"int8_mask": True},
    },
    "ties, density 1, weights by layer and filter": {
        "merge_method": "ties",
        "base_model": "base",
        "models": listed(
            a={"weight": [0, 0.3, 0.7, 1]},
            b={"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]},
            c={"weight": 1.0},
        ),
        "parameters": {"lambda": 1.3},
    },
    "ties, density 1, not normalized": {
        "merge_method": "ties",
        "base_model": "base",
        "models": listed(a={"weight": 0.5}, b={"weight": -0.3}),
        "parameters": {"normalize": False},
    },
    "dare_ties, density 1": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": listed(a={"weight": 0.5}, b={"weight": 0.3}, c={"weight": 0.4}),
    },
    "della, density 1": {
        "merge_method": "della",
        "base_model": "base",
        "models": listed(a={"weight": 0.5}, b={"weight": 0.3}, c={"weight": 0.4}),
    },
    "della_linear, density 1": {
        "merge_method": "della_linear",
        "base_model": "base",
        "models": listed(a={"weight": 0.5}, b={"weight": 0.3}),
    },
    "breadcrumbs, density 1": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": listed(a={"weight": 0.5}, b={"weight": 0.3}),
    },
    "dare_linear, density 1": {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": listed(a={"weight": 0.5}, b={"weight": 0.3}),
    },
    "ram": {
        "merge_method": "ram",
        "base_model": "base",
        "models": listed(a=None, b=None, c=None),
    },
    "ram, a larger epsilon, mixed dtypes": {
        "merge_method": "ram",
        "base_model": "base",
        "models": listed(half=None, single=None),
        "parameters": {"epsilon": 1e-3},
    },
    "ramplus_tl": {
        "merge_method": "ramplus_tl",
        "base_model": "base",
        "models": listed(a=None, b=None, c=None),
        "parameters": {"r": 0.5, "alpha": BY_FILTER, "epsilon": 1e-4},
    },
    "nearswap": {
        "merge_method": "nearswap",
        "base_model": "base",
        "models": listed(a=None),
        "parameters": {"t": [0, 1e-4, 1e-3]},
    },
    "passthrough, scaled": {
        "merge_method": "passthrough",
        "models": listed(
            a={
                "scale": [
                    {"filter": "o_proj", "value": -2.0},
                    {"filter": "down_proj", "value": [0.5, 1.25]},
                    {"value": 1.0},
                ]
            }
        ),
    },
    "passthrough, stacked slices": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 4]}]},
            {"sources": [{"model": "b", "layer_range": [1, 5]}]},
            {"sources": [{"model": "a", "layer_range": [3, 5], "parameters": {"scale": 0.7}}]},
        ],
    },
}


@pytest.mark.parametrize("recipe", EXACT.values(), ids=EXACT)
def test_bit_equal(both: Callable[..., Merged], recipe: Mapping[str, Any]) -> None:
    assert different(both(recipe)) == {}


# --- spherical methods: mergekit reduces in fp32, fastmerge in fp64 -------------------------------

CLOSE = {
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": listed(a=None, b=None),
        "parameters": {"t": BY_FILTER},
    },
    "slerp, slices": {
        "merge_method": "slerp",
        "base_model": "b",
        "slices": [
            {"sources": [{"model": m, "layer_range": [0, 2]} for m in ("a", "b")]},
            {"sources": [{"model": m, "layer_range": [1, 5]} for m in ("a", "b")]},
        ],
        "parameters": {"t": GRADIENT},
    },
    "slerp, mixed dtypes": {
        "merge_method": "slerp",
        "base_model": "half",
        "models": listed(half=None, single=None),
        "parameters": {"t": 0.3},
    },
    "nuslerp": {
        "merge_method": "nuslerp",
        "models": listed(a={"weight": 0.6}, b={"weight": GRADIENT}),
    },
    "nuslerp, of deltas": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": listed(a={"weight": 0.6}, b={"weight": 0.3}),
    },
    "nuslerp, by last axis": {
        "merge_method": "nuslerp",
        "models": listed(a={"weight": 0.6}, b={"weight": 0.3}),
        "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp, by first axis, of deltas": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": listed(a={"weight": 0.6}, b={"weight": 0.3}),
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {
        "merge_method": "multislerp",
        "models": listed(a={"weight": 0.5}, b={"weight": 0.3}, c={"weight": GRADIENT}),
    },
    "multislerp, of deltas": {
        "merge_method": "multislerp",
        "base_model": "base",
        "models": listed(a={"weight": 0.5}, b={"weight": 0.3}, c={"weight": 0.2}),
    },
    "karcher": {
        "merge_method": "karcher",
        "models": listed(a=None, b=None, c=None),
    },
    "sce": {
        "merge_method": "sce",
        "base_model": "base",
        "models": listed(a=None, b=None, c=None),
    },
    "model_stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": listed(a=None, b=None, c=None),
    },
    "model_stock, filter_wise": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": listed(a=None, b=None, c=None),
        "parameters": {"filter_wise": True},
    },
}


@pytest.mark.parametrize("recipe", CLOSE.values(), ids=CLOSE)
def test_within_rounding(both: Callable[..., Merged], recipe: Mapping[str, Any]) -> None:
    """One bf16 step, two where mergekit iterates in fp32, on at most 1 entry in 1000.

    The differences are mergekit's: it computes angles and coefficients in fp32, and a coefficient
    that is wrong by one part in 2^23 moves one bf16 rounding in 2^14. fastmerge's stay within 1e-4
    of float64 (test_slerp_against_float64).
    """
    distance, fraction = apart(*both(recipe))
    iterates = recipe["merge_method"] in ("karcher", "multislerp")
    assert distance <= (2 if iterates else 1)
    assert fraction <= 1e-3


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.6, 0.9])
def test_slerp_against_float64(both: Callable[..., Merged], models, shared_zoo, t: float) -> None:
    """The contract: at most 1 bf16 step on at most 1e-4 of the entries, here against float64.

    mergekit's own fp32 coefficients miss float64 on up to 4e-4 of them, so against mergekit the
    bound is 1e-4 plus its own error.
    """
    ours, theirs = both(
        {
            "merge_method": "slerp",
            "base_model": "a",
            "models": listed(a=None, b=None),
            "parameters": {"t": t},
        }
    )
    a, b = shared_zoo.read(models["a"]), shared_zoo.read(models["b"])
    exact = {name: _slerp_float64(a[name], b[name], t) for name in a}
    distance, fraction = apart(ours, exact)
    assert distance <= 1
    assert fraction <= 1e-4
    distance, between = apart(ours, theirs)
    assert distance <= 1
    assert between <= 1e-4 + apart(theirs, exact)[1]


def _slerp_float64(a: NDArray[np.float32], b: NDArray[np.float32], t: float) -> NDArray[np.float32]:
    """Shoemake's formula in float64, rounded once to bf16; linear above a cosine of 0.9995."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosine = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    if abs(cosine) > 0.9995:
        return _round_bf16((1 - t) * x + t * y)
    angle = np.arccos(cosine)
    return _round_bf16((np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle))


def _round_bf16(x: NDArray[np.float64]) -> NDArray[np.float32]:
    _, exponent = np.frexp(x)
    unit = np.exp2(exponent - 8.0)  # bf16 has 8 significant bits; rint is to nearest even
    return (np.rint(x / unit) * unit).astype(np.float32)


def test_scale_zero(both: Callable[..., Merged]) -> None:
    """Scale 0 gives zeros; mergekit's keep the sign of the weight (-x * 0 = -0), fastmerge's are
    +0."""
    ours, theirs = both({"merge_method": "passthrough", "models": listed(a={"scale": BY_ZERO})})
    zeroed = [name for name in ours if "o_proj" in name]
    assert zeroed
    assert not any(ours[name].any() or theirs[name].any() for name in zeroed)
    assert set(different((ours, theirs))) <= set(zeroed)


BY_ZERO = [{"filter": "o_proj", "value": 0}, {"value": 1}]


# --- trimmed: equal wherever the tie rule has no say ----------------------------------------------


def deltas(models: Mapping[str, Path], shared_zoo: Any, name: str) -> State:
    base, tune = shared_zoo.read(models["base"]), shared_zoo.read(models[name])
    return {tensor: tune[tensor] - base[tensor] for tensor in base}


def kept(density: float, size: int) -> int:
    return max(1, int(density * size))


def at_threshold(delta: NDArray[np.float32], density: float) -> NDArray[np.bool_]:
    """Entries whose magnitude equals the k-th largest: which of them survive is the tie rule's
    choice."""
    size = np.abs(delta)
    k = kept(density, size.size)
    return np.asarray(size == np.partition(size.ravel(), size.size - k)[size.size - k])


TRIMMED = {
    "two": ({"a": 0.5, "b": 0.3}, {}),
    "three": ({"a": 0.5, "b": 0.3, "c": 0.53}, {"lambda": 0.9}),
    "not normalized": ({"a": 0.2, "b": 0.05}, {"normalize": False}),
    "nearly all": ({"a": 0.99, "b": 0.9}, {}),
}


@pytest.mark.parametrize("density, parameters", TRIMMED.values(), ids=TRIMMED)
def test_trimmed_ties(
    both: Callable[..., Merged], models, shared_zoo, density: dict[str, float], parameters
) -> None:
    """Bit-equal except where some delta lies exactly at its threshold; mergekit leaves those to an
    unstable sort."""
    ours, theirs = both(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": listed(**{m: {"density": d, "weight": 0.7} for m, d in density.items()}),
            "parameters": parameters,
        }
    )
    free = {m: deltas(models, shared_zoo, m) for m in density}
    compared = 0
    for name in ours:
        tied = np.any([at_threshold(free[m][name], d) for m, d in density.items()], axis=0)
        assert np.array_equal(
            ours[name][~tied].view(np.uint32), theirs[name][~tied].view(np.uint32)
        )
        compared += int((~tied).sum())
    assert compared > 0.8 * sum(x.size for x in ours.values())


@pytest.mark.parametrize("density", [0.5, 0.1, 0.003])
def test_trim_keeps_as_many(
    both: Callable[..., Merged], models, shared_zoo, density: float
) -> None:
    """With one model and weight 1 the kept entries are those that left the base: exactly k of
    both."""
    merged = both(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": listed(a={"density": density, "weight": 1.0}),
        }
    )
    base, delta = shared_zoo.read(models["base"]), deltas(models, shared_zoo, "a")
    for name, start in base.items():
        expected = min(kept(density, start.size), int((delta[name] != 0).sum()))
        assert [int((state[name] != start).sum()) for state in merged] == [expected] * 2


# --- random: another generator, the same distribution ---------------------------------------------


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_keeps_and_rescales_alike(
    both: Callable[..., Merged], models, shared_zoo, method: str, rescale: bool
) -> None:
    """Both drop entries at random, keep ``density`` of them within five standard deviations, and
    with ``rescale`` give each delta its L1 norm back."""
    density = 0.3
    merged = both(
        {
            "merge_method": method,
            "base_model": "base",
            "models": listed(a={"density": density, "weight": 1.0}),
            "parameters": {"rescale": rescale},
            "out_dtype": "float32",  # so that the norms can be compared
        }
    )
    base = shared_zoo.read(models["base"])
    delta = deltas(models, shared_zoo, "a")
    for state in merged:
        for name, start in base.items():
            moved = state[name] - start
            movable = int((delta[name] != 0).sum())
            spread = 5 * np.sqrt(movable * density * (1 - density))
            assert abs(int((moved != 0).sum()) - density * movable) <= spread + 1
            alive = moved != 0
            full, left = np.abs(delta[name]).sum(), np.abs(delta[name][alive]).sum()
            expected = full if rescale and left else left
            # base + delta is rounded to fp32 around 0.02, deltas are around 1e-3
            assert np.abs(moved).sum() == pytest.approx(expected, rel=1e-4)
