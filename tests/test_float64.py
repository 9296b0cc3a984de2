"""Merges in float64, and of float64 models in float32, against definitions in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge import _C, api, merge_state_dicts
from fastmerge.compute import double_leaves, doubles, reference
from fastmerge.compute.cpu import cpu
from fastmerge.methods import unregister
from fastmerge.methods.entries import maximum
from fastmerge.selection import (
    EVERY,
    INDEX,
    MAGNITUDE,
    MIXED,
    RANDOM,
    RANKED,
    Sparsify,
    keep_below,
    random_key,
)
from fastmerge.tree.nodes import MEAN, ZERO, RowMap, Rows, Stored

State = dict[str, torch.Tensor]
SHAPES = {
    "none": (0,),
    "one": (1,),
    "odd": (7,),
    "matrix": (33, 65),
    "scalar": (),
    "cube": (3, 5, 7),
}
NEAR = {"rtol": 1e-12, "atol": 1e-13}


def drawn(seed: int, shapes: Mapping[str, Sequence[int]] = SHAPES, size: float = 1.0) -> State:
    random = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(tuple(shape), generator=random, dtype=torch.float64)
        for name, shape in shapes.items()
    }


BASE = drawn(0)
A, B, C = ({k: BASE[k] + x for k, x in drawn(seed, size=0.01).items()} for seed in (1, 2, 3))


def merged(method: str, *models: State, base: State | None = None, **parameters: Any) -> State:
    given: dict[str, State] = {} if base is None else {"base": base}
    given |= {f"m{i}": model for i, model in enumerate(models)}
    made: State = merge_state_dicts(
        given, method, base=None if base is None else "base", parameters=parameters, seed=5
    )
    assert {tensor.dtype for tensor in made.values()} == {torch.float64}
    return made


def near(made: State, formula: Callable[..., torch.Tensor], *states: State) -> None:
    for name, tensor in made.items():
        wanted = formula(*(state[name] for state in states))
        np.testing.assert_allclose(tensor.numpy(), wanted.numpy(), **NEAR, err_msg=name)


# ---------------------------------------------------------------- methods


def test_linear() -> None:
    near(
        merged("linear", A, B, C, weight=[0.3, 0.3, 0.1]),
        lambda a, b, c: (0.3 * a + 0.3 * b + 0.1 * c) / (0.3 + 0.3 + 0.1), A, B, C,
    )  # fmt: skip


def test_sums_of_deltas() -> None:
    near(
        merged("task_arithmetic", A, B, base=BASE, weight=[0.3, 0.7], **{"lambda": 0.9}),
        lambda o, a, b: o + 0.9 * (0.3 * (a - o) + 0.7 * (b - o)), BASE, A, B,
    )  # fmt: skip


def test_a_scaled_copy() -> None:
    near(merged("passthrough", A, scale=0.1), lambda a: 0.1 * a, A)


def test_magmax() -> None:
    def formula(o: torch.Tensor, *models: torch.Tensor) -> torch.Tensor:
        deltas = torch.stack([x - o for x in models])
        return o + 0.3 * deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]

    near(merged("magmax", A, B, C, base=BASE, **{"lambda": 0.3}), formula, BASE, A, B, C)


def test_consensus_ta() -> None:
    def formula(o: torch.Tensor, *models: torch.Tensor) -> torch.Tensor:
        deltas = [0.7 * (x - o) for x in models]
        total = sum(deltas, torch.zeros_like(o))
        claims = [(x - o).abs() >= 0.4 * (total - (x - o)).abs() for x in models]
        return o + total * (sum(claim.int() for claim in claims) >= 2)

    near(merged("consensus_ta", A, B, C, base=BASE, weight=0.7), formula, BASE, A, B, C)


def test_geometric_median() -> None:
    """No point near it has a smaller sum of distances, which float64 tells from 1e-9 on."""
    made = merged("geometric_median", A, B, C, tol=1e-12)["matrix"]
    models = [state["matrix"] for state in (A, B, C)]

    def distance(x: torch.Tensor) -> float:
        return float(sum((x - model).norm() for model in models))

    for model in models:
        assert distance(made) <= distance(made + 1e-4 * (model - made))


def test_ramplus_counts_in_float64() -> None:
    def formula(o: torch.Tensor, *models: torch.Tensor) -> torch.Tensor:
        deltas = [x - o for x in models]
        active = [d.abs() > 0.01 for d in deltas]
        number = sum(each.int() for each in active)
        made = o.clone()
        for d, own in zip(deltas, active, strict=True):
            alone, shared = own & (number == 1), own & (number > 1)
            gain = 1 + 0.1 * min(int(shared.sum()) / max(int(alone.sum()), 0.01), 0.2)
            made += gain * d * alone + d * shared / number.clamp(min=1)
        return made

    near(merged("ramplus_tl", A, B, C, base=BASE, epsilon=0.01), formula, BASE, A, B, C)


@pytest.mark.parametrize("rescale", ["l1", "none", "density"])
@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_draws_are_those_of_float32(method: str, rescale: str) -> None:
    """The same words decide; of della also ranks, which are float64's here."""

    def kept(d: torch.Tensor, key: int) -> torch.Tensor:
        flat = d.numpy().ravel()
        if method == "dare_linear":
            words = reference.philox_words(flat.size, key)
            return torch.from_numpy(words.astype(np.uint64) < keep_below(0.3)).view(d.shape)
        length = d.shape[1] if d.ndim > 1 else d.numel()
        stride = int(np.prod(d.shape[2:]))
        spec = Sparsify(RANKED, keep_below=keep_below(0.3 - 0.15), key=key, length=length,
                        keep_below_top=keep_below(0.3 + 0.15), stride=stride)  # fmt: skip
        return torch.from_numpy(reference.drawn(reference.keys_of(flat), spec)).view(d.shape)

    made = merged(method, A, B, base=BASE, weight=[0.6, 0.4], density=0.3, rescale=rescale)
    for name, o in BASE.items():
        wanted = o.clone()
        for i, (model, weight) in enumerate(((A, 0.6), (B, 0.4))):
            delta = model[name] - o
            if not delta.numel():
                continue
            own = delta * kept(delta, random_key(5, name, i))
            before, after = delta.abs().sum(), own.abs().sum()
            factor = {"none": 1.0, "density": 1 / 0.3, "l1": float(before / after)}[rescale]
            wanted += weight * own * (factor if after else 1.0)
        np.testing.assert_allclose(made[name].numpy(), wanted.numpy(), **NEAR, err_msg=name)


def trimmed(sizes: np.ndarray, keep: int, order: np.ndarray) -> np.ndarray:
    ranked = np.lexsort((order, -sizes))
    mask = np.zeros(sizes.size, bool)
    mask[ranked[:keep]] = True
    return mask


@pytest.mark.parametrize("trim", ["tensor", "model"])
@pytest.mark.parametrize("ties", ["mixed", "index"])
def test_ties(trim: str, ties: str, tmp_path: Path) -> None:
    """Thresholds that float32 cannot tell: deltas differ by 1e-12 of themselves, many tie."""
    shapes = {"a": (40, 50), "b": (33,)}
    base = drawn(7, shapes)
    more = {"a": 1e-3, "b": 1e-3 * (1 + 1e-12)}
    steps = [{k: torch.round(8 * x) * more[k] for k, x in drawn(s, shapes).items()} for s in (8, 9)]
    models = [{k: base[k] + step[k] for k in base} for step in steps]
    for name, state in (("base", base), ("m0", models[0]), ("m1", models[1])):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    recipe = {
        "merge_method": "ties", "base_model": str(tmp_path / "base"), "dtype": "float64",
        "models": [{"model": str(tmp_path / f"m{i}"), "parameters": {"weight": w, "density": 0.3}}
                   for i, w in enumerate((0.6, 0.5))],
        "parameters": {"trim": trim, "ties": ties},
    }  # fmt: skip
    api.merge(recipe, tmp_path / "out", threads=2)
    made = load_file(tmp_path / "out" / "model.safetensors")
    tiled = -(-2000 // _C.tile_entries()) * _C.tile_entries()
    origins = {"a": 0, "b": 0 if trim == "tensor" else tiled}
    deltas = [{k: (m[k] - base[k]).numpy().ravel() for k in base} for m in models]
    order = {
        k: reference.order_of(MIXED if ties == "mixed" else INDEX, d.size, origins[k])
        for k, d in deltas[0].items()
    }
    kept = []
    for own in deltas:
        mask: dict[str, np.ndarray] = {}
        for group in [["a", "b"]] if trim == "model" else [["a"], ["b"]]:
            sizes = np.concatenate([np.abs(own[k]) for k in group])
            among = np.concatenate([order[k] for k in group])
            found = trimmed(sizes, int(0.3 * sizes.size), among)
            ends = np.cumsum([own[k].size for k in group])[:-1]
            mask |= dict(zip(group, np.split(found, ends), strict=True))
        kept.append(mask)
    for k, x in base.items():
        terms = [w * d[k] * m[k] for w, d, m in zip((0.6, 0.5), deltas, kept, strict=True)]
        sign = np.where(sum(terms) >= 0, 1, -1)
        agrees = [np.sign(t) == sign for t in terms]
        share = sum(w * a for w, a in zip((0.6, 0.5), agrees, strict=True))
        total = sum(t * a for t, a in zip(terms, agrees, strict=True))
        wanted = x.numpy().ravel() + total / np.where(share == 0, 1, share)
        np.testing.assert_allclose(made[k].numpy().ravel(), wanted, **NEAR)


def test_a_chain_of_documents_is_one_tree_in_float64(tmp_path: Path) -> None:
    for name, state in (("a", A), ("b", B), ("c", C)):
        (tmp_path / name).mkdir()
        state = {k: x for k, x in state.items() if x.numel()}
        save_file(state, tmp_path / name / "model.safetensors")
    text = f"""
name: mean
merge_method: linear
models:
- {{model: {tmp_path}/a, parameters: {{weight: 0.3}}}}
- {{model: {tmp_path}/b, parameters: {{weight: 0.1}}}}
---
merge_method: task_arithmetic
base_model: {tmp_path}/c
models:
- {{model: mean, parameters: {{weight: 0.7}}}}
"""
    api.merge(text, tmp_path / "out")
    near(
        load_file(tmp_path / "out" / "model.safetensors"),
        lambda a, b, c: c + 0.7 * ((0.3 * a + 0.1 * b) / (0.3 + 0.1) - c), A, B, C,
    )  # fmt: skip


def test_functions_and_expressions_get_float64() -> None:
    @fastmerge.method(version="1")
    def of_entries(entries: Any) -> Any:
        """By entry."""
        a, b = entries
        return maximum(a, b) / 3 + abs(-a) * (b < 0.1)

    @fastmerge.method(version="1")
    def of_tensors(tensors: Any) -> Any:
        """Whole."""
        assert tensors[0].dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            tensors[0][...] = 0
        return tensors[0] * tensors[1]

    try:
        near(
            merged("of_entries", A, B),
            lambda a, b: torch.maximum(a, b) / 3 + a.abs() * (b < 0.1), A, B,
        )  # fmt: skip
        near(merged("of_tensors", A, B), torch.mul, A, B)
    finally:
        unregister("of_entries")
        unregister("of_tensors")


# ---------------------------------------------------------------- the back end


SPECS = [
    Sparsify(MAGNITUDE, 100),
    Sparsify(MAGNITUDE, 100, INDEX, rescale=True),
    Sparsify(MAGNITUDE, 300, EVERY),
    Sparsify(MAGNITUDE, 200, skip=50),
    Sparsify(MAGNITUDE, 0),
    Sparsify(RANDOM, keep_below=1 << 30, key=3, rescale=True),
    Sparsify(RANKED, keep_below=1 << 29, keep_below_top=1 << 31, key=3, length=9, stride=1),
    Sparsify(RANKED, keep_below=1 << 29, keep_below_top=1 << 31, key=3, length=3, stride=37),
]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_parts_do_not_show(spec: Sparsify, special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small parts, and by digits in place of a sort: what `reference` selects from the whole."""
    rng = np.random.default_rng(1)
    x, base = np.round(rng.normal(size=(2, 999)), 2)
    if special:
        x[5], x[700], base[9], x[10:13] = np.nan, np.inf, -np.inf, -0.0
    monkeypatch.setattr(doubles, "_PART", 64)
    monkeypatch.setattr(doubles, "_FEW", 10)
    backend = doubles.DoubleBackend(cpu(1))
    numbers = [backend.tensor(array) for array in (x, base)]
    found = backend.select(numbers[:1], numbers[1], [spec])[0]
    keys = reference.magnitude_keys(x, base)
    whole = reference.select([x], base, [spec])[0]
    np.testing.assert_array_equal(
        reference.survivors(found, keys), reference.survivors(whole, keys)
    )
    assert found.kept == whole.kept
    if np.isfinite(whole.rescale):
        assert found.rescale == pytest.approx(whole.rescale, rel=1e-12)


def test_gathered_rows_are_those_of_float32() -> None:
    rng = np.random.default_rng(2)
    arrays = [np.round(rng.normal(size=(n, 6)), 2).astype(np.float32) for n in (11, 5)]
    sources = tuple(Stored(i, "w", a.shape) for i, a in enumerate(arrays))
    rows = RowMap(
        np.array([0, 1, ZERO, MEAN, 0, 1], np.int32), np.array([10, 4, 0, 0, 0, 2]),
        (((0, 1), (1, 1)),), 8,
    )  # fmt: skip
    leaf = Rows(sources, (11, 5), rows, (8, 6), sources[0].dtype)
    backend = doubles.DoubleBackend(cpu(1))
    made = double_leaves.gathered(
        leaf, {s: backend.tensor(a) for s, a in zip(sources, arrays, strict=True)}
    )
    a, b = (array.astype(np.float64) for array in arrays)
    first = np.stack([a[10], b[4], 0 * a[0], (a[1] + b[1]) / 2, a[0], b[2]])
    wanted = np.concatenate([first, [first.mean(axis=0)] * 2])
    np.testing.assert_allclose(made.read(0, 48), wanted.ravel(), rtol=1e-15)
    np.testing.assert_array_equal(made.read(7, 40), made.read(0, 48)[7:40])


@pytest.mark.parametrize("bits, code", [(8, "BF16"), (11, "F16"), (24, "F32")])
def test_one_rounding(bits: int, code: str) -> None:
    """Just beside a tie, float32 lies between: to nearest even of float64's own number."""
    rng = np.random.default_rng(3)
    x = rng.integers(1 << bits - 1, 1 << bits, 3000) + 0.5  # ties
    x = x * (1 + rng.choice([0, 2.0**-50, -(2.0**-50), 2.0**-30], x.size)) * 2.0**-bits
    x *= rng.choice([-1, 1], x.size)
    made = reference.widen(reference.round_to(x, code)).astype(np.float64)
    for number, found in zip(x.tolist(), made.tolist(), strict=True):
        scaled = Fraction(number) * (1 << bits)
        assert Fraction(found) * (1 << bits) == round(scaled)  # half to even
    for special in (np.nan, np.inf, -np.inf, 1e300, -1e300, 1e-300, 0.0, -0.0):
        out = reference.widen(reference.round_to(np.array([special]), code))[0]
        with np.errstate(over="ignore"):
            assert np.array_equal(out, np.float32(special), equal_nan=True)
            assert np.signbit(out) == np.signbit(special)


def test_nonfinite_is_counted_and_kept() -> None:
    a = {"w": torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.float64)}
    b = {"w": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    made = merged("linear", a, b, weight=0.5)["w"]
    assert made[0] == 1 and made[1].isnan() and made[2].isinf()
