"""Whether an output has a head of its own, by what the models hold."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastmerge.models.architecture import find_embedding, find_head
from fastmerge.models.config import says_tied
from fastmerge.planning.planner import make_plan
from fastmerge.tree.nodes import Stored

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def pair(zoo, change, *, rename=lambda name: name, tied=False):
    """Two models with real heads whose configs are ``change``d (None removes a key)."""
    for name, seed in (("a", 0), ("b", 1)):
        tensors = zoo.read(zoo.base(name, seed=seed))
        config = json.loads((zoo.root / name / "config.json").read_text())
        config = {k: v for k, v in (config | change).items() if v is not None}
        if tied:
            tensors[HEAD] = tensors[EMBEDDING]
        zoo.write(name, {rename(n): x for n, x in tensors.items()}, config)
    return {
        "merge_method": "linear",
        "models": [
            {"model": str(zoo.root / name), "parameters": {"weight": 1}} for name in ("a", "b")
        ],
    }


def named(plan, name):
    return next((tensor for tensor in plan.tensors if tensor.name == name), None)


SILENT = {"tie_word_embeddings": None}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tie_word_embeddings": True}, False),
        (SILENT | {"model_type": "gemma2"}, False),
        (SILENT | {"model_type": "mistral3"}, False),
        (SILENT | {"model_type": "nobody_knows"}, False),
        (SILENT | {"model_type": "falcon_h1"}, None),  # untied by default
        (SILENT | {"model_type": "cohere_compass"}, None),
        ({"tie_word_embeddings": False, "model_type": "gemma2"}, False),
    ],
)
def test_a_real_head_stays_and_the_output_says_so(change, says, zoo):
    plan = make_plan(pair(zoo, change))
    assert named(plan, HEAD).root.operands == (Stored(0, HEAD), Stored(1, HEAD))
    assert plan.config.get("tie_word_embeddings") is says


def test_a_real_head_in_a_multimodal_nest(zoo):
    text = {"model_type": "mistral", "num_hidden_layers": 2, "tie_word_embeddings": True}
    recipe = pair(
        zoo,
        SILENT | {"model_type": "mistral3", "num_hidden_layers": None, "text_config": text},
        rename=lambda name: f"language_model.{name}",
    )
    plan = make_plan(recipe)
    assert named(plan, "language_model.lm_head.weight") is not None
    assert plan.config["tie_word_embeddings"] is False
    assert plan.config["text_config"]["tie_word_embeddings"] is False


def test_a_head_that_is_the_embeddings_is_kept_where_nobody_knows_of_ties(zoo):
    plan = make_plan(pair(zoo, SILENT | {"model_type": "nobody_knows"}, tied=True))
    assert named(plan, HEAD) is not None and "tie_word_embeddings" not in plan.config


def test_one_real_head_among_tied_ones_is_not_lost(zoo):
    recipe = pair(zoo, {"tie_word_embeddings": True})
    tensors = zoo.read(zoo.root / "a")
    config = json.loads((zoo.root / "a" / "config.json").read_text())
    zoo.write("a", {n: x for n, x in tensors.items() if n != HEAD}, config)
    plan = make_plan(recipe)
    assert named(plan, HEAD).root.operands == (Stored(0, EMBEDDING), Stored(1, HEAD))
    assert plan.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "head, embedding",
    [
        ("lm_head.weight", "model.language_model.embed_tokens.weight"),
        ("lm_head.weight", "transformer.wte.weight"),
        ("lm_head.weight", "backbone.embeddings.weight"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
        ("lm_head.weight", "transformer.word_embeddings.weight"),
        ("output_projection.weight", "model.decoder.embed_tokens.weight"),
        ("decoder.weight", "model.embeddings.tok_embeddings.weight"),
        ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
    ],
)
def test_names_of_heads_and_embeddings(head, embedding):
    shapes = {
        "vision_tower.embeddings.weight": (9, 4),
        embedding: (40, 8),
        "model.layers.0.embed_tokens.weight": (40, 8),
        "mtp.lm_head.weight": (40, 8),
        head: (40, 8),
    }
    assert (find_head(shapes), find_embedding(shapes)) == (head, embedding)


def test_transformers_classes_say_what_the_tables_say():
    """Every model type that the installed transformers has."""
    transformers = pytest.importorskip("transformers")
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    from fastmerge.models.families import MIXED_LAYERS

    transformers.logging.set_verbosity_error()
    for kind in CONFIG_MAPPING_NAMES:
        known = CONFIG_MAPPING[kind]
        try:
            config = known()
        except (
            ValueError,
            StrictDataclassError,
        ):  # two types have no defaults
            config = known
        assert says_tied({"model_type": kind}) == getattr(config, "tie_word_embeddings", None), kind
        try:
            text = config if config is known else config.get_text_config()
        except ValueError:  # it has several
            text = config
        kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
        mixed = isinstance(kinds, list) and len(set(kinds)) > 1
        assert (kind in MIXED_LAYERS) == mixed, kind


def test_the_head_is_compared_in_blocks(zoo, monkeypatch):
    from fastmerge.models import model

    monkeypatch.setattr(model, "_BLOCK_BYTES", 64)
    recipe = pair(zoo, {"tie_word_embeddings": True}, tied=True)
    tensors = zoo.read(zoo.root / "b")
    config = json.loads((zoo.root / "b" / "config.json").read_text())
    last = tensors[HEAD].copy()
    last[-1, -1] += 1
    assert named(make_plan(recipe), HEAD) is None
    zoo.write("b", {**tensors, HEAD: last}, config)
    assert named(make_plan(recipe), HEAD) is not None
    assert np.array_equal(tensors[HEAD][:-1], last[:-1])


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_a_tie_of_null_is_written_out(zoo, kind):
    base = zoo.base("a")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": kind, "tie_word_embeddings": None}
    tensors = zoo.read(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for name in "ab":
        zoo.write(name, tensors, config)
    entries = [{"model": str(zoo.root / n), "parameters": {"weight": 1}} for n in "ab"]
    plan = make_plan({"merge_method": "linear", "models": entries})
    assert plan.config["tie_word_embeddings"] is (kind == "gemma")
    assert any(item.name == "lm_head.weight" for item in plan.tensors) is (kind == "llama")


@pytest.mark.parametrize("code, other", [("F16", np.float16), ("F64", np.float64)])
def test_a_tied_head_in_another_type_is_the_embeddings(code, other, zoo):
    """Stored narrower, the same numbers are one tensor; one that differs is real."""
    recipe = pair(zoo, {"tie_word_embeddings": True}, tied=True)

    def write(change):
        for name in ("a", "b"):
            folder = zoo.root / name
            tensors = {n: ("F32", x.astype(np.float32)) for n, x in zoo.read(folder).items()}
            rounded = tensors[EMBEDDING][1].astype(np.float16)
            head = rounded.astype(other)
            head[-1, -1] += change
            tensors |= {EMBEDDING: ("F32", rounded.astype(np.float32)), HEAD: (code, head)}
            zoo.raw(name, tensors, json.loads((folder / "config.json").read_text()))

    write(0)
    assert named(make_plan(recipe), HEAD) is None
    write(1)
    assert named(make_plan(recipe), HEAD) is not None
