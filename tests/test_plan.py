"""Plans: what every output tensor is made of, against mergekit's own planner and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastmerge.algebra import Merge, Source, leaves
from fastmerge.dtypes import BF16, F16, F32
from fastmerge.methods import METHODS
from fastmerge.plan import make_plan, passes
from fastmerge.recipe import interpolate

LAYERS = 8
LINEAR_AB = """
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
"""

# Recipes shaped like those on model cards; the last ones try every level of precedence.
SLERP_LAZY = """
slices:
  - sources:
      - model: blur
        layer_range: [0, 8]
      - model: dolphin
        layer_range: [0, 8]
merge_method: slerp
base_model: blur
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""
TIES_GRADIENTS = """
models:
  - model: blur
  - model: dolphin
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: chat
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: math
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: blur
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
DARE = """
models:
  - model: blur
  - model: dolphin
    parameters: {density: 0.53, weight: 0.4}
  - model: chat
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: blur
parameters: {int8_mask: true}
dtype: bfloat16
"""
FRANKEN = """
slices:
  - sources: [{model: blur, layer_range: [0, 6]}]
  - sources: [{model: dolphin, layer_range: [2, 8]}]
merge_method: passthrough
dtype: bfloat16
"""
APPENDED_BASE = """
models:
  - model: dolphin
    parameters: {weight: '1e-1', density: 0.9}
  - model: chat
merge_method: ties
base_model: blur
parameters:
  weight: [{filter: down_proj, value: [2, 3]}, {value: 1}]
  lambda: [{filter: norm, value: 0.25}, {filter: layers.1, value: [1, 2]}]
  density: 0.25
"""
LEVELS = """
slices:
  - sources:
      - {model: blur, layer_range: [0, 1]}
      - {model: dolphin, layer_range: [3, 4], parameters: {weight: [{filter: mlp, value: 7}]}}
    parameters: {weight: [{filter: layers.3.self_attn, value: [1, 9]}]}
  - sources:
      - {model: dolphin, layer_range: [1, 5], parameters: {density: 0.5}}
      - {model: blur, layer_range: [4, 8]}
    base_model: blur
    parameters: {normalize: [true, false], weight: [5, 6]}
merge_method: ties
base_model: blur
parameters: {weight: 3, density: [0.1, 0.2, 0.9], normalize: true}
"""
LINEAR_WITH_BASE = """
models:
  - {model: dolphin, parameters: {weight: 0.3}}
  - {model: chat, parameters: {weight: [0.1, 0.9]}}
merge_method: linear
base_model: blur
parameters: {weight: [{filter: embed, value: [3, 4]}, {value: 0.5}]}
"""
SLERP_BASE_LAST = """
models: [{model: dolphin}, {model: blur}]
merge_method: slerp
base_model: blur
parameters: {t: [0.1, 0.9]}
"""
NUSLERP = """
models:
  - {model: chat, parameters: {weight: 1}}
  - {model: blur}
  - {model: dolphin, parameters: {weight: [1, 2]}}
merge_method: nuslerp
base_model: blur
parameters: {nuslerp_row_wise: true, nuslerp_flatten: {filter: mlp, value: false}}
"""
PARITY = {
    "slerp-lazy": SLERP_LAZY,
    "ties-gradients": TIES_GRADIENTS,
    "dare": DARE,
    "franken": FRANKEN,
    "appended-base": APPENDED_BASE,
    "levels": LEVELS,
    "linear-with-base": LINEAR_WITH_BASE,
    "slerp-base-last": SLERP_BASE_LAST,
    "nuslerp": NUSLERP,
}


@pytest.fixture
def models(zoo, monkeypatch):
    """Four llamas of eight layers that the recipes' names find in the working directory."""
    base = zoo.base("blur", layers=LAYERS)
    for seed, name in enumerate(["dolphin", "chat", "math"]):
        zoo.tune(base, name, seed=seed)
    monkeypatch.chdir(zoo.root)
    return zoo


def described(plan) -> dict:
    """Output tensor -> (method, {model: (tensor there, its parameters)}, shared parameters)."""

    def place(node):
        assert isinstance(node, Source)
        return plan.references[node.model], node.name

    found = {}
    for tensor in plan.tensors:
        node = tensor.root
        if isinstance(node, Source):  # as passthrough without a scale gives it
            node = Merge(METHODS["passthrough"], (node,), None, {}, ({"scale": None},))
        inputs = {}
        for operand, values in zip(node.operands, node.operand_values, strict=True):
            model, name = place(operand)
            inputs[model] = (name, dict(values))
        if node.base is not None:
            inputs[place(node.base)[0]] = (place(node.base)[1], {})
        found[tensor.name] = (node.method.name, inputs, dict(node.values))
    return found


def mergekit_described(text: str) -> dict:
    """The same from mergekit 0.1.5's planner."""
    import yaml
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions()
    LoaderCache().setup(options=options)
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(
        config,
        architecture,
        options=options,
        out_model_config=_model_out_config(config, architecture),
    )
    planner._plan()
    found = {}
    for weight, task in planner._tensors:
        infos = task.gather_tensors.weight_info
        inputs = {
            str(model): (infos[model].name, dict(task.input_parameters.get(model, {})))
            for model in task.model_order
        }
        found[weight.name] = (task.method_name, inputs, dict(task.parameters))
    return found


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("name", PARITY)
def test_every_value_is_mergekits(name):
    """Same inputs, same parameters, for every tensor; to the last bit of the double."""
    ours, theirs = described(make_plan(PARITY[name])), mergekit_described(PARITY[name])
    assert ours.keys() == theirs.keys()
    for tensor, (method, inputs, shared) in theirs.items():
        assert ours[tensor][0] == method
        assert ours[tensor][1].keys() == inputs.keys()
        for model, (place, values) in inputs.items():
            assert ours[tensor][1][model][0] == place, tensor
            assert ours[tensor][1][model][1] == values, (tensor, model)
        for key, value in ours[tensor][2].items():
            assert shared[key] == value, (tensor, key)


def test_gradients_are_mergekits_to_the_last_bit():
    from mergekit.config import evaluate_setting

    parameter = METHODS["slerp"].parameter("t")
    rng = np.random.default_rng(0)
    for _ in range(300):
        values = tuple(rng.normal(size=rng.integers(2, 7)).tolist())
        count = int(rng.integers(2, 40))
        t = int(rng.integers(count)) / (count - 1)
        theirs = evaluate_setting("x", list(values), t, validate=float)
        assert interpolate(values, t, parameter, "") == theirs


# ---------------------------------------------------------------- by hand


def only(plan, part: str):
    """The one tensor whose name contains ``part``."""
    (found,) = [tensor for tensor in plan.tensors if part in tensor.name]
    return found


def root(plan, part: str) -> Merge:
    node = only(plan, part).root
    assert isinstance(node, Merge)
    return node


@pytest.mark.usefixtures("models")
def test_the_curve_of_a_wild_slerp():
    plan = make_plan(SLERP_LAZY)
    # Layer 3 of 8: t = 3/7, 12/7 of the way along four intervals: between 0.5 and 0.3.
    between = (1 - 5 / 7) * 0.5 + 5 / 7 * 0.3
    assert root(plan, "layers.3.self_attn.q_proj").values == {
        "t": pytest.approx(between, abs=1e-15)
    }
    assert root(plan, "layers.0.mlp.up_proj").values == {"t": 1}
    assert root(plan, "layers.7.mlp.up_proj").values == {"t": 0}
    assert root(plan, "layers.7.input_layernorm").values == {"t": 0.5}
    node = root(plan, "embed_tokens")
    assert node.values == {"t": 0.5}
    assert [plan.references[leaf.model] for leaf in node.operands] == ["blur", "dolphin"]
    assert node.base is None
    assert plan.notes == () and plan.seed is None


@pytest.mark.usefixtures("models")
def test_a_gradient_outside_the_layers_gives_its_first_value():
    plan = make_plan(SLERP_BASE_LAST)
    for part in ("embed_tokens", "model.norm", "lm_head"):
        assert root(plan, part).values == {"t": 0.1}


def test_ties_keeps_the_base_apart(models):
    plan = make_plan(TIES_GRADIENTS)
    node = root(plan, "layers.7.mlp.down_proj")
    assert plan.references[node.base.model] == "blur"
    assert [plan.references[leaf.model] for leaf in node.operands] == ["dolphin", "chat", "math"]
    assert [values["density"] for values in node.operand_values] == [0.1, 0.5, 0.33]
    assert [values["weight"] for values in node.operand_values] == [1, 1, 0.5]
    assert only(plan, "layers.7.mlp.down_proj").dtype == F16
    assert plan.config["torch_dtype"] == "float16"
    assert plan.donor == models.root / "blur" or str(plan.donor) == "blur"


@pytest.mark.usefixtures("models")
def test_an_unlisted_base_comes_last():
    text = (
        "merge_method: linear\nbase_model: blur\nmodels: [{model: chat}]\nparameters: {weight: 1}\n"
    )
    plan = make_plan(text)
    operands = root(plan, "lm_head").operands
    assert [plan.references[leaf.model] for leaf in operands] == ["chat", "blur"]


@pytest.mark.usefixtures("models")
def test_equal_values_are_one_object():
    """36 000 tensors of three models need not hold 108 000 mappings."""
    plan = make_plan(DARE)
    roots = [tensor.root for tensor in plan.tensors]
    assert len({id(node.values) for node in roots}) == 1
    assert len({id(values) for node in roots for values in node.operand_values}) == 2


@pytest.mark.usefixtures("models")
def test_frankenmerge():
    plan = make_plan(FRANKEN)
    assert plan.config["num_hidden_layers"] == 12
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    assert len(by_name) == 12 * 9 + 3
    copied = by_name["model.layers.6.mlp.up_proj.weight"].root
    assert copied == Source(1, "model.layers.2.mlp.up_proj.weight")
    assert by_name["model.embed_tokens.weight"].root == Source(0, "model.embed_tokens.weight")
    assert by_name["lm_head.weight"].root == Source(1, "lm_head.weight")
    assert plan.methods == {"copy": len(by_name)}
    assert plan.bytes_in == plan.bytes_out
    order = [name for name in by_name if "input_layernorm" in name]
    assert order == [f"model.layers.{i}.input_layernorm.weight" for i in range(12)]


def test_stacking_takes_per_layer_lists_along(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    for name, kinds in (("a", "abcd"), ("b", "efgh")):
        folder = zoo.base(name, layers=4)
        config = json.loads((folder / "config.json").read_text()) | {"layer_types": list(kinds)}
        (folder / "config.json").write_text(json.dumps(config))
    plan = make_plan("""
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [2, 4]}]
""")
    assert plan.config["layer_types"] == list("abcgh")
    assert plan.config["num_hidden_layers"] == 5


@pytest.mark.parametrize(
    "settings, first, note",
    [
        ({"mlp_only_layers": [3]}, 1, "mlp_only_layers"),
        ({"mlp_only_layers": []}, 1, None),
        ({"mlp_only_layers": [3]}, 0, None),  # no layer has another number than before
        ({"max_window_layers": 2, "use_sliding_window": False}, 1, None),
        ({"max_window_layers": 2, "use_sliding_window": True}, 1, "max_window_layers"),
        ({"model_type": "gemma2"}, 1, "the pattern of sliding windows"),
        ({"model_type": "gemma2", "layer_types": ["x"] * 8}, 1, None),
    ],
)
def test_settings_by_layer_number_are_told(settings, first, note, models):
    file = models.root / "blur" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    source = {"model": "blur", "layer_range": [first, 8]}
    plan = make_plan({"merge_method": "passthrough", "slices": [{"sources": [source]}]})
    assert [n for n in plan.notes if "layer number" in n] == (
        [f"config.json: {note} goes by layer number, and layers were renumbered; check it"]
        if note
        else []
    )


@pytest.mark.usefixtures("models")
def test_layers_of_one_model_can_be_merged_with_each_other():
    text = """
merge_method: slerp
base_model: blur
slices:
  - sources:
      - {model: blur, layer_range: [4, 8]}
      - {model: blur, layer_range: [0, 4]}
parameters: {t: 0.5}
"""
    node = root(make_plan(text), "layers.1.mlp.up_proj")
    assert node.operands == tuple(Source(0, f"model.layers.{i}.mlp.up_proj.weight") for i in (5, 1))


def test_any_names_will_do_without_slices(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    tensors = {f"tower.blocks.{i}.w": np.ones((2, 2)) for i in range(3)} | {"odd": np.ones(3)}
    for name in "ab":
        zoo.write(name, tensors)
    plan = make_plan(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: "
        "{t: [0.2, 0.8]}\n"
    )
    found = [root(plan, name).values["t"] for name in ("blocks.0", "blocks.1", "blocks.2", "odd")]
    assert found == [0.2, 0.5, 0.8, 0.2]
    assert plan.config == {}


# ---------------------------------------------------------------- several documents

CHAIN = """
name: first
merge_method: slerp
base_model: blur
models: [{model: blur}, {model: dolphin}]
parameters: {t: 0.35}
dtype: bfloat16
---
name: second
merge_method: slerp
base_model: first
models: [{model: first}, {model: blur}]
parameters: {t: 0.6}
dtype: bfloat16
---
merge_method: slerp
base_model: second
models: [{model: second}, {model: chat}]
parameters: {t: 0.25}
dtype: bfloat16
"""


@pytest.mark.usefixtures("models")
def test_a_chain_is_one_tree():
    plan = make_plan(CHAIN)
    node = root(plan, "layers.2.mlp.up_proj")
    assert [plan.references[leaf.model] for leaf in leaves([node])] == ["blur", "dolphin", "chat"]
    second = node.operands[0]
    first = second.operands[0]
    assert [n.values["t"] for n in (node, second, first)] == [0.25, 0.6, 0.35]
    # One Gram pass and one combine pass over three sources, however long the chain.
    assert passes(only(plan, "layers.2.mlp.up_proj")) == 2
    assert plan.bytes_in == 3 * plan.bytes_out
    assert len(plan.notes) == 1 and "stay exact" in plan.notes[0]
    assert str(plan.donor).endswith("blur")


@pytest.mark.usefixtures("models")
def test_a_stage_used_twice_is_one_node():
    text = """
name: half
merge_method: linear
models: [{model: blur}, {model: chat}]
parameters: {weight: 1}
---
merge_method: ties
base_model: half
models:
  - {model: dolphin}
  - {model: again}
parameters: {weight: 1}
---
name: again
merge_method: passthrough
models: [{model: half, parameters: {scale: 2}}]
"""
    node = root(make_plan(text), "lm_head")
    assert node.operands[1].operands[0] is node.base


@pytest.mark.usefixtures("models")
def test_layers_stacked_in_one_document_can_be_sliced_in_the_next():
    text = (
        FRANKEN.replace("dtype: bfloat16", "name: tall")
        + """
---
merge_method: slerp
base_model: tall
slices:
  - sources:
      - {model: tall, layer_range: [4, 12]}
      - {model: chat, layer_range: [0, 8]}
parameters: {t: 0.5}
"""
    )
    plan = make_plan(text)
    assert plan.config["num_hidden_layers"] == 8
    node = root(plan, "layers.7.mlp.up_proj")
    assert [leaf.name for leaf in node.operands] == ["model.layers.7.mlp.up_proj.weight"] * 2
    assert [plan.references[leaf.model] for leaf in node.operands] == ["dolphin", "chat"]


# ---------------------------------------------------------------- seeds


@pytest.mark.usefixtures("models")
def test_a_seed_is_drawn_and_told():
    one, two = make_plan(DARE), make_plan(DARE)
    assert one.seed_drawn and one.seed != two.seed  # equal by chance once in 2^32
    assert root(one, "lm_head").seed == one.seed
    assert one.describe()["seed"] == one.seed


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("argument, expected", [(None, 7), (9, 9), (0, 0)])
def test_a_given_seed_is_used(argument, expected):
    plan = make_plan(DARE + "seed: 7\n", seed=argument)
    assert (plan.seed, plan.seed_drawn) == (expected, False)
    assert {tensor.root.seed for tensor in plan.tensors} == {expected}


@pytest.mark.usefixtures("models")
def test_methods_that_draw_nothing_have_no_seed():
    plan = make_plan(TIES_GRADIENTS, seed=3)
    assert plan.seed is None and root(plan, "lm_head").seed is None


@pytest.mark.usefixtures("models")
def test_stages_draw_apart():
    """With one seed for both, the same entries of the same tensor would be dropped twice."""
    stage = DARE.replace("dtype: bfloat16", "name: stage")
    final = DARE.replace("model: chat", "model: stage") + "seed: 5\n"
    node = root(make_plan(stage + "---" + final), "lm_head")
    inner = node.operands[1]
    assert node.seed == 5 and inner.seed not in (5, None)
    assert root(make_plan(stage + "---" + final), "lm_head").operands[1].seed == inner.seed
    own = make_plan(stage + "seed: 11\n---" + final)
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
    monkeypatch.chdir(zoo.root)
    zoo.tune(zoo.base("a"), "b")
    for name in "ab":
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


def test_an_untied_models_head_is_lost_on_a_tied_donor_and_told(zoo, monkeypatch):
    monkeypatch.chdir(zoo.root)
    zoo.base("a", tied=True)
    zoo.base("b", seed=3)
    plan = make_plan(LINEAR_AB)
    assert not heads(plan) and "the head that 'b' has of its own is lost" in plan.notes[0]


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


@pytest.mark.usefixtures("models")
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
        ({"tokenizer_source": "base"}, "the tokenizer of 'blur' is copied"),
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


@pytest.mark.usefixtures("models")
def test_parameters_of_the_base_have_no_effect_and_that_is_told():
    text = DARE.replace("- model: blur", "- {model: blur, parameters: {weight: 1}}")
    assert "base model's own parameters have no effect" in make_plan(text).notes[0]


@pytest.mark.usefixtures("models")
def test_int8_mask_is_silently_fine():
    assert make_plan(SLERP_BASE_LAST.replace("{t:", "{int8_mask: true, t:")).notes == ()


@pytest.mark.usefixtures("models")
def test_key_follows_what_decides_the_bytes():
    text = DARE + "seed: 1\n"
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


def test_key_follows_the_weights(models):
    key = make_plan(CHAIN).key
    folder = models.root / "chat"
    models.write(
        "chat", models.read(models.root / "math"), json.loads((folder / "config.json").read_text())
    )
    assert make_plan(CHAIN).key != key


@pytest.mark.usefixtures("models")
def test_describe_is_plain():
    plan = make_plan(TIES_GRADIENTS)
    found = plan.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["tensors"] == len(plan.tensors) == LAYERS * 9 + 3
    assert found["methods"] == {"ties": len(plan.tensors)}
    assert found["bytes_in"] == 4 * found["bytes_out"] == 8 * found["parameters"]
    assert found["passes"] == 2
    assert [model["reference"] for model in found["models"]] == ["blur", "dolphin", "chat", "math"]


@pytest.mark.usefixtures("models")
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
