"""Plans: what every output tensor is made of, against mergekit's own planner and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastmerge.dtypes import F16
from fastmerge.methods import METHODS
from fastmerge.planning.plan import passes
from fastmerge.planning.planner import make_plan
from fastmerge.recipe.settings import interpolate
from fastmerge.tree.nodes import Merge, leaves
from fastmerge.tree.nodes import Stored as Source

# Shaped like those on model cards; some try every level of precedence.
RECIPES = {file.stem: file.read_text() for file in Path(__file__).parent.glob("recipes/*.yml")}


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


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"chain"}))
def test_every_value_is_mergekits(name):
    """Same inputs, same parameters, for every tensor; to the last bit of the double."""
    ours, theirs = described(make_plan(RECIPES[name])), mergekit_described(RECIPES[name])
    assert ours.keys() == theirs.keys()
    for tensor, (method, inputs, shared) in theirs.items():
        assert ours[tensor][0] == method
        assert ours[tensor][1].keys() == inputs.keys()
        for model, (place, values) in inputs.items():
            assert ours[tensor][1][model][0] == place, tensor
            assert ours[tensor][1][model][1] == values, (tensor, model)
        for key, value in ours[tensor][2].items():
            # Which mergekit does not have; as here it defines the method.
            own = {"trim": "tensor", "ties": "mixed", "divisor": "weights", "votes": "weighted"}
            assert shared.get(key, own.get(key)) == value, (tensor, key)


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


@pytest.mark.usefixtures("family")
def test_the_curve_of_a_wild_slerp():
    plan = make_plan(RECIPES["slerp_lazy"])
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


@pytest.mark.usefixtures("family")
def test_a_gradient_outside_the_layers_gives_its_first_value():
    plan = make_plan(RECIPES["slerp_base_last"])
    for part in ("embed_tokens", "model.norm", "lm_head"):
        assert root(plan, part).values == {"t": 0.1}


def test_ties_keeps_the_base_apart(family):
    plan = make_plan(RECIPES["ties_gradients"])
    node = root(plan, "layers.7.mlp.down_proj")
    assert plan.references[node.base.model] == "blur"
    assert [plan.references[leaf.model] for leaf in node.operands] == ["dolphin", "chat", "math"]
    assert [values["density"] for values in node.operand_values] == [0.1, 0.5, 0.33]
    assert [values["weight"] for values in node.operand_values] == [1, 1, 0.5]
    assert only(plan, "layers.7.mlp.down_proj").dtype == F16
    assert plan.config["torch_dtype"] == "float16"
    assert plan.donor == family.root / "blur" or str(plan.donor) == "blur"


@pytest.mark.usefixtures("family")
def test_an_unlisted_base_comes_last():
    text = (
        "merge_method: linear\nbase_model: blur\nmodels: [{model: chat}]\nparameters: {weight: 1}\n"
    )
    plan = make_plan(text)
    operands = root(plan, "lm_head").operands
    assert [plan.references[leaf.model] for leaf in operands] == ["chat", "blur"]


@pytest.mark.usefixtures("family")
def test_equal_values_are_one_object():
    """36 000 tensors of three models need not hold 108 000 mappings."""
    plan = make_plan(RECIPES["dare"])
    roots = [tensor.root for tensor in plan.tensors]
    assert len({id(node.values) for node in roots}) == 1
    assert len({id(values) for node in roots for values in node.operand_values}) == 2


@pytest.mark.usefixtures("family")
def test_frankenmerge():
    plan = make_plan(RECIPES["franken"])
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
        ({"decoder_sparse_step": 2}, 1, "decoder_sparse_step"),
        ({"mlp_only_layers": []}, 1, None),
        ({"decoder_sparse_step": 2}, 0, None),  # no layer has another number than before
        ({"max_window_layers": 2, "use_sliding_window": False}, 1, None),
        ({"num_kv_shared_layers": 2}, 1, "num_kv_shared_layers"),
        ({"model_type": "gemma2"}, 1, "the default of layer_types"),
        ({"model_type": "gemma2", "layer_types": ["x"] * 8}, 1, None),
    ],
)
def test_settings_by_layer_number_are_told(settings, first, note, family):
    file = family.root / "blur" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    source = {"model": "blur", "layer_range": [first, 8]}
    plan = make_plan({"merge_method": "passthrough", "slices": [{"sources": [source]}]})
    assert [n for n in plan.notes if "layer number" in n] == (
        [f"config.json: {note} goes by layer number, and layers were renumbered; check it"]
        if note
        else []
    )


@pytest.mark.usefixtures("family")
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


@pytest.mark.usefixtures("family")
def test_a_chain_is_one_tree():
    plan = make_plan(RECIPES["chain"])
    node = root(plan, "layers.2.mlp.up_proj")
    assert [plan.references[leaf.model] for leaf in leaves([node])] == ["blur", "dolphin", "chat"]
    second = node.operands[0]
    first = second.operands[0]
    assert [n.values["t"] for n in (node, second, first)] == [0.25, 0.6, 0.35]
    # One Gram pass and one combine pass over three sources, however long the chain.
    assert passes(only(plan, "layers.2.mlp.up_proj")) == 2
    assert plan.bytes_in == 3 * plan.bytes_out
    assert len(plan.notes) == 1 and "are not rounded" in plan.notes[0]
    assert str(plan.donor).endswith("blur")


@pytest.mark.usefixtures("family")
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


@pytest.mark.usefixtures("family")
def test_layers_stacked_in_one_document_can_be_sliced_in_the_next():
    text = (
        RECIPES["franken"].replace("dtype: bfloat16", "name: tall")
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
