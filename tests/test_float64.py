"""Merges in float64, and of float64 models in float32, against definitions in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge import _C, api, live, llama, merge_state_dicts
from fastmerge.compute import double_leaves, doubles, reference
from fastmerge.compute.cpu import cpu
from fastmerge.engine.executor import Local
from fastmerge.errors import FastmergeError, UnsupportedError
from fastmerge.methods import unregister
from fastmerge.methods.entries import maximum
from fastmerge.planning.planner import make_plan
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
from tests.conftest import llama_config, llama_shapes

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


# ---------------------------------------------------------------- models on disk


CONFIG = llama_config() | {"torch_dtype": "float64"}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base and two tunes in float64, and the same rounded to float32."""
    base = {n: 0.02 * x for n, x in drawn(1, llama_shapes(CONFIG)).items()}
    states = {"base": base}
    for seed, name in ((2, "a"), (3, "b")):
        more = drawn(seed, llama_shapes(CONFIG), 0.001)
        states[name] = {n: base[n] + more[n] for n in base}
    for name, state in states.items():
        for kind, ending in ((torch.float64, ""), (torch.float32, "32")):
            folder = tmp_path / f"{name}{ending}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(CONFIG))
            save_file({n: x.to(kind) for n, x in state.items()}, folder / "model.safetensors")
    return {path.name: path for path in tmp_path.iterdir()}


def recipe(models: Mapping[str, Path], method: str, *names: str, **top: Any) -> dict[str, Any]:
    parameters = {"weight": 0.4, "density": 0.5} if method != "slerp" else {}
    return {
        "merge_method": method,
        "models": [{"model": str(models[n]), "parameters": dict(parameters)} for n in names],
        **top,
    }


def state_of(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "sce"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_float32_it_is_the_rounded_model(method, dtype, models, tmp_path) -> None:
    """Bit for bit; one note for each model says so."""
    made = {}
    for ending in ("", "32"):
        top: dict[str, Any] = {"dtype": dtype}
        if method != "linear":
            top["base_model"] = str(models[("a" if method == "slerp" else "base") + ending])
        if method == "slerp":
            top["parameters"] = {"t": 0.3}
        names = (f"a{ending}", f"b{ending}")
        report = api.merge(recipe(models, method, *names, **top), tmp_path / f"out{ending}", seed=1)
        made[ending] = state_of(tmp_path / f"out{ending}")
        said = [note for note in report.notes if "are float64: merged in float32" in note]
        assert len(said) == (0 if ending else 3 - (method in ("linear", "slerp")))
    for name, tensor in made[""].items():
        assert torch.equal(tensor, made["32"][name]) and tensor.dtype == getattr(torch, dtype)


def test_types_of_the_output(models, tmp_path) -> None:
    def run(**top: str) -> State:
        text = recipe(models, "linear", "a", "b32", **top)
        api.merge(text, tmp_path / "out", overwrite=True)
        return state_of(tmp_path / "out")

    a, b = state_of(models["a"]), state_of(models["b32"])
    exact = {n: (0.4 * a[n] + 0.4 * b[n].double()) / (0.4 + 0.4) for n in a}
    for made in (run(), run(dtype="float64")):
        near(made, lambda x: x, exact)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float64"
    rounded = run(dtype="float64", out_dtype="bfloat16")
    for name, tensor in rounded.items():
        bits = reference.round_to(exact[name].numpy(), "BF16").view(np.int16)
        # Where the sum's last bit decides a tie it may be the other.
        assert (tensor.view(torch.int16).numpy() != bits).mean() < 1e-3
    narrow, wide = run(dtype="float32"), run(dtype="bfloat16", out_dtype="float64")
    for name, tensor in wide.items():
        assert torch.equal(tensor, narrow[name].double())


def test_a_copy_keeps_its_bytes(models, tmp_path) -> None:
    for top in ({}, {"dtype": "float64"}):
        text = {"merge_method": "passthrough", "models": [{"model": str(models["a"])}], **top}
        api.merge(text, tmp_path / "out", overwrite=True)
        made = state_of(tmp_path / "out")
        assert all(torch.equal(made[n], x) for n, x in state_of(models["a"]).items())


def test_threads_do_not_show_and_the_key_knows_the_arithmetic(models, tmp_path) -> None:
    text = recipe(models, "ties", "a", "b", base_model=str(models["base"]), dtype="float64")
    for threads in (1, 3):
        api.merge(text, tmp_path / f"t{threads}", threads=threads)
    one, three = state_of(tmp_path / "t1"), state_of(tmp_path / "t3")
    assert all(torch.equal(x, three[n]) for n, x in one.items())
    narrow = recipe(models, "linear", "a32", "b32", dtype="float32", out_dtype="bfloat16")
    assert make_plan(narrow).key != make_plan({**narrow, "dtype": "float64"}).key


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_adapter_on_a_float64_base(dtype, use_dora, models, zoo, tmp_path) -> None:
    adapter = zoo.adapter("lora", models["base32"], use_dora=use_dora)
    fastmerge.fold(str(models["base"]), str(adapter), tmp_path / "out", dtype=dtype)
    made, base = state_of(tmp_path / "out"), state_of(models["base"])
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in made.items():
        wanted = base[name]
        head = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{head}A.weight" in saved:
            b, a = (saved[f"{head}{part}.weight"].double() for part in "BA")
            wanted = wanted + 2 * b @ a
            if use_dora:
                lengths = saved[f"{head}magnitude_vector"].double()
                wanted = wanted * (lengths / wanted.norm(dim=1))[:, None]
        rtol = 1e-12 if dtype == "float64" else 1e-5
        np.testing.assert_allclose(
            tensor.double().numpy(), wanted.numpy(), rtol=rtol, atol=rtol / 10
        )


def test_transformers_loads_it(models, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    text = recipe(models, "linear", "a", "b", dtype="float64")
    api.merge(text, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.float64 and model.config.dtype == torch.float64
    loaded = llama.load_merged(text)
    assert loaded.dtype == torch.float64
    for name, tensor in state_of(tmp_path / "out").items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(loaded.state_dict()[name], tensor)
    for kind in (torch.float64, torch.bfloat16):
        model.to(kind).requires_grad_(False)
        for parameter in model.parameters():
            parameter.zero_()
        live.merge_into(model, make_plan(text))
        for name, tensor in state_of(tmp_path / "out").items():
            assert torch.equal(model.state_dict()[name], tensor.to(kind))


def test_into_tensors_and_arrays() -> None:
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        out = {name: torch.zeros_like(x, dtype=kind) for name, x in A.items()}
        merge_state_dicts([A, B], "linear", parameters={"weight": 1}, out=out)
        wanted = merge_state_dicts([A, B], "linear", parameters={"weight": 1})
        assert all(torch.equal(out[name], x.to(kind)) for name, x in wanted.items())
    arrays = [{name: x.numpy() for name, x in state.items()} for state in (A, B)]
    made = merge_state_dicts(arrays, "linear", parameters={"weight": 1})
    wide = merge_state_dicts(
        [{n: x.astype(np.float32) for n, x in a.items()} for a in arrays], "linear",
        parameters={"weight": 1}, dtype="float64",
    )  # fmt: skip
    into = {name: np.zeros_like(x) for name, x in arrays[0].items()}
    merge_state_dicts(arrays, "linear", parameters={"weight": 1}, out=into)
    for name, x in made.items():
        assert x.dtype == wide[name].dtype == np.float64
        np.testing.assert_array_equal(x, into[name])
        np.testing.assert_allclose(wide[name], x, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- what is refused


def test_gpus_have_none(models) -> None:
    plan = make_plan(recipe(models, "linear", "a", "b"))
    with pytest.raises(UnsupportedError, match=r"is merged in float64.* use .*cpu"):
        Local(plan, device="cuda")
    local = Local(plan, device="auto")
    assert local.backend == "cpu" and "device auto: merged on the CPU" in local.notes[0]


def test_searches_and_schedules_are_walked_in_float32(models, tmp_path) -> None:
    from fastmerge.retrograde.opening import open_template
    from fastmerge.retrograde.schedule import load
    from fastmerge.search.recipes import check_form, template_of

    def plan_of(**top: str) -> Any:
        from fastmerge.recipe.document import Recipe

        document = Recipe.load(recipe(models, "linear", "a", "b", **top)).output
        check_form(document)
        return template_of(document, tmp_path, "")

    assert not any(item.in_float64 for item in plan_of().tensors)
    assert any("are float64: merged in float32" in note for note in plan_of().notes)
    with pytest.raises(FastmergeError, match="a search merges in float32"):
        plan_of(dtype="float64")
    schedule = {
        "baseline": str(models["a"]), "pool": [str(models["b"])],
        "schedule": {"steps": [{"degrade": {"partner": "b", "method": "linear", "t": 0.3}}]},
    }  # fmt: skip
    assert not any(item.in_float64 for item in open_template(load(schedule)).tensors)
    with pytest.raises(FastmergeError, match="walked in float32"):
        load({**schedule, "dtype": "float64"})


def test_factors_and_calls_stay_in_float32(models, tmp_path) -> None:
    with pytest.raises(FastmergeError, match="'float64'"):
        fastmerge.extract_lora(
            str(models["a32"]), str(models["base32"]), tmp_path / "x", rank=2, dtype="float64"
        )
    with pytest.raises(FastmergeError, match="cannot merge float64 tensors"):
        fastmerge.ops.linear([A["odd"], B["odd"]], [1, 1])


def test_codes_are_made_of_float32(zoo: Any) -> None:
    base = zoo.base("plain", dtype="F32")
    tensors = {}
    for name, x in zoo.read(base).items():
        if "proj" not in name:
            tensors[name] = ("F32", x)
            continue
        tensors[name] = ("F8_E4M3", np.full(x.shape, 0x38, np.uint8))
        tensors[f"{name}_scale_inv"] = ("F32", np.full((1, 1), 0.5, np.float32))
    section = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    coded = zoo.raw("coded", tensors, llama_config() | {"quantization_config": section})
    text = recipe({"a": coded, "b": base}, "linear", "a", "b", dtype="float64")
    wanted = {n: x.astype(np.float64) for n, x in zoo.read(base).items()}
    for name, array in fastmerge.materialise(text, as_="numpy"):
        first = 0.5 if "proj" in name else wanted[name]
        np.testing.assert_allclose(array, (first + wanted[name]) / 2, rtol=1e-15)
    with pytest.raises(UnsupportedError, match="codes are made of float32"):
        make_plan(text | {"out_dtype": "as_base"})
