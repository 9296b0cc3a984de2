"""Mixtures of experts: what is refused, and what is noted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastmerge
from fastmerge import FastmergeError, api
from tests.test_moe import EXPERTS, SHARED, models, recipe, write_tokenizer


@pytest.fixture
def here(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    return zoo


def with_b(**keys) -> dict:
    return {"experts": [EXPERTS[0], {"source_model": "b", **keys}]}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"gate_mode": "cheap_embd"}, "is unknown: 'cheap_embd'; did you mean 'cheap_embed'"),
        ({"experts": EXPERTS[:1]}, "a mixture needs two experts or more"),
        ({"experts_per_token": 3}, "3 experts per token of the 2 that there are"),
        ({"experts_per_token": 0}, "must be greater than or equal to 1"),
        (with_b(), "needs 'positive_prompts:' for expert 'b'"),
        (with_b(positive_prompts=[]), "needs 'positive_prompts:' for expert 'b'"),
        (with_b(positive_prompts="x"), "must be a list of prompts"),
        (with_b(model="b"), "unknown key 'model'; write 'source_model:'"),
        (with_b(noise_scale=-1), "must be greater than or equal to 0"),
        (with_b(residual_scale=1e39), "must be less than or equal to 3.4e"),
        ({"experts": None}, "'experts' is missing"),
        ({"experts": 3}, "'experts' must be a list"),
        ({"architecture": "mixtrl"}, "unknown architecture 'mixtrl'; did you mean 'mixtral'"),
        ({"architecture": "qwen"}, "Qwen MoE takes exactly one shared expert, not 0"),
        ({"architecture": "qwen3"}, "there is no layout for a mixture of 'llama' models"),
        ({"architecture": "qwen"}, "not 0; list a `source_model` under `shared_experts:`"),
        ({"architecture": "qwen3"}, r"qwen3\); try it without `architecture:`"),
        ({"shared_experts": SHARED * 2}, "Mixtral takes no shared expert, not 2"),
        ({"models": [{"model": "a"}]}, "'models' is not supported: a mixture of experts is no"),
        ({"dtype": "float31"}, "unknown dtype 'float31'"),
        ({"seed": -1}, "'seed' must be"),
        ({"gate_modee": "random"}, "unknown key 'gate_modee'; did you mean 'gate_mode'"),
    ],
)  # fmt: skip
def test_bad_recipes(here, keys: dict, expected: str) -> None:
    models(here)
    with pytest.raises(FastmergeError, match=expected) as raised:
        fastmerge.merge(recipe(**keys), "out")
    assert "\n" not in str(raised.value) and not Path("out").exists()


def change(zoo, name: str, of: str = "b", *, drop: str = "", resize: str = "", **config) -> None:
    """The model ``of`` again, without a tensor, with one of another shape or another config."""
    tensors = zoo.read(Path(of))
    own = json.loads(Path(of, "config.json").read_text()) | config
    tensors.pop(drop, None)
    if resize:
        tensors[resize] = tensors[resize][:, :-1]
    zoo.write(name, tensors, own)
    write_tokenizer(Path(name))


MLP = "model.layers.0.mlp."


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"drop": MLP + "up_proj.weight"}, f"'x' lacks tensor '{MLP}up_proj.weight'"),
        ({"resize": MLP + "down_proj.weight"}, r"is \[32, 47\] in 'x' but \[32, 48\] in the base"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "cut the same matrices into"),
        ({"model_type": "mistral"}, "one type, and 'base' is llama, 'x' is mistral"),
        ({"model_type": None}, "'x' has no config.json with a model_type"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised"),
        ({"num_hidden_layers": 1}, "has 1 layers, and the base model 'base' 2"),
    ],
)  # fmt: skip
def test_experts_that_differ(here, changed: dict, expected: str) -> None:
    models(here)
    change(here, "x", **changed)
    asked = recipe() | {"experts": [EXPERTS[0], {**EXPERTS[1], "source_model": "x"}]}
    with pytest.raises(FastmergeError, match=expected) as raised:
        fastmerge.merge(asked, "out")
    assert "\n" not in str(raised.value) and not Path("out").exists()


def test_bases_that_do_not_do(here) -> None:
    models(here, "qwen2")
    with pytest.raises(FastmergeError, match=r"no layout fits: Qwen MoE takes exactly one shared"):
        api.plan(recipe())
    tensors = here.read(Path("base"))
    config = json.loads(Path("base/config.json").read_text()) | {"model_type": "gemma2"}
    here.write("gemma", tensors, config)
    with pytest.raises(FastmergeError, match=r"a mixture of 'gemma2' models \(Mixtral"):
        api.plan(recipe(base_model="gemma"))
    here.write("biased", tensors, config | {"model_type": "llama"})
    experts = [{**each, "source_model": "biased"} for each in EXPERTS]
    with pytest.raises(FastmergeError, match=r"k_proj.bias', for which the Mixtral layout has no"):
        api.plan(recipe(base_model="biased") | {"experts": experts})
    for file in Path("base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FastmergeError, match="needs the base model's tokenizer"):
        api.plan(recipe(SHARED))
    api.plan(recipe(SHARED, gate_mode="random"))


def test_hidden_gates_need_a_model_that_runs(here) -> None:
    models(here)
    mean = {
        "name": "mean", "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in "ab"],
    }  # fmt: skip
    with pytest.raises(FastmergeError, match="'mean' lies in no folder as it is"):
        api.plan([mean, recipe(base_model="mean", gate_mode="hidden")])
    with pytest.raises(FastmergeError, match="has none that are stored as floats"):
        api.plan([mean, recipe(base_model="mean")])
    api.plan([mean, recipe(base_model="mean", gate_mode="random")])


def test_a_tokenizer_that_does_not_load(here) -> None:
    """Found while the mixture is written, which then is not there."""
    models(here)
    Path("base/tokenizer.json").write_text('{"version": "1.0", "model": {"type": "None"}}')
    with pytest.raises(FastmergeError, match="has no tokenizer that loads") as raised:
        fastmerge.merge(recipe(), "out")
    assert "\n" not in str(raised.value) and not Path("out").exists()


def test_notes(here) -> None:
    models(here, "mistral")
    change(here, "x", vocab_size=44)
    plan = api.plan(recipe(experts=[EXPERTS[0], {**EXPERTS[0], "source_model": "x"}]))
    told = " | ".join(plan.notes)
    assert "sliding_window 4096 of 'base' is not kept" in told
    assert "'x' has 44 tokens and the base model 40" in told
    assert "all experts have the same prompts" in told
    plan = api.plan(recipe(gate_mode="random", unknown_thing=1))
    told = " | ".join(plan.notes)
    assert "prompts have no effect with gate_mode random" in told
    assert "without effect, here as in mergekit: 'unknown_thing'" in told
    nobody = [{"source_model": m, "positive_prompts": []} for m in "ab"]
    plan = api.plan(recipe(experts=nobody, gate_mode="hidden"))
    assert "no prompts: routers of zeros, by which every expert counts alike" in plan.notes
