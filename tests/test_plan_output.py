"""Plans: seeds, types, tied embeddings, notes, the key, and where models are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastmerge.dtypes import BF16, F16, F32
from fastmerge.planning.plan import passes
from fastmerge.planning.planner import make_plan
from fastmerge.tree.nodes import Merge
from fastmerge.tree.nodes import Stored as Source

RECIPES = {file.stem: file.read_text() for file in Path(__file__).parent.glob("recipes/*.yml")}
LINEAR_AB = """
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
"""


def only(plan, part: str):
    """The one tensor whose name contains ``part``."""
    (found,) = [tensor for tensor in plan.tensors if part in tensor.name]
    return found


def root(plan, part: str) -> Merge:
    node = only(plan, part).root
    assert isinstance(node, Merge)
    return node


# ---------------------------------------------------------------- seeds


@pytest.mark.usefixtures("family")
def test_a_seed_is_derived_from_the_recipe_and_told():
    one, two = make_plan(RECIPES["dare"]), make_plan(RECIPES["dare"])
    other = make_plan(RECIPES["dare"].replace("0.53", "0.25"))
    assert one.seed_derived and one.seed == two.seed != other.seed
    assert root(one, "lm_head").seed == one.seed
    assert one.describe()["seed"] == one.seed


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("argument, expected", [(None, 7), (9, 9), (0, 0)])
def test_a_given_seed_is_used(argument, expected):
    plan = make_plan(RECIPES["dare"] + "seed: 7\n", seed=argument)
    assert (plan.seed, plan.seed_derived) == (expected, False)
    assert {tensor.root.seed for tensor in plan.tensors} == {expected}


@pytest.mark.usefixtures("family")
def test_methods_that_draw_nothing_have_no_seed():
    plan = make_plan(RECIPES["ties_gradients"], seed=3)
    assert plan.seed is None and root(plan, "lm_head").seed is None


@pytest.mark.usefixtures("family")
def test_stages_draw_apart():
    """With one seed for both, the same entries of the same tensor would be dropped twice."""
    stage = RECIPES["dare"].replace("dtype: bfloat16", "name: stage")
    final = RECIPES["dare"].replace("model: chat", "model: stage") + "seed: 5\n"
    node = root(make_plan(stage + "---\n" + final), "lm_head")
    inner = node.operands[1]
    assert node.seed == 5 and inner.seed not in (5, None)
    assert root(make_plan(stage + "---\n" + final), "lm_head").operands[1].seed == inner.seed
    own = make_plan(stage + "seed: 11\n---\n" + final)
    assert root(own, "lm_head").operands[1].seed == 11


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    "a, b, lines, expected",
    [
        ("BF16", "BF16", "", BF16),
        ("BF16", "F16", "", F32),
        ("F16", "F32", "", F32),
        ("BF16", "F32", "dtype: float16", F16),
        ("BF16", "BF16", "dtype: float32\nout_dtype: bfloat16", BF16),
    ],
)
def test_output_dtype(a, b, lines, expected, zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    base = zoo.base("a", dtype=a)
    zoo.tune(base, "b", dtype=b)
    plan = make_plan(f"{LINEAR_AB}{lines}\n")
    assert {tensor.dtype for tensor in plan.tensors} == {expected}
    assert plan.config["torch_dtype"] == expected.name and "dtype" not in plan.config


def test_the_configs_own_key_is_kept(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    folder = zoo.base("a")
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")
    (folder / "config.json").write_text(json.dumps(config))
    plan = make_plan("merge_method: passthrough\nmodels: [{model: a}]\ndtype: float32\n")
    assert plan.config == config | {"dtype": "float32"}
    # A cast is computed, not copied.
    assert plan.methods == {"passthrough": len(plan.tensors)}


def test_integers_are_copied_when_equal(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    raw = {"w": ("BF16", np.zeros(4, np.uint16)), "ids": ("I64", np.arange(5))}
    for name in "ab":
        zoo.raw(name, raw)
    plan = make_plan(LINEAR_AB + "dtype: float16\n")
    assert only(plan, "ids").root == Source(0, "ids") and only(plan, "ids").dtype.code == "I64"
    assert only(plan, "w").dtype == F16


# ---------------------------------------------------------------- tied embeddings


def tie(folder, value):
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings")
    if value is not None:
        config |= value if isinstance(value, dict) else {"tie_word_embeddings": value}
    (folder / "config.json").write_text(json.dumps(config))


def heads(plan):
    return [tensor for tensor in plan.tensors if tensor.name == "lm_head.weight"]


def test_tied_models_stay_without_a_head(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    zoo.tune(zoo.base("a", tied=True), "b")
    plan = make_plan(LINEAR_AB)
    assert not heads(plan) and plan.notes == ()


@pytest.mark.parametrize("value", [True, {"model_type": "gemma2"}])
def test_a_head_that_transformers_would_ignore_is_not_written(value, zoo, monkeypatch):
    """It is the embeddings, stored twice; one with other values is real (test_heads.py)."""
    monkeypatch.chdir(zoo.root)
    for name, folder in (("a", zoo.base("a")), ("b", zoo.base("b", seed=1))):
        tensors = zoo.read(folder)
        config = json.loads((folder / "config.json").read_text())
        zoo.write(name, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, config)
        tie(zoo.root / name, value)
    plan = make_plan(LINEAR_AB)
    assert not heads(plan)
    assert plan.notes == ("lm_head.weight is not written: the config ties it to the embeddings",)


def test_llamas_are_untied_by_default(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    zoo.tune(zoo.base("a"), "b")
    for name in "ab":
        tie(zoo.root / name, None)
    assert heads(make_plan(LINEAR_AB))


def test_an_untied_models_head_unties_the_output_and_is_told(zoo, monkeypatch):
    """As mergekit does: a head that one model has of its own must not be lost."""
    monkeypatch.chdir(zoo.root)
    zoo.base("a", tied=True)
    zoo.base("b", seed=3)
    plan = make_plan(LINEAR_AB)
    (head,) = heads(plan)
    assert head.root.operands == (
        Source(0, "model.embed_tokens.weight"),
        Source(1, "lm_head.weight"),
    )
    assert plan.config["tie_word_embeddings"] is False
    assert "the output has a head of its own" in plan.notes[0]


def test_what_transformers_computes_is_not_merged(zoo, monkeypatch):
    """Old checkpoints hold the rotary frequencies; new ones of the same model do not."""
    monkeypatch.chdir(zoo.root)
    tensors = zoo.read(zoo.base("a"))
    config = json.loads((zoo.root / "a" / "config.json").read_text())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    zoo.write("b", {**tensors, name: np.ones(4)}, config)
    plan = make_plan(LINEAR_AB)
    assert name not in {tensor.name for tensor in plan.tensors}
    assert "inv_freq is not written" in plan.notes[0]


def test_a_donor_without_a_config_is_told(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    zoo.tune(zoo.base("a"), "b")
    (zoo.root / "a" / "config.json").unlink()
    assert any("'a' has no config.json" in note for note in make_plan(LINEAR_AB).notes)


def test_a_model_named_by_its_file_has_the_config_beside_it(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    zoo.tune(zoo.base("a", layers=4), "b")
    one, two = "a/model.safetensors", "b/model.safetensors"
    plan = make_plan(
        "merge_method: passthrough\nslices:\n"
        f"  - sources: [{{model: {one}, layer_range: [0, 3]}}]\n"
        f"  - sources: [{{model: {two}, layer_range: [1, 4]}}]\n"
    )
    assert plan.config["num_hidden_layers"] == 6


def test_a_tied_models_embeddings_stand_in_for_its_head(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    zoo.base("a")
    zoo.base("b", tied=True)
    plan = make_plan(
        LINEAR_AB.replace("weight: 1", "weight: [{filter: lm_head, value: 3}, {value: 1}]")
    )
    (head,) = heads(plan)
    assert head.root.operands == (
        Source(0, "lm_head.weight"),
        Source(1, "model.embed_tokens.weight"),
    )
    # It is the head by name, whatever it is made of.
    assert [values["weight"] for values in head.root.operand_values] == [3, 3]
    assert "stand in for its lm_head" in plan.notes[0]


# ---------------------------------------------------------------- notes, key, description


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize(
    "recipe, note",
    [
        ({"parameters": {"t": 1, "density": 0.5}}, "'density' has no effect with slerp"),
        ({"parameters": {"t": 1, "gamma": 0.5}}, "'gamma' has no effect with slerp"),
        (
            {"models": [{"model": "blur"}, {"model": "chat", "parameters": {"t": 0.1}}]},
            "recipe.models[1].parameters.t: 't' has no effect under a single model",
        ),
        (
            {"parameters": {"t": [{"filter": "self_atn", "value": 1}, {"value": 0}]}},
            "recipe.parameters.t[0].value: filter 'self_atn' matches no tensor",
        ),
        ({"tokenizer_source": "base"}, "nothing beside the weights of 'blur' has a name that"),
    ],
)
def test_notes(recipe, note):
    plain = {
        "merge_method": "slerp",
        "base_model": "blur",
        "models": [{"model": "blur"}, {"model": "chat"}],
        "parameters": {"t": 0.5},
    }
    assert make_plan(plain).notes == ()
    (found,) = make_plan(plain | recipe).notes
    assert note in found


@pytest.mark.usefixtures("family")
def test_parameters_of_the_base_have_no_effect_and_that_is_told():
    text = RECIPES["dare"].replace("- model: blur", "- {model: blur, parameters: {weight: 1}}")
    assert "base model's own parameters have no effect" in make_plan(text).notes[0]


@pytest.mark.usefixtures("family")
def test_int8_mask_is_silently_fine():
    assert make_plan(RECIPES["slerp_base_last"].replace("{t:", "{int8_mask: true, t:")).notes == ()


@pytest.mark.usefixtures("family")
def test_key_follows_what_decides_the_bytes():
    text = RECIPES["dare"] + "seed: 1\n"
    key = make_plan(text).key
    assert key == make_plan(text).key
    assert key == make_plan("# a comment\n" + text).key
    changes = [
        ("0.53", "0.54"),
        ("seed: 1", "seed: 2"),
        ("bfloat16", "float16"),
        ("dare_ties", "dare_linear"),
        ("model: chat", "model: math"),
        ("int8_mask: true", "lambda: 2"),
        ("int8_mask: true", "normalize: true"),
    ]
    assert (
        len({key, *(make_plan(text.replace(*change)).key for change in changes)})
        == len(changes) + 1
    )


def test_key_follows_the_weights(family):
    key = make_plan(RECIPES["chain"]).key
    folder = family.root / "chat"
    family.write(
        "chat", family.read(family.root / "math"), json.loads((folder / "config.json").read_text())
    )
    assert make_plan(RECIPES["chain"]).key != key


@pytest.mark.usefixtures("family")
def test_describe_is_plain():
    plan = make_plan(RECIPES["ties_gradients"])
    found = plan.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["tensors"] == len(plan.tensors) == 8 * 9 + 3
    assert found["methods"] == {"ties": len(plan.tensors)}
    assert found["bytes_in"] == 4 * found["bytes_out"] == 8 * found["parameters"]
    assert found["passes"] == 2
    assert [model["reference"] for model in found["models"]] == ["blur", "dolphin", "chat", "math"]


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize(
    "method, expected",
    [("linear", 1), ("karcher", 2), ("task_arithmetic", 1), ("ties", 1), ("dare_ties", 1)],
)
def test_passes(method, expected):
    """Without trimming or dropping, a consensus needs one pass."""
    recipe = {
        "merge_method": method,
        "base_model": "blur",
        "models": [{"model": "chat"}, {"model": "math"}],
        "parameters": {"weight": 1},
    }
    assert {passes(tensor) for tensor in make_plan(recipe).tensors} == {expected}


# ---------------------------------------------------------------- where models are


def test_relative_paths_start_at_the_given_folder(zoo):
    zoo.base("a")
    plan = make_plan("merge_method: passthrough\nmodels: [{model: ./a}]\n", base_folder=zoo.root)
    assert plan.donor == zoo.root / "a" and plan.references == ("./a",)


def test_two_ways_to_write_a_path_are_one_model(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    zoo.tune(zoo.base("a"), "b")
    recipe = {
        "merge_method": "slerp",
        "base_model": zoo.root / "a",
        "models": [{"model": "./a"}, {"model": "b"}],
        "parameters": {"t": 1},
    }
    plan = make_plan(recipe)
    assert plan.references == (f"{zoo.root}/a", "b") and len(root(plan, "lm_head").operands) == 2


def test_references_go_through_resolve(zoo):
    zoo.base("a")
    asked = []

    def resolve(reference):
        asked.append(reference)
        return zoo.root / "a"

    make_plan("merge_method: passthrough\nmodels: [{model: org/name@v1}]\n", resolve=resolve)
    assert asked == ["org/name@v1"]


def test_a_single_file_is_a_model(zoo):
    folder = zoo.base("a")
    text = f"merge_method: passthrough\nmodels: [{{model: {folder / 'model.safetensors'}}}]\n"
    assert len(make_plan(text).tensors) == 21
