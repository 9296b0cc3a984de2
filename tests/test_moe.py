"""Mixtures of experts against mergekit-moe, transformers and float64."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml

import fastmerge
from fastmerge import FastmergeError, api
from fastmerge.cli import main
from fastmerge.methods.noise import normal, uniform, words
from tests.test_low_precision import Formats

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 40))]
EXPERTS = [
    {"source_model": "a", "positive_prompts": ["w3 w4 w5", "w6"]},
    {"source_model": "b", "positive_prompts": ["w7"], "negative_prompts": ["w8 w9", "w10"]},
]
SHARED = [{"source_model": "c", "positive_prompts": ["w11 w12"]}]
# Of each layout: the type of the models, shared experts.
LAYOUTS = {
    "mixtral": ("llama", None),
    "deepseek": ("llama", [{"source_model": "c"}]),
    "qwen": ("qwen2", SHARED),
    "qwen3": ("qwen3", None),
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def write_tokenizer(folder: Path) -> None:
    """Words between spaces."""
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "<unk>",
        },
    }  # fmt: skip
    document["added_tokens"] = [
        {"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, word in enumerate(WORDS[:3])
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def models(zoo, kind="llama", *, layers=2, dtype="BF16", **config):
    """Models 'base', 'a', 'b', 'c' of one type in the zoo's folder."""
    rng = np.random.default_rng(5)
    for name in ("base", "a", "b", "c"):
        folder = zoo.base(name, layers=layers, seed=ord(name[0]), dtype=dtype, scale=0.2, **config)
        tensors = zoo.read(folder)
        own = json.loads((folder / "config.json").read_text())
        own |= {"model_type": kind, "architectures": [f"{CLASSES[kind]}ForCausalLM"]}
        own |= {"head_dim": 8} if kind == "qwen3" else {}
        for i in range(layers):
            place = f"model.layers.{i}.self_attn."
            if kind == "qwen2":
                for part, rows in (("q", 32), ("k", 16), ("v", 16)):
                    tensors[f"{place}{part}_proj.bias"] = 0.1 * rng.normal(size=rows)
            if kind == "qwen3":
                for part in "qk":
                    tensors[f"{place}{part}_norm.weight"] = 1 + 0.1 * rng.normal(size=8)
        zoo.write(name, tensors, own, dtype=dtype)
        write_tokenizer(folder)


def recipe(shared=None, **keys):
    made = {"base_model": "base", "gate_mode": "cheap_embed", "experts": EXPERTS, **keys}
    return made | ({"shared_experts": shared} if shared else {})


@pytest.fixture
def here(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    return zoo


def fused(tensors: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """Our tensors under the names that mergekit 0.1.5 writes beside transformers 5."""
    if layout not in ("mixtral", "qwen3"):
        return tensors
    parts = ("w1", "w3", "w2") if layout == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        name = name.replace("block_sparse_moe", "mlp")
        if ".experts." not in name:
            found[name] = tensor
            continue
        module = name.split(".experts.")[0] + ".experts."

        def all_of(part, module=module):
            stack = [
                t for n, t in tensors.items()
                if n.replace("block_sparse_moe", "mlp").startswith(module)
                and n.endswith(f".{part}.weight")
            ]  # fmt: skip
            return np.stack(stack)

        gate, up, down = map(all_of, parts)
        found[module + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
        found[module + "down_proj"] = down
    return found


def peer(config: dict, out: Path) -> None:
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    build(MoEMergeConfig.model_validate(config), str(out), MergeOptions(), device="cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_mergekit_moe(here, layout: str) -> None:
    kind, shared = LAYOUTS[layout]
    models(here, kind)
    asked = recipe(shared, architecture=layout, dtype="bfloat16")
    if layout == "qwen":  # the peer opens no shared expert that is not an expert too
        asked["shared_experts"] = [{**SHARED[0], "source_model": "b"}]
    if layout == "deepseek":
        asked["shared_experts"] = [{"source_model": "a"}]
    peer(asked, here.root / "peer")
    fastmerge.merge(asked, "ours", threads=1)
    ours, theirs = fused(here.read(Path("ours")), layout), here.read(Path("peer"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
            np.testing.assert_allclose(tensor, theirs[name], rtol=2**-7, atol=1e-6, err_msg=name)
        else:
            assert np.array_equal(tensor, theirs[name]), name
    compare_configs(layout)


def compare_configs(layout: str) -> None:
    """What transformers reads from both, or what both say where it has no class."""
    if layout == "deepseek":
        one, two = (json.loads(Path(p, "config.json").read_text()) for p in ("ours", "peer"))
        rope = two.pop("rope_parameters")
        assert rope == {"rope_theta": one.pop("rope_theta"), "rope_type": "default"}
        two["torch_dtype"] = two.pop("dtype", two.get("torch_dtype"))
        assert one.items() <= two.items()
        return
    from transformers import AutoConfig

    one, two = (AutoConfig.from_pretrained(place).to_dict() for place in ("ours", "peer"))
    without = {"_name_or_path", "transformers_version", "max_window_layers"}
    differing = {k for k in one.keys() | two.keys() if one.get(k) != two.get(k)} - without
    # The peer keeps keys that the mixture's class does not read, and writes out what it derives.
    assert differing <= {"attention_bias", "mlp_bias", "pretraining_tp", "head_dim", "layer_types"}
    assert two.get("head_dim") in (one.get("head_dim"), None, 8)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_gates_of_states(here, mode: str) -> None:
    models(here)
    # Of one length: the peer averages over the padding too.
    experts = [
        {"source_model": "a", "positive_prompts": ["w3 w4", "w6 w5"]},
        {"source_model": "b", "positive_prompts": ["w7 w9"], "negative_prompts": ["w9 w8"]},
    ]
    asked = recipe(gate_mode=mode, dtype="float32") | {"experts": experts}
    peer(asked, here.root / "peer")
    report = fastmerge.merge(asked, "ours", threads=2)
    assert any("loaded whole and run" in note for note in report.notes)
    ours, theirs = fused(here.read(Path("ours")), "mixtral"), here.read(Path("peer"))
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        np.testing.assert_allclose(np.linalg.norm(ours[name], axis=1), 1.0, rtol=1e-6)
        # The peer subtracts and normalises in bfloat16.
        np.testing.assert_allclose(ours[name], theirs[name], atol=0.02)


def test_cheap_embed_is_its_definition(here) -> None:
    models(here, dtype="F32")
    fastmerge.merge(recipe(dtype="float32"), "out")
    table = here.read(Path("base"))["model.embed_tokens.weight"].astype(np.float64)

    def unit(x):
        return x / np.linalg.norm(x)

    def direction(*ids):
        return unit(table[list(ids)].sum(axis=0))

    expected = np.stack(
        [direction(1, 3, 4, 5, 1, 6), unit(direction(1, 7) - direction(1, 8, 9, 1, 10))]
    )
    found = here.read(Path("out"))["model.layers.1.block_sparse_moe.gate.weight"]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- what is drawn


def test_normal_numbers() -> None:
    drawn = np.array([0, 1 << 11, 1 << 40, 1 << 52, 1 << 60, 1 << 63, (1 << 64) - 1], np.uint64)
    exact = [statistics.NormalDist().inv_cdf(p) for p in uniform(drawn)]
    np.testing.assert_allclose(normal(drawn), exact, rtol=3e-7, atol=1e-7)
    sample = normal(words(7, 400_000)).astype(np.float64)
    assert abs(sample.mean()) < 0.007 and abs(sample.std() - 1) < 0.005
    assert abs((sample**4).mean() - 3) < 0.06
    assert np.array_equal(normal(words(7, 300_001)), sample[:300_001].astype(np.float32))


def test_random_gates_follow_from_the_seed(here) -> None:
    models(here, hidden=64)
    for mode in ("random", "uniform_random"):
        asked = recipe(gate_mode=mode, dtype="float32", seed=3)
        report = fastmerge.merge(asked, mode, threads=1)
        assert report.seed == 3
        fastmerge.merge(asked, f"{mode}-again", threads=4)
        fastmerge.merge(asked | {"seed": 4}, f"{mode}-other")
        one, again, other = (here.read(Path(f"{mode}{x}")) for x in ("", "-again", "-other"))
        gates = [name for name in one if name.endswith("gate.weight")]
        assert all(np.array_equal(one[n], again[n]) for n in one)
        assert all(not np.array_equal(one[n], other[n]) for n in gates)
        rows = np.concatenate([one[n].ravel() for n in gates])
        wanted = 1.0 if mode == "random" else 64**-0.5 / 3**0.5
        assert 0.85 * wanted < rows.std() < 1.15 * wanted
        if mode == "uniform_random":
            assert 0.95 / 8 < np.abs(rows).max() <= 1 / 8
    assert api.plan(recipe(gate_mode="random")).seed_derived


def test_noise_and_residual_scale(here) -> None:
    models(here, dtype="F32")
    experts = [{**EXPERTS[0], "residual_scale": 0.5}, {**EXPERTS[1], "noise_scale": 0.25}]
    asked = recipe(dtype="float32", seed=1) | {"experts": experts}
    fastmerge.merge(asked, "out", threads=1)
    fastmerge.merge(asked, "again", threads=3)
    assert all(
        np.array_equal(x, here.read(Path("again"))[n]) for n, x in here.read(Path("out")).items()
    )
    out, a, b = (here.read(Path(name)) for name in ("out", "a", "b"))
    block, mlp = "model.layers.0.block_sparse_moe.experts.", "model.layers.0.mlp."
    assert np.array_equal(out[block + "0.w2.weight"], a[mlp + "down_proj.weight"] / 2)
    assert np.array_equal(out[block + "0.w1.weight"], a[mlp + "gate_proj.weight"])
    noise = [
        out[f"{block}1.{part}.weight"] - b[f"{mlp}{name}.weight"]
        for part, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    ]
    assert all(abs(each.std() - 0.25) < 0.03 for each in noise)
    assert abs(np.corrcoef(noise[0].ravel(), noise[2].ravel())[0, 1]) < 0.1


# ---------------------------------------------------------------- what becomes of it


@pytest.mark.parametrize(
    ("layout", "kind", "shared"),
    [
        ("mixtral", "llama", None), ("mixtral", "mistral", None), ("qwen", "qwen2", SHARED),
        ("qwen", "llama", SHARED), ("qwen3", "qwen3", None),
    ],
)  # fmt: skip
def test_loads_and_generates(here, layout: str, kind: str, shared) -> None:
    import torch

    from fastmerge import llama

    models(here, kind)
    asked = recipe(shared, architecture=layout, dtype="float32")
    api.check(asked)
    fastmerge.merge(asked, "out", check=True)
    model = llama.load("out")
    tokens = torch.tensor([[1, 5, 9, 4]])
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert model.config.num_experts_per_tok == 2
    live = llama.load_merged(asked)
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "kind", "config"),
    [
        ("mixtral", "llama", {"tie_word_embeddings": True}),
        ("mixtral", "llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
        ("mixtral", "llama", {"rms_norm_eps": None, "max_position_embeddings": None}),
        ("mixtral", "mistral", {"sliding_window": None, "rope_theta": 1e6}),
        ("qwen3", "qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0,
            "rope_theta": 1e6}}),
    ],
)  # fmt: skip
def test_experts_that_are_the_base_compute_what_it_does(here, layout, kind, config) -> None:
    """Equal experts with weights that sum to 1 are one MLP: the mixture is the dense model."""
    import torch

    from fastmerge import llama

    models(here, kind, dtype="F32", tied="tie_word_embeddings" in config)
    file = Path("base/config.json")
    own = json.loads(file.read_text()) | config
    kept = {key: value for key, value in own.items() if value is not None or "window" in key}
    file.write_text(json.dumps(kept))
    experts = [{**each, "source_model": "base"} for each in EXPERTS]
    report = fastmerge.merge(recipe(architecture=layout, dtype="float32", experts=experts), "x")
    assert any("all experts are one model" in note for note in report.notes)
    tokens = torch.arange(1, 39)[None]
    with torch.no_grad():
        dense, mixed = (llama.load(p, dtype=torch.float32)(tokens).logits for p in ("base", "x"))
    torch.testing.assert_close(dense, mixed, rtol=1e-5, atol=1e-5)


def test_defaults_of_the_dense_classes_are_written_out() -> None:
    """A config that leaves out what Llama and Mixtral assume differently."""
    from transformers import AutoConfig

    from fastmerge.planning import moe
    from fastmerge.recipe.mixture import Mixture

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    for layout in moe.LAYOUTS:
        for kind in layout.sources if layout.kind != "deepseek" else ():
            shared = SHARED if layout.shared[0] else None
            mixture = Mixture(recipe(shared))
            dense = {"model_type": kind, "num_hidden_layers": 2, **sizes}
            made = moe.mixed_config(layout, mixture, dense)
            one = AutoConfig.for_model(**dense).to_dict()
            two = AutoConfig.for_model(**made).to_dict()
            for key in (
                "num_key_value_heads", "rms_norm_eps", "max_position_embeddings",
                "rope_parameters", "hidden_act", "tie_word_embeddings", "hidden_size",
            ):  # fmt: skip
                assert one[key] == two[key], (layout.name, kind, key)
            assert two.get("head_dim") in (one.get("head_dim"), None), (layout.name, kind)


def test_copies_are_byte_for_byte_and_the_rest_follows(here) -> None:
    models(here)
    plan = api.plan(recipe())
    assert plan.methods == {"copy": 15 + 12, "router (cheap_embed)": 2}
    fastmerge.merge(recipe(), "out")
    card = Path("out/README.md").read_text()
    assert "router (cheap\\_embed): 2 tensors" in card or "router (cheap_embed): 2 tensors" in card
    assert (Path("out") / "tokenizer.json").exists()
    again = fastmerge.merge("out/fastmerge_recipe.yml", "twice")
    assert again.tensors == 29
    found = api.verify("out", recipe(), sample=None)
    assert not found.differences and len(found.recomputed) == 29
    assert Path("out/model.safetensors").stat().st_size > 0
    one, two = here.read(Path("out")), here.read(Path("twice"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_experts_may_be_documents(here) -> None:
    """An expert that another document of the recipe merges."""
    models(here, dtype="F32")
    merge = {
        "name": "mean", "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in "ab"],
    }  # fmt: skip
    experts = [EXPERTS[0], {**EXPERTS[1], "source_model": "mean"}]
    fastmerge.merge([merge, recipe(dtype="float32") | {"experts": experts}], "out")
    out, a, b = (here.read(Path(name)) for name in ("out", "a", "b"))
    name = "model.layers.1.mlp.down_proj.weight"
    found = out["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    np.testing.assert_allclose(found, (a[name] + b[name]) / 2, rtol=1e-6)


def test_experts_in_fp8_are_the_numbers_of_their_codes(here) -> None:
    models(here)
    formats = Formats(here)
    formats.fp8("x", Path("b"))
    experts = [EXPERTS[0], {**EXPERTS[1], "source_model": "x"}]
    report = fastmerge.merge(recipe(dtype="float32", experts=experts), "out")
    assert any("'x' is fp8" in note for note in report.notes)
    found = here.read(Path("out"))["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    assert np.array_equal(found, formats.numbers["x"]["model.layers.1.mlp.up_proj.weight"])


def test_experts_with_adapters_are_folded(here) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    models(here, dtype="F32")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained("b", dtype=torch.float32)
    asked = LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, asked)
    adapted.save_pretrained("lora")
    adapted.merge_and_unload().save_pretrained("folded")
    for source in ("b+lora", "folded"):
        changed = {"source_model": source, "residual_scale": 0.5, "noise_scale": 0.01}
        experts = [EXPERTS[0], {**EXPERTS[1], **changed}]
        fastmerge.merge(recipe(dtype="float32", experts=experts, seed=1), f"with-{source}")
    ours, theirs = here.read(Path("with-b+lora")), here.read(Path("with-folded"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=1e-5, atol=1e-7, err_msg=name)
    with pytest.raises(FastmergeError, match=r"'base\+lora' lies in no folder as it is"):
        api.plan(recipe(base_model="base+lora", gate_mode="hidden"))


# What there is of each type in a config, besides sizes.
SPARSE = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "decoder_sparse_step": 2},
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", SPARSE)
def test_mixtures_are_merged_and_stacked(kind: str) -> None:
    """Routers and experts as any tensors, and the result loads: linear, TIES, layers left out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastmerge import llama

    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 40, "num_experts_per_tok": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes, **SPARSE[kind])
    for name in "xy":
        torch.manual_seed(ord(name))
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(name)
    two = [{"model": name, "parameters": {"weight": 1, "density": 0.5}} for name in "xy"]
    cut = [{"sources": [{"model": "x", "layer_range": part}]} for part in ([0, 2], [3, 4])]
    recipes = [
        {"merge_method": "linear", "models": [{**m, "parameters": {"weight": 1}} for m in two]},
        {"merge_method": "ties", "base_model": "x", "models": two[1:]},
        {"merge_method": "passthrough", "slices": cut},
    ]
    for asked in recipes:
        fastmerge.merge(asked, "out", check=True, overwrite=True)
        model = llama.load("out")
        assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape[1] > 2
    written = json.loads(Path("out/config.json").read_text())
    if kind == "qwen3_moe":  # of the layers 0, 1 and 3 the first has no experts
        assert (written["decoder_sparse_step"], written["mlp_only_layers"]) == (1, [0])


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0), capsys.readouterr().err


def test_commands(here, capsys) -> None:
    models(here)
    Path("r.yml").write_text(yaml.safe_dump(recipe()))
    assert run(capsys, "moe", "r.yml", "one", "--threads", "2")[0] == 0
    words = "--load-in-4bit --low-cpu-memory --no-cuda -j 2 --trust-remote-code"
    code, told = run(capsys, "mergekit-moe", "r.yml", "two", *words.split())
    assert code == 0
    (note,) = [line for line in told.splitlines() if "without effect here" in line]
    assert "--load-in-4bit" in note and "--low-cpu-memory" in note and "8bit" not in note
    assert Path("two/mergekit_moe_config.yml").exists()
    assert run(capsys, "merge", "r.yml", "three", "--json")[0] == 0
    files = [Path(name, "model.safetensors") for name in ("one", "two", "three")]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    assert run(capsys, "plan", "r.yml", "--check")[0] == 0
    alike = recipe() | {"experts": [{**each, "source_model": "a"} for each in EXPERTS]}
    Path("alike.yml").write_text(yaml.safe_dump(alike))
    code, told = run(capsys, "mergekit-moe", "alike.yml", "four")
    assert code == 2 and "all experts are one model" in told
    flag = "--i-understand-this-is-not-useful-without-training"
    assert run(capsys, "mergekit-moe", "alike.yml", "four", flag)[0] == 0
    Path("no.yml").write_text("merge_method: passthrough\nmodels: [{model: a}]\n")
    code, told = run(capsys, "moe", "no.yml", "five")
    assert code == 2 and "it has no 'experts:'; run `fastmerge merge`" in " ".join(told.split())
