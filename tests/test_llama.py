"""Merged models in transformers: loaded from the folder, and straight from the recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastmerge
from fastmerge import llama
from fastmerge.engine import in_memory
from fastmerge.errors import FastmergeError

torch.set_num_threads(1)

WEIGHTED = (
    "[{{model: {a}, parameters: {{weight: 0.7}}}}, {{model: {b}, parameters: {{weight: 0.5}}}}]"
)
RECIPES = {
    "slerp": "merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.4}}\n"
    "models: [{{model: {a}}}, {{model: {b}}}]\n",
    "linear-float32": f"merge_method: linear\ndtype: float32\nmodels: {WEIGHTED}\n",
    "linear-float16": f"merge_method: linear\nout_dtype: float16\nmodels: {WEIGHTED}\n",
    "dare_ties": f"merge_method: dare_ties\nbase_model: {{a}}\nseed: 5\nmodels: {WEIGHTED}\n"
    "parameters: {{density: 0.5}}\n",
    "stacked": "merge_method: passthrough\nslices:\n"
    "  - sources: [{{model: {a}, layer_range: [0, 2]}}]\n"
    "  - sources: [{{model: {b}, layer_range: [1, 2]}}]\n",
}


def write_tokenizer(folder: Path) -> None:
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "red", "blue"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def recipes(zoo, request) -> dict[str, str]:
    """Recipes over a llama with a tokenizer and settings for generation, and its fine-tune."""
    a = zoo.base("a", tied=request.param, scale=0.3)
    b = zoo.tune(a, "b", size=0.05)
    write_tokenizer(a)
    (a / "generation_config.json").write_text(
        json.dumps({"max_new_tokens": 7, "bos_token_id": 1, "eos_token_id": 2, "do_sample": False})
    )
    return {name: text.format(a=a, b=b) for name, text in RECIPES.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_folder_and_memory_agree(tmp_path, recipes, name):
    """The same logits and the same generated tokens, bit for bit."""
    fastmerge.merge(recipes[name], tmp_path / "out")
    from_folder = llama.load(tmp_path / "out")
    from_recipe = llama.load_merged(recipes[name])
    prompt = torch.tensor([[1, 9, 4, 30]])
    with torch.no_grad():
        logits = from_folder(prompt).logits
        assert torch.equal(logits, from_recipe(prompt).logits)
        tokens = from_folder.generate(prompt)
        assert torch.equal(tokens, from_recipe.generate(prompt))
    assert torch.isfinite(logits).all() and logits.std() > 0
    assert 5 <= tokens.shape[1] <= 11  # the donor's max_new_tokens
    for model in (from_folder, from_recipe):
        assert isinstance(model, LlamaForCausalLM) and not model.training
        assert model.dtype == from_folder.dtype
    assert from_recipe.config.num_hidden_layers == (3 if name == "stacked" else 2)
    assert from_recipe.config.to_dict() | {"_name_or_path": ""} == from_folder.config.to_dict() | {
        "_name_or_path": ""
    }


def test_parameters_are_the_merge(recipes, zoo):
    """Against NumPy on the inputs, not against fastmerge's own writer."""
    model = llama.load_merged(recipes["linear-float32"])
    a, b = zoo.read(zoo.root / "a"), zoo.read(zoo.root / "b")
    found = dict(model.named_parameters())
    for name, x in a.items():
        expected = (0.7 * x.astype(np.float64) + 0.5 * b[name]) / 1.2
        got = found[name].detach().double().numpy()
        # Four roundings to float32 (two weights, sum, quotient), of terms that may cancel.
        assert (np.abs(got - expected) <= 2**-22 * (np.abs(x) + np.abs(b[name]))).all()
    assert found.keys() <= a.keys()


def test_merged_memory_is_the_models_memory(recipes, monkeypatch):
    """No second copy of the weights: every parameter lies where the engine wrote it."""
    arrays = []
    materialise = in_memory.materialise_plan

    def recorded(*args, **kwargs):
        for tensor, array in materialise(*args, **kwargs):
            arrays.append((array.ctypes.data, array.nbytes))
            yield tensor, array

    monkeypatch.setattr(in_memory, "materialise_plan", recorded)
    model = llama.load_merged(recipes["slerp"])
    places = {(p.data_ptr(), p.nbytes) for p in model.parameters()}
    assert places == set(arrays)


def test_tied_head_follows_embeddings(recipes):
    model = llama.load_merged(recipes["slerp"])
    head, embeddings = model.lm_head.weight, model.model.embed_tokens.weight
    assert (head.data_ptr() == embeddings.data_ptr()) == model.config.tie_word_embeddings


def test_another_dtype(recipes):
    assert llama.load_merged(recipes["slerp"], dtype=torch.float32).dtype == torch.float32


def test_seed_overrides_the_recipe(recipes):
    def weights(seed: int | None) -> torch.Tensor:
        return llama.load_merged(recipes["dare_ties"], seed=seed).model.layers[0].mlp.up_proj.weight

    assert torch.equal(weights(None), weights(5))
    assert not torch.equal(weights(6), weights(5))


def test_generation_config_is_the_donors(recipes):
    config = llama.load_merged(recipes["slerp"]).generation_config
    assert isinstance(config, GenerationConfig) and config.max_new_tokens == 7


def test_tokenizer(tmp_path, recipes):
    fastmerge.merge(recipes["slerp"], tmp_path / "out")
    text = "red blue <s> green"
    expected = [3, 4, 1, 0]
    assert llama.load_tokenizer(tmp_path / "out")(text)["input_ids"] == expected
    assert llama.load_tokenizer(recipes["slerp"])(text)["input_ids"] == expected


def test_missing_weight_is_refused(zoo):
    """transformers alone would fill it with random numbers and warn."""
    base = zoo.base()
    tensors = zoo.read(base)
    del tensors["model.norm.weight"]
    zoo.write("base", tensors, json.loads((base / "config.json").read_text()))
    with pytest.raises(FastmergeError, match=r"missing weight model\.norm\.weight"):
        llama.load(base)
    recipe = f"merge_method: passthrough\nmodels: [{{model: {base}}}]\n"
    with pytest.raises(FastmergeError, match=r"the merged model: missing weight model\.norm"):
        llama.load_merged(recipe)


def test_no_model(tmp_path):
    with pytest.raises(FastmergeError, match="no such folder"):
        llama.load(tmp_path / "nowhere")
    with pytest.raises(FastmergeError, match=r"no config\.json"):
        llama.load(tmp_path)


def test_unknown_architecture(zoo):
    base = zoo.base()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(FastmergeError, match=r"does not know .*'lama'"):
        llama.load_merged(f"merge_method: passthrough\nmodels: [{{model: {base}}}]\n")


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FastmergeError, match=r"pip install .*\[llama\]"):
        llama.load(tmp_path)


def test_models_named_by_their_files(recipes):
    files = (
        recipes["slerp"].replace("/a", "/a/model.safetensors").replace("/b", "/b/model.safetensors")
    )
    assert llama.load_merged(files).generation_config.max_new_tokens == 7
    assert llama.load_tokenizer(files)("red").input_ids == [3]
