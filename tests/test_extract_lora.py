"""extract-lora: the adapter between two models, against full SVDs, PEFT and mergekit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import fastmerge
from fastmerge import _C, extract_lora
from fastmerge.cli import main
from fastmerge.compute.factors import Difference, nearest_of_rank
from fastmerge.errors import FastmergeError, ModelError, UnsupportedError

RANK = 4
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def difference(delta: np.ndarray, threads: int = 1) -> Difference:
    base = np.zeros_like(delta)
    views = [_C.View(x.ctypes.data, x.size, "F32", x) for x in (delta, base)]
    return Difference(_C.Pool(threads), *views, delta.shape)


def product(found) -> np.ndarray:
    return (found.u * found.s) @ found.vt


def low_rank_tune(zoo, base: Path, name: str, rank: int, **options) -> Path:
    """Every matrix but the embeddings moved by a product of this rank; all else is the base's."""
    rng = np.random.default_rng(5)
    tensors = zoo.read(base)
    for key, tensor in tensors.items():
        if key.split(".")[-2] in LINEAR:
            rows, cols = tensor.shape
            b, a = rng.normal(size=(rows, rank)), rng.normal(size=(rank, cols))
            tensors[key] = (tensor + 0.01 * b @ a).astype(np.float32)
    config = json.loads((base / "config.json").read_text())
    return zoo.write(name, tensors, config, dtype="F32", **options)


def written(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def delta(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    return b.astype(np.float64) @ a


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def run(capsys, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def torch_state(model: Path, adapter: Path | None = None) -> dict[str, np.ndarray]:
    """Transformers' own state of a model, with the adapter merged by PEFT."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        loaded = peft.PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    return {n: t.numpy().astype(np.float64) for n, t in loaded.state_dict().items()}


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[n] - b[n]).max()) for n in a)


# --- the range finder ---


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (1, 40), (40, 1), (300, 7)])
def test_a_matrix_of_the_rank_comes_back(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    rank = min(RANK, *shape)
    exact = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    stored = exact.astype(np.float32)
    for asked in {rank, min(2 * rank, *shape), min(shape)}:
        found = nearest_of_rank(difference(stored), asked, key=1)
        assert np.linalg.norm(product(found) - stored) < 2e-6 * np.linalg.norm(stored)
        assert np.abs(found.u.T @ found.u - np.eye(len(found.s))).max() < 1e-6
        assert (np.diff(found.s) <= 0).all()


@pytest.mark.parametrize(("power", "worse"), [(0, 1.2), (2, 1.01), (4, 1.002)])
def test_the_error_is_near_the_least(power: int, worse: float) -> None:
    rng = np.random.default_rng(1)
    u, _ = np.linalg.qr(rng.normal(size=(200, 150)))
    v, _ = np.linalg.qr(rng.normal(size=(150, 150)))
    values = np.arange(1, 151) ** -0.5
    stored = (u * values @ v.T).astype(np.float32)
    found = nearest_of_rank(difference(stored), 16, key=3, power_iterations=power)
    least = float(np.sqrt((values[16:] ** 2).sum()))
    assert least < np.linalg.norm(stored - product(found)) < worse * least


def test_as_many_directions_as_the_smaller_side_are_exact() -> None:
    stored = np.random.default_rng(2).normal(size=(50, 30)).astype(np.float32)
    u, s, vt = np.linalg.svd(stored.astype(np.float64), full_matrices=False)
    for rank in (20, 25, 30):
        found = nearest_of_rank(difference(stored), rank, key=0)
        assert np.allclose(found.s, s[:rank], rtol=1e-6)
        assert np.abs(product(found) - (u[:, :rank] * s[:rank]) @ vt[:rank]).max() < 1e-5


def test_small_matrices_at_their_full_rank_are_exact() -> None:
    """Of random signs 63 % of all 3 x 3 are singular: what they are multiplied with was lost."""
    rng = np.random.default_rng(5)
    for shape in ((3, 3), (2, 3), (5, 3), (3, 2), (6, 16), (16, 6), (1, 1)):
        for key in range(40):
            stored = rng.normal(size=shape).astype(np.float32)
            found = nearest_of_rank(difference(stored), min(shape), key=key)
            assert np.abs(product(found) - stored).max() < 1e-5


def test_a_layer_of_which_the_bias_alone_differs(zoo, tmp_path: Path) -> None:
    weight = zoo.read(zoo.base())["model.layers.0.self_attn.q_proj.weight"]
    name = "model.layers.0.self_attn.{}_proj.{}"
    shared = {name.format("q", "weight"): weight, "model.embed_tokens.weight": weight}
    pair = []
    for number in range(2):
        own = {name.format("q", "bias"): np.full(len(weight), float(number))}
        more = {name.format("k", "weight"): weight + number * np.outer(weight[:, 0], weight[0])}
        config = {"model_type": "llama", "num_hidden_layers": 1}
        pair.append(zoo.write(f"m{number}", shared | own | more, config, dtype="F32"))
    fastmerge.extract_lora(pair[1], pair[0], tmp_path / "lora", rank=2)
    made = dict(
        fastmerge.materialise(fastmerge.api.fold_recipe(str(pair[0]), str(tmp_path / "lora")))
    )
    for tensor, values in zoo.read(pair[1]).items():
        np.testing.assert_allclose(made[tensor], values, rtol=1e-5, atol=1e-6)


def test_blocks_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.random.default_rng(3).normal(size=(37, 20)).astype(np.float32)
    once = difference(stored)
    x, y = np.ones((20, 3), np.float32), np.ones((37, 2), np.float32)
    monkeypatch.setattr("fastmerge.compute.factors._BLOCK_ENTRIES", 60)
    blocks = difference(stored)
    assert [part.stop for part, _ in blocks.blocks()] == [*range(3, 37, 3), 37]
    assert np.allclose(blocks.times(x), stored @ x, atol=1e-5)
    assert np.allclose(blocks.transposed_times(y), stored.T @ y, atol=1e-5)
    b, a = stored[:, :2].copy(), stored[:2].copy()
    exact = float(np.linalg.norm(stored.astype(np.float64) - b.astype(np.float64) @ a))
    assert blocks.norm_without(b, a) == pytest.approx(exact, rel=1e-6)
    assert blocks.norm() == once.norm() == pytest.approx(np.linalg.norm(stored), rel=1e-6)


@pytest.mark.parametrize("ratio", [1e-2, 1e-4, 1e-6])
def test_small_singular_values_are_not_drowned(ratio: float) -> None:
    rng = np.random.default_rng(4)
    u, _ = np.linalg.qr(rng.normal(size=(80, 2)))
    v, _ = np.linalg.qr(rng.normal(size=(60, 2)))
    stored = (u * [1, ratio] @ v.T).astype(np.float32)
    found = nearest_of_rank(difference(stored), 2, key=0)
    assert found.s[1] == pytest.approx(ratio, rel=max(1e-5, 3e-7 / ratio))


# --- whole models ---


def test_a_tune_of_the_rank_is_the_base_with_the_adapter(zoo, tmp_path: Path) -> None:
    base = zoo.base(dtype="F32")
    tuned = low_rank_tune(zoo, base, "tuned", RANK)
    found = extract_lora(tuned, base, tmp_path / "out", rank=RANK)
    assert found.error < 1e-5 and len(found.modules) == 14
    assert "equal in both models, and left out: 7 modules" in found.report.notes
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (RANK, RANK)
    assert config["target_modules"] == sorted(LINEAR) and config["modules_to_save"] is None
    mine = torch_state(base, tmp_path / "out")
    assert largest_difference(mine, torch_state(tuned)) < 1e-6


@pytest.mark.parametrize("asked", [RANK, 2 * RANK, 32])
def test_rank_twice_the_rank_and_full(zoo, tmp_path: Path, asked: int) -> None:
    base = zoo.base(dtype="F32")
    tuned = low_rank_tune(zoo, base, "tuned", RANK)
    found = extract_lora(tuned, base, tmp_path / "out", max_rank=asked)
    assert found.error < 1e-5
    assert largest_difference(torch_state(base, tmp_path / "out"), torch_state(tuned)) < 1e-6


def test_a_full_tune_is_within_its_stated_error(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    tuned = zoo.tune(base, "tuned")
    found = extract_lora(tuned, base, tmp_path / "out", rank=8, dtype="bfloat16")
    tensors = written_f32(tmp_path / "out")
    before, after = zoo.read(base), zoo.read(tuned)
    for module, own in found.modules.items():
        if "rank" not in own:
            continue
        exact = after[f"{module}.weight"].astype(np.float64) - before[f"{module}.weight"]
        s = np.linalg.svd(exact, compute_uv=False)
        least = float(np.sqrt((s[8:] ** 2).sum()) / np.linalg.norm(exact))
        error = np.linalg.norm(exact - delta(tensors, module)) / np.linalg.norm(exact)
        assert own["error"] == pytest.approx(error, rel=1e-4)
        assert least < error < 1.03 * least
    # Norms, embeddings and the head are whole: bf16 as stored.
    state, wanted = torch_state(base, tmp_path / "out"), torch_state(tuned)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert np.array_equal(state[name], wanted[name])


def written_f32(folder: Path) -> dict[str, np.ndarray]:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    loaded = load_file(folder / "adapter_model.safetensors")
    return {name: tensor.to(torch.float32).numpy() for name, tensor in loaded.items()}


def test_mergekits_choices(zoo, tmp_path: Path) -> None:
    base = zoo.base(dtype="F32")
    tuned = zoo.tune(base, "tuned", dtype="F32")
    options = {"include": ["self_attn"], "exclude": ["layers.1", "embed", "lm_head"]}
    found = extract_lora(tuned, base, tmp_path / "some", rank=RANK, **options)
    heads = {module.split(".")[2] for module in found.modules}
    assert heads == {"0"} and len(found.modules) == 4
    assert config_of(tmp_path / "some")["target_modules"] == [
        f"model.layers.0.self_attn.{x}_proj" for x in "koqv"
    ]
    extract_lora(
        tuned, base, tmp_path / "saved", rank=RANK, save_modules=["o_proj"],
        skip_undecomposable=True, embed_lora=True,
    )  # fmt: skip
    config = config_of(tmp_path / "saved")
    assert config["modules_to_save"] == ["o_proj"] and "lm_head" in config["target_modules"]
    tensors = written(tmp_path / "saved")
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (RANK, 40)
    whole = tensors["base_model.model.model.layers.1.self_attn.o_proj.weight"]
    assert np.array_equal(whole, zoo.read(tuned)["model.layers.1.self_attn.o_proj.weight"])
    assert not any("norm" in name for name in tensors)


def test_embeddings_by_factors_and_a_tied_head(zoo, tmp_path: Path) -> None:
    base = zoo.base("base", dtype="F32", tied=True)
    tuned = zoo.tune(base, "tuned", dtype="F32")
    for options in ({"embed_lora": True}, {}):
        extract_lora(tuned, base, tmp_path / "out", max_rank=99, overwrite=True, **options)
        loaded = torch_state(base, tmp_path / "out")
        assert largest_difference(loaded, torch_state(tuned)) < 1e-6


def test_a_head_that_the_base_ties(zoo, tmp_path: Path) -> None:
    base = zoo.base("base", dtype="F32", tied=True)
    tensors = zoo.read(zoo.tune(base, "moved", dtype="F32"))
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    tuned = zoo.write("tuned", tensors, config, dtype="F32")
    extract_lora(tuned, base, tmp_path / "out", max_rank=99)
    loaded = torch_state(base, tmp_path / "out")
    assert largest_difference(loaded, torch_state(tuned)) < 1e-6


def test_types_may_differ(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    tuned = low_rank_tune(zoo, base, "tuned", RANK)  # float32; what is equal is so as numbers
    found = extract_lora(tuned, base, tmp_path / "out", rank=RANK)
    assert found.error < 1e-5 and config_of(tmp_path / "out")["modules_to_save"] is None
    assert largest_difference(torch_state(base, tmp_path / "out"), torch_state(tuned)) < 1e-6


def test_the_same_bits_for_every_number_of_threads(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    tuned = zoo.tune(base, "tuned")
    files = []
    for threads in (1, 3):
        extract_lora(tuned, base, tmp_path / f"{threads}", rank=8, threads=threads)
        files.append((tmp_path / f"{threads}" / "adapter_model.safetensors").read_bytes())
    extract_lora(tuned, base, tmp_path / "other", rank=8, seed=1)
    assert files[0] == files[1] != (tmp_path / "other" / "adapter_model.safetensors").read_bytes()


def test_singular_values_go_where_they_are_asked_to(zoo, tmp_path: Path) -> None:
    base = zoo.base(dtype="F32")
    tuned = zoo.tune(base, "tuned", dtype="F32")
    even = extract_lora(tuned, base, tmp_path / "even", rank=RANK, embed_lora=True)
    extract_lora(tuned, base, tmp_path / "a", rank=RANK, embed_lora=True, distribute_scale=False)
    one, two = written(tmp_path / "even"), written(tmp_path / "a")
    for name in one:
        if "lora_B" in name or "embedding_B" in name:
            columns = np.linalg.norm(two[name], axis=0)
            assert np.allclose(columns, 1, atol=1e-5)
            other = name.replace("_B", "_A")
            assert np.allclose(one[name] @ one[other], two[name] @ two[other], atol=1e-6)
            assert np.allclose(
                np.linalg.norm(one[name], axis=0), np.linalg.norm(one[other], axis=1), rtol=1e-4
            )
    assert even.report.seed == 0


def test_small_singular_values_are_dropped(zoo, tmp_path: Path) -> None:
    base = zoo.base(dtype="F32")
    tuned = low_rank_tune(zoo, base, "tuned", RANK)
    found = extract_lora(tuned, base, tmp_path / "out", rank=12, sv_epsilon=1e-4)
    assert {own["rank"] for own in found.modules.values()} == {RANK}
    assert largest_difference(torch_state(base, tmp_path / "out"), torch_state(tuned)) < 1e-6
    with pytest.raises(ModelError, match="no singular value is above"):
        extract_lora(tuned, base, tmp_path / "none", rank=12, sv_epsilon=1e4)
    assert not (tmp_path / "none").exists()


def test_what_is_written_says_how(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    tuned = zoo.tune(base, "tuned")
    found = extract_lora(tuned, base, tmp_path / "out", rank=RANK, seed=7)
    lineage = json.loads((tmp_path / "out" / "fastmerge.json").read_text())
    assert lineage["modules"].keys() == found.modules.keys() == set(lineage["modules"])
    own = lineage["modules"]["model.layers.0.mlp.up_proj"]
    assert own["rank"] == RANK and 0.5 < own["error"] < 1 and len(own["singular_values"]) == 2
    assert lineage["fastmerge_seed"] == "7" and lineage["fastmerge_inputs"].keys() == {
        "tuned", "base",
    }  # fmt: skip
    text = "".join(
        (tmp_path / "out" / name).read_text()
        for name in ("README.md", "fastmerge.json", "adapter_config.json")
    )
    assert str(tmp_path) not in text and "library_name: peft" in text


def test_gpt2_stores_its_matrices_the_other_way_round(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=32)
    torch.manual_seed(0)
    for name in ("base", "tuned"):
        model = transformers.GPT2LMHeadModel(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / name)
    found = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", max_rank=16)
    config = config_of(tmp_path / "out")
    assert config["fan_in_fan_out"] and config["bias"] == "lora_only" and found.error < 1e-5
    mine = torch_state(tmp_path / "base", tmp_path / "out")
    assert largest_difference(mine, torch_state(tmp_path / "tuned")) < 2e-6


def test_folded_into_the_base_it_is_the_tuned_model(zoo, tmp_path: Path) -> None:
    base = zoo.base(dtype="F32")
    tuned = zoo.tune(base, "tuned", dtype="F32")
    extract_lora(tuned, base, tmp_path / "out", max_rank=99)
    fastmerge.api.fold(base, tmp_path / "out", tmp_path / "folded")
    mine, wanted = zoo.read(tmp_path / "folded"), zoo.read(tuned)
    assert largest_difference(mine, wanted) < 1e-6


# --- the command lines ---


def test_the_command(zoo, tmp_path: Path, capsys) -> None:
    base, out = zoo.base(), tmp_path / "out"
    tuned = zoo.tune(base, "tuned")
    code, told, _ = run(capsys, "extract-lora", tuned, base, out, "--rank", RANK, "-e", "mlp")
    assert code == 0 and "relative error 0." in told and "over 8 matrices" in told
    code, told, _ = run(
        capsys, "extract-lora", tuned, base, out, "--max-rank", 99, "--overwrite", "--json",
        "--no-distribute-scale", "--dtype", "model",
    )  # fmt: skip
    found = json.loads(told)
    assert code == 0 and found["error"] < 0.01
    assert {len(own) for own in found["modules"].values() if own} == {4}


def test_mergekits_command_line(zoo, tmp_path: Path, capsys) -> None:
    """The same factors, but for signs, as mergekit 0.1.5 writes."""
    testing = pytest.importorskip("click.testing")
    from mergekit.scripts.extract_lora import main as theirs

    base = zoo.base(dtype="F32")
    tuned = zoo.tune(base, "tuned", dtype="F32")
    words = ["--model", tuned, "--base-model", base, "--max-rank", RANK, "--skip-undecomposable"]
    words = [str(word) for word in words]
    done = testing.CliRunner().invoke(theirs, [*words, "--out-path", str(tmp_path / "theirs")])
    assert done.exit_code == 0, done.output
    code, _, err = run(
        capsys, "mergekit-extract-lora", *words, "--out-path", tmp_path / "ours",
        "--lazy-unpickle", "--num-threads", 2,
    )  # fmt: skip
    assert code == 0 and "without effect here: --lazy-unpickle" in err
    mine, other = written(tmp_path / "ours"), written(tmp_path / "theirs")
    assert mine.keys() == other.keys()
    before, after = zoo.read(base), zoo.read(tuned)
    for name in mine:
        assert mine[name].shape == other[name].shape and mine[name].dtype == other[name].dtype
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            exact = after[f"{module}.weight"] - before[f"{module}.weight"]
            errors = [np.linalg.norm(exact - delta(x, module)) for x in (mine, other)]
            assert errors[1] <= errors[0] * (1 + 1e-6) and errors[0] < 1.02 * errors[1]
        elif "lora" not in name:
            assert np.array_equal(mine[name], other[name])
    keys = ("r", "lora_alpha", "task_type", "rank_pattern")
    both = [config_of(tmp_path / name) for name in ("ours", "theirs")]
    assert [both[0][key] for key in keys] == [both[1][key] for key in keys]
    for key in ("target_modules", "modules_to_save"):
        assert sorted(both[0][key]) == sorted(both[1][key])


# --- bad input ---


@pytest.fixture
def pair(zoo) -> tuple[Path, Path]:
    base = zoo.base()
    return zoo.tune(base, "tuned"), base


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "rank: give it or max_rank"),
        ({"rank": 4, "max_rank": 4}, "rank: give it or max_rank"),
        ({"rank": 0}, "rank: must be a whole number from 1"),
        ({"max_rank": True}, "max_rank: must be a whole number from 1"),
        ({"rank": 17}, r"rank 17 is more than it can have; give rank=16 or less, or max_rank"),
        ({"rank": 4, "include": ["("]}, "include: '\\(' is no regular expression"),
        ({"rank": 4, "exclude": ["."]}, "no matrix to take factors of"),
        (
            {"rank": 4, "save_modules": ["lm_haed"]},
            "no module is called so; did you mean 'lm_head'",
        ),
        ({"rank": 4, "dtype": "int8"}, "cannot merge in 'int8'"),
        ({"rank": 4, "sv_epsilon": -1}, "sv_epsilon: must be a number"),
        ({"rank": 4, "power_iterations": -1}, "power_iterations: must be a whole number"),
        ({"rank": 4, "seed": -1}, "seed must be a whole number"),
    ],
)
def test_options_that_cannot_be(pair, tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(FastmergeError, match=said):
        extract_lora(*pair, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(zoo, pair, tmp_path: Path) -> None:
    tuned, base = pair
    config = json.loads((base / "config.json").read_text())
    tensors = zoo.read(tuned)
    for change, said in (
        ({"model.norm.weight": None}, "'.*' has no tensor 'model.norm.weight', which"),
        ({"model.layers.2.mlp.up_proj.weight": np.zeros((48, 32))}, "no tensor 'model.layers.2"),
        ({"model.embed_tokens.weight": np.zeros((44, 32))}, "44 tokens in '.*', 40 in"),
        ({"model.norm.weight": np.zeros(31)}, r"shape \[31\] in '.*', \[32\] in"),
        ({"model.layers.0.mlp.up_proj.weight": np.full((48, 32), np.nan)}, "NaN or infinite"),
    ):
        changed = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        other = zoo.write(f"other{len(said)}", changed, config)
        with pytest.raises(ModelError, match=said):
            extract_lora(other, base, tmp_path / "out", rank=4)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="no matrix to take factors of: all are equal"):
        extract_lora(base, base, tmp_path / "out", rank=4)
    quantised = zoo.write("quantised", tensors, config | {"quantization_config": {"bits": 4}})
    with pytest.raises(UnsupportedError, match="is quantised"):
        extract_lora(quantised, base, tmp_path / "out", rank=4)
    assert list(tmp_path.glob(".*")) == []


def test_bad_input_is_exit_code_2(pair, tmp_path: Path, capsys) -> None:
    tuned, base = pair
    for words in (
        ["--rank", 0], ["--rank", 99], [], ["--rank", 4, "-i", "["], ["--rank", 4, "--device", "x"],
    ):  # fmt: skip
        code, _, told = run(capsys, "extract-lora", tuned, base, tmp_path / "out", *words)
        assert code == 2 and told.strip() and not (tmp_path / "out").exists()
    code, _, told = run(
        capsys, "mergekit-extract-lora", "--model", tuned, "--base-model", base, "--out-path",
        tmp_path / "out", "--no-safe-serialization",
    )  # fmt: skip
    assert code == 2 and "safetensors only" in told
