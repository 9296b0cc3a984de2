"""Merges of adapters alone, against PEFT's add_weighted_adapter and against float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import fastmerge
from fastmerge import api
from fastmerge.cli import main
from fastmerge.compute.adapters import Asked, Given, merged
from fastmerge.compute.factors import spectrum_of, spectrum_of_sum
from fastmerge.errors import FastmergeError, ModelError, RecipeError, UnsupportedError
from fastmerge.methods.adapters import ADAPTER_METHODS

HIDDEN, FF, VOCAB = 32, 48, 40
SHAPES = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (16, HIDDEN), "down_proj": (HIDDEN, FF)}
MODULES = {
    f"model.layers.{layer}.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}": shape
    for layer in (0, 1)
    for name, shape in SHAPES.items()
}


def write_adapter(
    folder: Path, *, r=4, alpha=8, seed=0, modules=MODULES, base="someone/base", dtype=np.float32,
    extra=(), **config,
) -> Path:  # fmt: skip
    """A PEFT adapter with normal factors; ``rank_pattern`` counts."""
    rng = np.random.default_rng([seed, 7])
    tensors = {}
    for module, (rows, cols) in modules.items():
        own = config.get("rank_pattern", {}).get(module, r)
        head = f"base_model.model.{module}"
        tensors[f"{head}.lora_A.weight"] = rng.normal(size=(own, cols)).astype(dtype)
        tensors[f"{head}.lora_B.weight"] = rng.normal(size=(rows, own)).astype(dtype)
    tensors |= dict(extra)
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": r,
        "lora_alpha": alpha, "target_modules": sorted({m.rpartition(".")[2] for m in modules}),
        "lora_dropout": 0.0, "bias": "none", **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to each module, in float64, by its own config."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in tensors:
        if not name.endswith("lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        rank = config["rank_pattern"].get(module, config["r"]) if "rank_pattern" in config else (
            config["r"])  # fmt: skip
        assert rank == len(a)
        alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        found[module] = scale * b.astype(np.float64) @ a.astype(np.float64)
    return found


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed=i) for i, name in enumerate(("code", "math"))]


def of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def near(a: dict[str, np.ndarray], b: dict[str, np.ndarray], error: float) -> bool:
    return a.keys() == b.keys() and all(
        np.linalg.norm(a[n] - b[n]) <= error * np.linalg.norm(b[n]) for n in a
    )


# --- against PEFT ---


def peft_model(zoo, adapters: list[Path]):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(zoo.base(), dtype=torch.float64)
    names = [f"a{i}" for i in range(len(adapters))]
    made = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        made.load_adapter(adapter, adapter_name=name)
    return made.to(torch.float64), names


def peft_deltas(model, name: str = "merged") -> dict[str, np.ndarray]:
    from peft.tuners.lora import LoraLayer

    return {
        key.removeprefix("base_model.model."): layer.get_delta_weight(name).detach().numpy()
        for key, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.r
    }


@pytest.mark.parametrize(
    ("method", "frequency"),
    [(m, False) for m in ADAPTER_METHODS if m != "task_arithmetic"]
    + [(m, True) for m in ADAPTER_METHODS if ADAPTER_METHODS[m].elect],
)
def test_as_peft_merges_them(
    zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, frequency: bool
) -> None:
    row = ADAPTER_METHODS[method]
    torch = pytest.importorskip("torch")
    adapters = [
        write_adapter(tmp_path / f"a{i}", seed=i, alpha=4 * (i + 1)) for i in range(3)
    ]  # fmt: skip
    weights, density, seed = [0.7, -0.4, 1.1], 0.6, 11
    model, names = peft_model(zoo, adapters)
    if row.random:
        _draw_as_we_do(monkeypatch, torch, row, density, seed, len(adapters))
    arguments = {"density": density} if row.prune else {}
    if row.elect:
        arguments["majority_sign_method"] = "frequency" if frequency else "total"
    model.add_weighted_adapter(
        names, weights, "merged", combination_type=method,
        svd_rank=5 if method.endswith("svd") else None, **arguments,
    )  # fmt: skip
    fastmerge.merge_adapters(
        adapters, tmp_path / "out", weights=weights, method=method, seed=seed,
        rank=5 if method.endswith("svd") else None, **arguments,
    )  # fmt: skip
    assert near(deltas(tmp_path / "out"), peft_deltas(model), 2e-6)


def test_of_rslora_it_is_the_sum_that_peft_has_a_root_of_the_rank_too_large(
    zoo, tmp_path: Path
) -> None:
    """PEFT 0.21 keeps ``use_rslora`` for the merged adapter, and lora_alpha at its rank: the scale
    is the rank's root, where the factors are those for 1.
    """
    adapters = [write_adapter(tmp_path / f"a{i}", seed=i, use_rslora=True) for i in range(2)]
    model, names = peft_model(zoo, adapters)
    one, two = map(deltas, adapters)
    for method, row in ADAPTER_METHODS.items():
        if row.random or method == "task_arithmetic":
            continue
        asked = {"density": 0.6} if row.prune else {}
        rank = 5 if method.endswith("svd") else 8 if method == "cat" else 4
        cut = rank if method.endswith("svd") else None
        model.add_weighted_adapter(
            names, [0.7, 0.4], method, combination_type=method, svd_rank=cut, **asked
        )
        out = tmp_path / method
        fastmerge.merge_adapters(
            adapters, out, weights=[0.7, 0.4], method=method, rank=cut, **asked
        )
        ours, theirs = deltas(out), peft_deltas(model, method)
        assert near({n: math.sqrt(rank) * own for n, own in ours.items()}, theirs, 2e-6), method
        if method == "cat":
            assert near(ours, {n: 0.7 * one[n] + 0.4 * two[n] for n in one}, 1e-6)


def _draw_as_we_do(monkeypatch, torch, row, density: float, seed: int, adapters: int) -> None:
    """torch.bernoulli with fastmerge's own draws, in the order in which PEFT asks: what is to be
    compared is what follows from them.
    """
    from fastmerge.compute.reference import philox_words
    from fastmerge.selection import keep_below, random_key

    ends = [""] if row.over == "products" else [" A", " B"]
    order = iter(
        (random_key(seed, module + end, i), seed)
        for module in sorted(MODULES, key=lambda m: (m.split(".")[2], "mlp" in m, "k_proj" in m))
        for end in ends
        for i in range(adapters)
    )

    def bernoulli(input):  # noqa: A002
        key, _ = next(order)
        kept = philox_words(input.numel(), key).astype(np.uint64) < keep_below(density)
        return torch.from_numpy(kept.reshape(input.shape).astype(np.float64))

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


def test_peft_loads_what_is_written(zoo, two: list[Path], tmp_path: Path) -> None:
    fastmerge.merge_adapters(two, tmp_path / "out", weights=[0.5, 0.5], method="cat")
    model, _ = peft_model(zoo, [tmp_path / "out"])
    assert near(peft_deltas(model, "a0"), deltas(tmp_path / "out"), 1e-12)
    assert len(deltas(tmp_path / "out")) == len(MODULES)


# --- values ---


@pytest.mark.parametrize("method", ["cat", "svd", "task_arithmetic"])
def test_the_sum_of_the_deltas(two: list[Path], tmp_path: Path, method: str) -> None:
    fastmerge.merge_adapters(
        two, tmp_path / "out", weights=[2, -1], method=method, rank=8 if method == "svd" else None
    )
    one, other = map(deltas, two)
    wanted = {name: 2 * one[name] - other[name] for name in one}
    assert near(deltas(tmp_path / "out"), wanted, 1e-6)


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("method", ["svd", "task_arithmetic"])
def test_the_nearest_of_a_rank(two: list[Path], tmp_path: Path, method: str, rank: int) -> None:
    fastmerge.merge_adapters(two, tmp_path / "out", weights=[1, 1], method=method, rank=rank)
    one, other = map(deltas, two)
    wanted = {name: of_rank(one[name] + other[name], rank) for name in one}
    assert near(deltas(tmp_path / "out"), wanted, 1e-6)
    lineage = json.loads((tmp_path / "out" / "fastmerge.json").read_text())
    name = "model.layers.0.self_attn.k_proj"
    s = np.linalg.svd(one[name] + other[name], compute_uv=False)
    told = lineage["modules"][name]
    assert told["rank"] == rank and told["singular_values"] == pytest.approx([s[0], s[rank - 1]])


def test_one_adapter_is_cut_to_a_rank(two: list[Path], tmp_path: Path) -> None:
    fastmerge.merge_adapters(two[:1], tmp_path / "out", weights=[1], rank=2)
    wanted = {name: of_rank(delta, 2) for name, delta in deltas(two[0]).items()}
    assert near(deltas(tmp_path / "out"), wanted, 1e-6)


def test_ranks_alphas_and_rslora_count(tmp_path: Path) -> None:
    module = "model.layers.1.self_attn.q_proj"
    one = write_adapter(tmp_path / "one", r=3, alpha=5, use_rslora=True)
    two = write_adapter(
        tmp_path / "two", r=2, seed=1, rank_pattern={module: 6}, alpha_pattern={module: 3}
    )
    fastmerge.merge_adapters([one, two], tmp_path / "out", weights=[1, 1], method="cat")
    a, b = deltas(one), deltas(two)
    assert near(deltas(tmp_path / "out"), {name: a[name] + b[name] for name in a}, 1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (5, {module: 9}) == (
        config["lora_alpha"], config["alpha_pattern"],
    )  # fmt: skip
    fastmerge.merge_adapters([one, two], tmp_path / "cut", weights=[1, 1])
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    # The largest rank of any module, as in PEFT; the others have no more than 3 + 2 together.
    assert (config["r"], config["rank_pattern"]) == (5, {module: 6})


def test_equal_magnitudes_and_densities() -> None:
    """int(density * entries) stay, of equals those of lowest index; density 0 leaves nothing."""
    a = np.array([[1.0, -2.0, 2.0, 2.0, 3.0]])
    row = ADAPTER_METHODS["magnitude_prune"]
    one = np.ones((1, 1))
    for density, kept in ((0.6, [0, -2, 2, 0, 3]), (0.0, [0] * 5), (1.0, a[0]), (0.19, [0] * 5)):
        _, got = merged([Given(one, a, 1.0, 1.0, density)], Asked(row), "x")
        assert np.array_equal(got[0], kept)


def test_draws_follow_the_density_and_the_seed() -> None:
    row = ADAPTER_METHODS["dare_linear_svd"]
    given = [Given(np.ones((300, 1)), np.ones((1, 200)), 1.0, 1.0, 0.3)]
    made = [np.matmul(*merged(given, Asked(row, 200, seed=seed), "x")) for seed in (1, 1, 2)]
    assert np.array_equal(made[0], made[1]) and not np.allclose(made[0], made[2])
    kept = np.isclose(made[0], 1 / 0.3)
    assert np.isclose(made[0][~kept], 0).all() and abs(kept.mean() - 0.3) < 0.01


@pytest.mark.parametrize("shapes", [((40, 30), (3, 2)), ((6, 30), (4, 5)), ((5, 4), (4, 4))])
def test_svd_of_a_sum_from_its_factors(shapes) -> None:
    (rows, cols), ranks = shapes
    rng = np.random.default_rng(0)
    bs = [rng.normal(size=(rows, r)) for r in ranks]
    factors_a = [rng.normal(size=(r, cols)) for r in ranks]
    whole = sum(b @ a for b, a in zip(bs, factors_a, strict=True))
    found, wanted = spectrum_of_sum(bs, factors_a), spectrum_of(whole)
    count = len(found.s)
    assert count == min(sum(ranks), rows, cols)
    assert np.allclose(found.s, wanted.s[:count], rtol=1e-12, atol=1e-12)
    for rank in range(1, count + 1):
        a, b = found.cut(rank), wanted.cut(rank)
        assert np.abs((a.u * a.s) @ a.vt - (b.u * b.s) @ b.vt).max() < 1e-12


# --- recipes and the command ---


def test_a_recipe_of_adapters(two: list[Path], tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: svd\nmodels:\n- model: {two[0]}\n  parameters:\n    weight:\n"
        f"    - {{filter: mlp, value: 2}}\n    - {{value: 1}}\n"
        f"- {{model: {two[1]}, parameters: {{weight: [0, 1]}}}}\n"
        "parameters: {rank: 8}\ndtype: float32\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(recipe), str(tmp_path / "out")])
    assert not ended.value.code, capsys.readouterr().err
    one, other = map(deltas, two)
    wanted = {
        name: (2 if "mlp" in name else 1) * one[name] + (0 if ".0." in name else 1) * other[name]
        for name in one
    }
    assert near(deltas(tmp_path / "out"), wanted, 1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: someone/base" in card and "**svd** of adapters" in card
    assert str(tmp_path) not in card
    report = fastmerge.merge(recipe, tmp_path / "again")
    assert report.tensors == 2 * len(MODULES)
    same = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("out", "again")]
    assert same[0] == same[1]


def test_a_seed_that_nobody_gave_follows_from_the_recipe(two: list[Path], tmp_path: Path) -> None:
    files = []
    for name, weights in (("a", [1, 1]), ("b", [1, 1]), ("c", [1, 2])):
        report = fastmerge.merge_adapters(
            two, tmp_path / name, weights=weights, method="dare_linear", density=0.5
        )
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
        assert report.seed is not None
    assert files[0] == files[1] != files[2]


def test_normalised_weights(two: list[Path], tmp_path: Path) -> None:
    fastmerge.merge_adapters(two, tmp_path / "a", weights=[1, 3], method="cat", normalize=True)
    fastmerge.merge_adapters(two, tmp_path / "b", weights=[0.25, 0.75], method="cat")
    assert near(deltas(tmp_path / "a"), deltas(tmp_path / "b"), 1e-12)
    with pytest.raises(RecipeError, match="add up to 0; set 'normalize: false'"):
        fastmerge.merge_adapters(two, tmp_path / "c", weights=[1, -1], normalize=True)


def test_targets_where_they_are(tmp_path: Path) -> None:
    some = {name: shape for name, shape in MODULES.items() if "mlp" not in name}
    one = write_adapter(tmp_path / "one", modules=some)
    two = write_adapter(tmp_path / "two", seed=1)
    with pytest.raises(ModelError, match=r"'.*two' adapts .*down_proj.* and 1 more, which '.*one'"):
        fastmerge.merge_adapters([one, two], tmp_path / "out", weights=[1, 1], method="cat")
    fastmerge.merge_adapters(
        [one, two], tmp_path / "out", weights=[1, 1], method="cat", targets="any"
    )
    a, b = deltas(one), deltas(two)
    wanted = {name: a.get(name, 0) + b[name] for name in b}
    assert near(deltas(tmp_path / "out"), wanted, 1e-6)


def test_the_outputs_type(two: list[Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    for dtype in ("bfloat16", "float16"):
        fastmerge.merge_adapters(two, tmp_path / dtype, weights=[1, 1], method="cat", dtype=dtype)
        fastmerge.merge_adapters(
            two, tmp_path / "out", weights=[1, 1], method="cat", overwrite=True
        )
        got = load_file(tmp_path / dtype / "adapter_model.safetensors")
        for name, exact in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
            assert torch.equal(got[name], exact.to(getattr(torch, dtype)))


def test_factors_of_embeddings(zoo, tmp_path: Path) -> None:
    """PEFT's embeddings have their factors under other names, of the transpose."""
    base = zoo.base(dtype="F32")
    adapters = []
    for seed in (1, 2):
        tuned = zoo.tune(base, f"tuned{seed}", seed=seed, dtype="F32")
        adapters.append(tmp_path / f"adapter{seed}")
        fastmerge.extract_lora(
            tuned, base, adapters[-1], rank=4, embed_lora=True, skip_undecomposable=True
        )
    fastmerge.merge_adapters(adapters, tmp_path / "out", weights=[1, -2])
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    read = [
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (*adapters, tmp_path / "out")
    ]
    one, other, merged_ = (t[f"{name}B"].astype(np.float64) @ t[f"{name}A"] for t in read)
    assert merged_.shape == (HIDDEN, VOCAB)
    assert np.allclose(merged_, of_rank(one - 2 * other, 4), atol=1e-6)


def test_an_interrupted_merge_goes_on(tmp_path: Path) -> None:
    """Factors larger than a buffer, so that some are in the file by then."""
    wide = {f"model.layers.{i}.mlp.up_proj": (8, 20_000) for i in range(4)}
    two = [write_adapter(tmp_path / f"a{i}", r=64, seed=i, modules=wide) for i in (0, 1)]
    arguments = {"weights": [1, 1], "method": "cat"}

    def stop(done: int, total: int, _: str) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastmerge.merge_adapters(two, tmp_path / "out", **arguments, progress=stop, threads=1)
    assert not (tmp_path / "out").exists()
    report = fastmerge.merge_adapters(two, tmp_path / "out", **arguments)
    once = tmp_path / "once" / "out"  # of the same name, which the card has, whose digest is kept
    once.parent.mkdir()
    fastmerge.merge_adapters(two, once, **arguments)
    assert 0 < report.resumed < report.tensors
    for file in ("adapter_model.safetensors", "fastmerge.json", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (once / file).read_bytes()


def test_the_plan(two: list[Path], tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yml"
    models = ", ".join(f"{{model: {p}, parameters: {{weight: 1}}}}" for p in two)
    recipe.write_text(f"merge_method: dare_ties_svd\nmodels: [{models}]\nparameters: {{rank: 3}}\n")
    for words in ([], [str(tmp_path / "out")], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(recipe), *words])
        assert not ended.value.code
        told = capsys.readouterr().out
        assert "dare_ties_svd" in told and "someone/base" in told
    found = json.loads(told)
    assert found["ranks"] == [3] and [own["ranks"] for own in found["adapters"]] == [[4], [4]]
    assert found["modules"] == len(MODULES) and not (tmp_path / "out").exists()
    fastmerge.merge(recipe, tmp_path / "out")
    header = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size - found["bytes_out"]
    assert 0 < header <= 8192


def test_the_methods_are_listed(capsys) -> None:
    for words, said, code in (
        ([], "dare_ties_svd", 0), (["--json"], "magnitude_prune_svd", 0), (["svd"], "svd_clamp", 0),
        (["slerp"], "no method 'slerp' of adapters", 2),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(["methods", "--adapters", *words])
        assert int(ended.value.code or 0) == code
        told = capsys.readouterr()
        assert said in told.out + told.err


# --- bad input ---


def test_adapters_that_do_not_go_together(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one")
    magnitudes = {
        f"base_model.model.{module}.lora_magnitude_vector": np.ones(rows, np.float32)
        for module, (rows, _) in MODULES.items()
    }
    cases: list[tuple[dict, dict, type[FastmergeError], str]] = [
        ({"base": "else/other"}, {}, ModelError, "adapts 'someone/base', '.*' adapts 'else/other'"),
        ({"r": 8}, {"method": "linear"}, ModelError, "rank 4 in '.*', 8 in .* cat or svd"),
        ({"r": 8}, {"method": "ties"}, ModelError, "use merge_method ties_svd"),
        (
            {"modules": {**MODULES, "model.layers.1.self_attn.k_proj": (24, HIDDEN)}},
            {}, ModelError, r"a matrix of \[16, 32\], '.*' one of \[24, 32\]",
        ),
        ({"use_dora": True, "extra": magnitudes}, {}, UnsupportedError, "is a DoRA adapter"),
        (
            {"extra": {"base_model.model.lm_head.weight": np.ones((VOCAB, HIDDEN), np.float32)},
             "modules_to_save": ["lm_head"]},
            {}, UnsupportedError, "more than factors",
        ),
        ({}, {"rank": 17}, RecipeError, "rank 17 is more than '.*k_proj', .* give at most 16"),
        ({}, {"rank": 0}, RecipeError, "'rank' must be at least 1"),
        ({}, {"method": "slerp"}, RecipeError, "'slerp' does not merge adapters alone"),
        ({}, {"method": "linear", "rank": 4}, RecipeError, "no parameter 'rank' of linear"),
        ({}, {"method": "ties", "density": 1.5}, RecipeError, r"'density' must be in \[0, 1\]"),
        ({}, {"density": 0.5}, RecipeError, "no parameter 'density' of svd"),
        ({}, {"weights": [1]}, FastmergeError, "weights: 1 for 2 adapters"),
        ({}, {"targets": "some"}, RecipeError, "'targets' must be same or any"),
        ({}, {"dtype": "int8"}, UnsupportedError, "int8"),
        ({}, {"method": "task_arithmetic", "svd_clamp": 0.9}, RecipeError, "without a 'rank'"),
    ]  # fmt: skip
    for number, (other, arguments, kind, said) in enumerate(cases):
        two = write_adapter(tmp_path / f"two{number}", seed=1, **other)
        with pytest.raises(kind, match=said):
            fastmerge.merge_adapters(
                [one, two], tmp_path / "out", **{"weights": [1, 1], **arguments}
            )
        assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".*")) == []


def test_a_recipe_of_a_base_and_adapters_alone_says_what_it_makes(
    two: list[Path],
) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "someone/base",
        "models": [{"model": str(path), "parameters": {"weight": 1}} for path in two],
    }
    note = f"for a model, write 'model: someone/base+{two[0]}'"
    assert any(note in line for line in api.decide(recipe).notes)
    del recipe["base_model"]
    assert not any("for a model, write" in line for line in api.decide(recipe).notes)
    with pytest.raises(RecipeError, match="for models that have them, write 'model: x\\+"):
        api.decide({**recipe, "base_model": "x", "merge_method": "passthrough"})


def test_an_adapter_among_models_is_told_where_it_belongs(two: list[Path], zoo) -> None:
    base = str(zoo.base("whole"))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": base}, {"model": str(two[0]), "parameters": {"weight": 1}}],
    }
    with pytest.raises(UnsupportedError) as caught:
        fastmerge.plan(recipe)
    assert str(caught.value).startswith("recipe.models[1].model: ")
    assert f"'model: BASE+{two[0]}'" in str(caught.value)


def test_a_base_that_is_one_under_two_names(two: list[Path], tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", base="mirror/of-base")
    local = write_adapter(tmp_path / "local", base="/somewhere/base")
    fastmerge.merge_adapters([two[0], local], tmp_path / "a", weights=[1, 1])
    report = fastmerge.merge_adapters(
        [two[0], other], tmp_path / "b", weights=[1, 1], base_model="someone/base"
    )
    assert "base_model says that they are one" in report.notes[0]


def test_factors_that_are_no_numbers(tmp_path: Path, capsys) -> None:
    one = write_adapter(tmp_path / "one")
    tensors = safetensors.numpy.load_file(one / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    tensors[name][3, 1] = np.nan
    safetensors.numpy.save_file(tensors, one / "adapter_model.safetensors")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: cat\nmodels: [{{model: {one}, parameters: {{weight: 1}}}}]\n")
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(recipe), str(tmp_path / "out")])
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    assert f"'{name}' has NaN or infinite values" in capsys.readouterr().err


def test_recipes_that_cannot_be(two: list[Path], tmp_path: Path) -> None:
    one, other = two
    models = [{"model": str(p), "parameters": {"weight": 1}} for p in two]
    for change, said in (
        ({"slices": []}, "'slices' is not supported: these models are adapters"),
        ({"tokenizer_source": "base"}, "these models are adapters"),
        ({"parameters": {"lambda": 1}}, "no parameter 'lambda' of cat of adapters"),
        ({"models": [{"model": str(one)}]}, "cat needs the parameter 'weight' of"),
        ({"models": [{"model": str(one), "weight": 1}]}, "it belongs under 'parameters:'"),
        ({"models": [*models, {"model": str(tmp_path)}]}, "models"),
        ({"seed": 1, "random_seed": 2}, "say the same"),
    ):
        with pytest.raises(FastmergeError, match=said):
            fastmerge.merge({"merge_method": "cat", "models": models, **change}, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="merged on the CPU"):
        fastmerge.merge({"merge_method": "cat", "models": models}, tmp_path / "out", device="cuda")
    with pytest.raises(UnsupportedError, match="merges adapters alone"):
        fastmerge.api.plan({"merge_method": "cat", "models": models})
    assert other.exists() and not (tmp_path / "out").exists()


def test_without_a_rank_every_module_has_the_largest_of_any_as_peft_gives_it(
    tmp_path: Path,
) -> None:
    module = next(iter(MODULES))
    one = write_adapter(tmp_path / "one", r=2, rank_pattern={module: 6}, alpha_pattern={module: 6})
    other = write_adapter(tmp_path / "other", r=3, seed=1)
    fastmerge.merge_adapters(
        [one, other], tmp_path / "out", weights=[1, 0.5], method="dare_ties_svd", density=0.9
    )
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if name.endswith("lora_A.weight")} == {6}


def test_a_rank_above_what_there_is_is_noted(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", r=2)
    other = write_adapter(tmp_path / "other", r=3, seed=1)
    report = fastmerge.merge_adapters(
        [one, other], tmp_path / "out", weights=[1, 1], method="svd", rank=9
    )
    notes = [note for note in report.notes if "all that its adapters have together" in note]
    assert len(notes) == 6 and "has rank 5" in notes[0] and notes[-1].startswith("1 more")
