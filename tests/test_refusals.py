"""What a plan refuses: one line that names the place, the model and the tensor, before any weight
is read.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastmerge.errors import FastmergeError
from fastmerge.planning.planner import make_plan


@pytest.fixture
def shelf(zoo, monkeypatch):
    """Models that fit each other and models that do not, in the working directory."""
    base = zoo.base("a", layers=4)
    zoo.tune(base, "b", seed=1)
    zoo.tune(base, "c", seed=2)
    zoo.base("short", layers=3)
    zoo.base("wide", layers=4, hidden=48)
    zoo.base("big_vocabulary", layers=4, vocab=42)
    tensors = zoo.read(base)
    config = json.loads((base / "config.json").read_text())

    def variant(name, change, **settings):
        copy = dict(tensors)
        change(copy)
        zoo.write(name, copy, config | settings)

    variant("holed", lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    variant("biased", lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": np.ones(32)}))
    variant("odd", lambda t: t.update({"adapter.weight": np.ones(3)}))
    variant("quantised", lambda t: None, quantization_config={"quant_method": "gptq"})
    zoo.write("nameless", {"w": np.ones((2, 2))})
    for name, value in (("ids1", 1), ("ids2", 2)):
        zoo.raw(
            name, {"w": ("F16", np.ones(4, np.float16)), "ids": ("I32", np.full(3, value, "i4"))}
        )
    zoo.raw("double", {"w": ("F64", np.ones(4)), "ids": ("I32", np.ones(3, "i4"))})
    zoo.raw("eight", {"w": ("F8_E4M3", np.ones(4, "u1")), "ids": ("I32", np.ones(3, "i4"))})
    monkeypatch.chdir(zoo.root)
    return zoo


def models(method, *names, base="a", **parameters):
    lines = [f"merge_method: {method}", f"base_model: {base}" if base else "", "models:"]
    lines += [f"  - model: {name}" for name in names]
    return "\n".join([*lines, f"parameters: {json.dumps(parameters)}\n"])


def slices(method, *groups, base="a", **parameters):
    """One slice for each group; a source is (model, start, end)."""
    lines = [f"merge_method: {method}", f"base_model: {base}" if base else "", "slices:"]
    for group in groups:
        lines.append("  - sources:")
        lines += [f"      - {{model: {m}, layer_range: [{s}, {e}]}}" for m, s, e in group]
    return "\n".join([*lines, f"parameters: {json.dumps(parameters)}\n"])


BAD = {
    # How many models, and which is the base.
    "slerp-of-three": (
        models("slerp", "a", "b", "c", t=0.5),
        "recipe:3: slerp takes exactly 2 models, not 3",
    ),
    "slerp-of-one": (models("slerp", "a", t=0.5), "slerp takes exactly 2 models, not 1"),
    "slerp-without-base": (
        models("slerp", "a", "b", base="", t=0.5),
        "recipe:1: slerp needs a 'base_model:'",
    ),
    "slerp-base-beside": (models("slerp", "b", "c", t=0.5), "slerp takes exactly 2 models, not 3"),
    "ties-without-base": (
        models("ties", "a", "b", base="", weight=1),
        "ties needs a 'base_model:'",
    ),
    "stock-of-one": (
        models("model_stock", "a", "b"),
        "model_stock takes at least 2 models besides the base, not 1",
    ),
    "nuslerp-of-three": (
        models("nuslerp", "a", "b", "c", "wide", weight=1),
        "nuslerp takes exactly 2 models besides the base, not 3",
    ),
    "passthrough-of-two": (
        models("passthrough", "a", "b", base=""),
        "passthrough takes exactly 1 model, not 2",
    ),
    "passthrough-with-base": (
        models("passthrough", "b"),
        "recipe:2: passthrough takes no base_model",
    ),
    "listed-twice": (
        models("linear", "b", "./b", base="", weight=1),
        "recipe:5: model 'b' is listed twice",
    ),
    "slice-of-one": (
        slices("slerp", [("a", 0, 2), ("b", 0, 2)], [("a", 2, 4)], t=0.5),
        "recipe:7: slerp takes exactly 2 models, not 1",
    ),
    "slice-of-no-layer": (
        slices("linear", [("a", 3, 3), ("b", 3, 3)], weight=1),
        "layer_range [3, 3] holds no layer: the end is not part of it; layer 3 alone is [3, 4]",
    ),
    "base-not-in-slice": (
        slices("slerp", [("b", 0, 2), ("c", 0, 2)], t=0.5),
        "recipe:4: base_model 'a' is not among this slice's sources; slerp needs its layers",
    ),
    # Parameters that only a look at the whole recipe can miss.
    "no-weight": (
        models("ties", "a", "b"),
        "recipe:5: ties needs 'weight' for model 'b'; give it in the model's 'parameters:'",
    ),
    "t-of-one-model": (
        models("slerp", "a", "b").replace("model: b", "model: b\n    parameters: {t: 1}"),
        "recipe:6: 't' is of the whole merge in slerp, not of a model; give it in the recipe's own",
    ),
    "no-t": (
        models("slerp", "a", "b"),
        "recipe:1: slerp needs the parameter 't'; give it under 'parameters:'",
    ),
    "base-without-weight": (
        "merge_method: linear\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1}}]\n",
        "recipe:2: linear needs 'weight' for model 'a' (base_model is averaged too)",
    ),
    "filter-leaves-some": (
        models("slerp", "a", "b", t=[{"filter": "mlp", "value": 1}]),
        "no filter matches tensor 'model.embed_tokens.weight'; end the list with `- value: ...`",
    ),
    "weights-cancel": (
        (
            "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
            "  - {model: b, parameters: {weight: -1}}\n"
        ),
        "sum to 0",
    ),
    "weights-cancel-somewhere": (
        (
            "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: [1, 0.5]}}\n"
            "  - {model: b, parameters: {weight: -1}}\n"
        ),
        "recipe:2: linear: the weights [1.0, -1.0] sum to 0",
    ),
    # Tensors.
    "missing-tensor": (
        models("linear", "a", "holed", base="", weight=1),
        "recipe:5: model 'holed' lacks tensor 'model.layers.2.mlp.up_proj.weight', which 'a' has",
    ),
    "extra-tensor": (
        models("linear", "a", "biased", base="", weight=1),
        (
            "recipe:5: model 'biased' has tensor 'model.layers.1.self_attn.q_proj.bias', which 'a' "
            "lacks"
        ),
    ),
    "fewer-layers": (
        models("linear", "a", "short", base="", weight=1),
        (
            "lacks tensor 'model.layers.3.self_attn.q_proj.weight' (and 8 more), which 'a' has: "
            "they are not of one architecture (3 and 4 layers)"
        ),
    ),
    "more-layers": (
        models("linear", "short", "a", base="", weight=1),
        "(and 8 more), which 'short' lacks",
    ),
    "shape": (
        models("linear", "a", "wide", base="", weight=1),
        (
            "recipe:5: tensor 'model.embed_tokens.weight' is [40, 32] in model 'a' but [40, 48] in "
            "'wide'"
        ),
    ),
    "vocabulary": (
        models("linear", "a", "big_vocabulary", base="", weight=1),
        (
            "recipe:5: vocabulary mismatch in 'model.embed_tokens.weight': 40 rows in 'a', 42 in "
            "'big_vocabulary'; write `tokenizer_source: union`"
        ),
    ),
    "quantised": (
        models("linear", "a", "quantised", base="", weight=1),
        "recipe:5: model 'quantised' is quantised (gptq in config.json)",
    ),
    "integers-differ": (
        models("linear", "ids1", "ids2", base="", weight=1),
        "tensor 'ids' (int32) differs between models 'ids1' and 'ids2'",
    ),
    "integers-against-floats": (
        models("linear", "ids1", "nameless", base="", weight=1),
        "model 'nameless' lacks tensor 'ids'",
    ),
    "float8": (
        models("linear", "eight", base="", weight=1),
        "tensor 'w' of model 'eight' is float8_e4m3fn",
    ),
    # Layers.
    "past-the-last-layer": (
        slices("passthrough", [("a", 0, 4)], [("b", 2, 5)], base=""),
        "recipe:7: layer_range [2, 5] is out of range: 'b' has 4 layers",
    ),
    "range-under-models": (
        "merge_method: passthrough\nmodels:\n  - {model: a, layer_range: [0, 3]}\n",
        "recipe:3: layer_range [0, 3] under 'models:' would have no effect ('a' has 4 layers)",
    ),
    "no-known-layers": (
        slices("passthrough", [("nameless", 0, 1)], base=""),
        "recipe:5: 'nameless' has no layers named as fastmerge knows them",
    ),
    "tensor-of-no-place": (
        slices("passthrough", [("odd", 0, 2)], [("odd", 1, 4)], base=""),
        "tensor 'adapter.weight' of model 'odd' is in no layer",
    ),
    "slices-of-two-shapes": (
        slices("slerp", [("a", 0, 3), ("biased", 0, 3)], t=0.5),
        "has tensor 'model.layers.1.self_attn.q_proj.bias', which 'a' lacks",
    ),
    "slice-of-another-width": (
        slices("slerp", [("a", 0, 3), ("wide", 0, 3)], t=0.5),
        "'model.embed_tokens.weight' is [40, 32] in model 'a'",
    ),
    # Models.
    "no-model": (
        models("passthrough", "nowhere/at/all", base=""),
        "recipe:4: nowhere/at/all: no such folder",
    ),
    "lora": (
        models("passthrough", "a+./adapter", base=""),
        "recipe:4: ./adapter: no such folder",
    ),
}


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("case", BAD)
def test_one_clear_line(case):
    recipe, expected = BAD[case]
    with pytest.raises(FastmergeError) as caught:
        make_plan(recipe)
    message = str(caught.value)
    assert expected in message and "\n" not in message


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("name", ["double", "eight", "quantised", "odd", "nameless"])
def test_whatever_cannot_be_merged_can_be_copied(name):
    plan = make_plan(f"merge_method: passthrough\nmodels: [{{model: {name}}}]\n")
    assert plan.methods == {"copy": len(plan.tensors)}


@pytest.mark.usefixtures("shelf")
def test_the_whole_range_under_models_is_fine():
    """As recipes that mergekit wrote out often have it."""
    plan = make_plan("merge_method: passthrough\nmodels: [{model: a, layer_range: [0, 4]}]\n")
    assert plan.config["num_hidden_layers"] == 4


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seed(seed, shelf):
    with pytest.raises(FastmergeError, match=r"seed must be a whole number in \[0, 2\^64\)"):
        make_plan(models("dare_ties", "a", "b", weight=1), seed=seed)
    assert (
        make_plan(models("dare_ties", "a", "b", weight=1), seed=abs(seed) - 1).seed == abs(seed) - 1
    )
    assert shelf


def test_per_layer_lists_must_reach(shelf):
    config = json.loads((shelf.root / "a" / "config.json").read_text()) | {"layer_types": ["x"] * 4}
    (shelf.root / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FastmergeError, match=r"config\.json of 'b' has no 'layer_types' for layers up to 4"
    ):
        make_plan(slices("passthrough", [("a", 0, 4)], [("b", 2, 4)], base=""))


def test_nothing_is_read_of_the_weights(shelf, monkeypatch):
    """A plan of float tensors maps no file."""
    from fastmerge import _C

    def fail(*args):
        raise AssertionError(f"mapped {args}")

    monkeypatch.setattr(_C, "Mapping", fail)
    make_plan(models("ties", "a", "b", "c", weight=1))
    assert shelf


# ---------------------------------------------------------------- whatever comes

JUNK = [
    None, True, 0, -1, 1e308, float("nan"), 10**30, "", "x", "blur", "a\nb", "\0", "\x1b[31m",
    "a+b", "/", "1e-5", [], [[]], [None], {}, {"x": 1}, {"value": 1}, [{"filter": "mlp"}], {1: 2},
    b"x", object(), {"model": "blur"},
]  # fmt: skip
KEYS = ("models", "slices", "base_model", "parameters", "dtype", "name", "seed", "layer_range", "t")
SCRAPS = [
    "",
    ":",
    " ",
    "-",
    "[",
    "}",
    "&a ",
    "*a ",
    "!",
    "#",
    "'",
    "|",
    "%",
    "\t",
    "\n",
    "<<: ",
    "---\n",
    "\0",
]


def places(value, path=()):
    """The path of every value in a tree of dicts and lists."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def damaged(documents, rng):
    """Documents with one thing replaced, removed, added or moved."""
    documents = copy.deepcopy(documents)
    path = rng.choice([path for path in places(documents) if path])
    home, key = at(documents, path[:-1]), path[-1]
    match rng.randrange(4):
        case 0:
            home[key] = rng.choice(JUNK)
        case 1:
            del home[key]
        case 2 if isinstance(home, dict):
            home[rng.choice(KEYS)] = rng.choice(JUNK)
        case _:
            home[key] = copy.deepcopy(at(documents, rng.choice(list(places(documents)))))
    return documents


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("seed", range(4))
def test_damaged_recipes_are_planned_or_refused_in_one_line(seed):
    """No mutation of a good recipe raises anything but FastmergeError, of one printable line."""
    rng = random.Random(seed)
    recipes = sorted(Path(__file__).parent.glob("recipes/*.yml"))
    messages = []
    for _ in range(60):
        text = rng.choice(recipes).read_text()
        if rng.random() < 0.7:
            source = damaged(list(yaml.safe_load_all(text)), rng)
        else:
            cut = rng.randrange(len(text))
            source = text[:cut] + rng.choice(SCRAPS) + text[cut + rng.choice([0, 1, 3]) :]
        try:
            make_plan(source).describe()
        except FastmergeError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(message.isprintable() and len(message) < 600 for message in messages)
