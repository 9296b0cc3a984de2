"""config.json files as they are found: planned or refused in one line, and shown by ``info``."""

from __future__ import annotations

import json

import pytest

from fastmerge.errors import FastmergeError
from fastmerge.models.summary import summarise
from fastmerge.planning.planner import make_plan

NAMES = ("a", "b")

ODD = [
    *({"tie_word_embeddings": value} for value in ("false", "true", 0, None, [], "False")),
    *({"architectures": value} for value in (None, "LlamaForCausalLM", [], 5, [7])),
    *({"model_type": value} for value in (None, 7)),
    *({"text_config": value} for value in (None, [], {}, {"num_hidden_layers": 2})),
    *({"num_hidden_layers": value} for value in ("2", 2.0, None, True, -1)),
    *({"layer_types": value} for value in (None, "full_attention", ["x"], ["x"] * 9)),
    *({"num_attention_heads": value} for value in (None, 0, "4", [4, 4], -4)),
    *({"vocab_size": value} for value in (None, "40", 0)),
    {"initializer_range": float("nan")},
    {"x": 10**400},
    {"x": "\ud800"},
]


def models(zoo, change):
    for seed, name in enumerate(NAMES):
        folder = zoo.base(name, seed=seed)
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
    return [str(zoo.root / name) for name in NAMES]


@pytest.mark.parametrize("change", ODD, ids=lambda change: json.dumps(change)[:40])
@pytest.mark.parametrize("sliced", [False, True])
def test_odd_values_are_planned_or_refused_in_one_line(change, sliced, zoo):
    found = models(zoo, change)
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}}
    if sliced:
        sources = [{"model": model, "layer_range": [0, 2]} for model in found]
        recipe["slices"] = [{"sources": sources}]
    else:
        recipe["models"] = [{"model": model} for model in found]
    try:
        plan = make_plan(recipe)
    except FastmergeError:  # which is one line by itself
        return
    assert any(tensor.name == "lm_head.weight" for tensor in plan.tensors)


@pytest.mark.parametrize("change", ODD, ids=lambda change: json.dumps(change)[:40])
def test_odd_values_are_shown(change, zoo):
    folder = zoo.root / models(zoo, change)[0]
    if change == {"x": "\ud800"}:  # no text, which no output could hold
        with pytest.raises(FastmergeError, match="half of a surrogate pair"):
            summarise(folder)
        return
    found = summarise(folder)
    assert found.architecture in (None, "LlamaForCausalLM")
    assert found.tie_word_embeddings in (None, False) and found.has_lm_head


def test_a_nested_language_model_shows_its_sizes(zoo):
    text = {"num_hidden_layers": 2, "hidden_size": 32}
    (a, _) = models(zoo, {"hidden_size": None, "num_hidden_layers": None, "text_config": text})
    assert summarise(zoo.root / a).sizes == text
