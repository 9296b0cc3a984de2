"""The recipe language: every form that people write, and one clear line for every fault."""

from __future__ import annotations

import json

import pytest

from fastmerge.dtypes import BF16, F16
from fastmerge.errors import FastmergeError
from fastmerge.methods import METHODS
from fastmerge.recipe.document import Recipe
from fastmerge.recipe.settings import interpolate

TWO = "models: [{model: a}, {model: b}]\n"
LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"
SLERP = "merge_method: slerp\nbase_model: a\n" + TWO


def load(text):
    return Recipe.load(text)


def refusal(source) -> str:
    with pytest.raises(FastmergeError) as caught:
        Recipe.load(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- forms


def test_values_of_every_form():
    recipe = load(
        SLERP
        + """parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, '1e-1']
    - filter: '*'
      value: 1e-5
  int8_mask: true
"""
    )
    attention, rest = recipe.output.parameters["t"].rules
    assert (attention.filter, attention.values) == ("self_attn", (0, 0.5, 0.1))
    assert (rest.filter, rest.values) == (None, (1e-5,))  # 1e-5 without a dot is text in YAML 1.1
    assert rest.where == "recipe:9"


def test_a_filter_need_not_be_in_a_list():
    recipe = load(SLERP + "parameters: {t: {filter: mlp, value: 0.5}}\n")
    assert recipe.output.parameters["t"].rules[0].filter == "mlp"


@pytest.mark.parametrize("text", ["true", "True", "1", "'true'", "yes", "'Yes'", "'on'"])
def test_truth_has_many_spellings(text):
    recipe = load(
        f"merge_method: ties\nbase_model: a\n{TWO}parameters: {{weight: 1, normalize: {text}}}\n"
    )
    parameter = METHODS["ties"].parameter("normalize")
    assert recipe.output.parameters["normalize"].checked(parameter).rules[0].values == (True,)


@pytest.mark.parametrize(
    "written, means",
    [
        ("org/model", "org/model"),
        ("org/model@main", "org/model@main"),
        ("{model: org/model}", "org/model"),
        ("{model: {path: org/model, revision: main}}", "org/model@main"),
        ("{model: {path: org/model, revision: null}, lora: null}", "org/model"),
        ("{model: {path: org/model}, lora: {path: b, revision: x}}", "org/model+b@x"),
        ("{path: ./a}", "./a"),
    ],
)
def test_model_references(written, means):
    assert load(f"{LINEAR}models:\n  - model: {written}\n").output.models[0].model == means


def test_anchors_and_merge_keys():
    recipe = load(
        """merge_method: ties
base_model: a
models:
  - model: b
    parameters: &p {weight: 1, density: 0.5}
  - model: c
    parameters: {<<: *p, density: 0.25}
"""
    )
    first, second = (entry.parameters["density"].rules[0].values for entry in recipe.output.models)
    assert (first, second) == ((0.5,), (0.25,))


def test_a_dict_and_yaml_mean_the_same(tmp_path):
    data = {
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": [0, 1]},
        "dtype": "bfloat16",
        "models": [{"model": tmp_path / "a"}, {"model": "b"}],
    }
    recipe = Recipe.load(data)
    again = Recipe.load(recipe.text)  # what is recorded can be run
    for document in (recipe.output, again.output):
        assert document.models[0].model == str(tmp_path / "a")
        assert document.parameters["t"].rules[0].values == (0, 1)
        assert document.output_dtype == BF16
    assert Recipe.load(recipe) is recipe


def test_a_file_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "r.yml"
    file.write_bytes(b"\xef\xbb\xbf" + SLERP.encode() + b"parameters: {t: 0.5}\n---\n")
    assert Recipe.load(file).output.merge_method == "slerp"
    assert Recipe.load(str(file)).text.startswith("merge_method")


def test_out_dtype_wins_and_null_counts_as_absent():
    text = (
        LINEAR
        + TWO
        + "dtype: float32\nout_dtype: float16\nchat_template: null\nmodules: null\nslices:\n"
    )
    assert load(text).output.output_dtype == F16


@pytest.mark.parametrize("key", ["seed", "random_seed"])
def test_seed(key):
    assert load(LINEAR + TWO + f"{key}: 0\n").output.own_seed == 0


@pytest.mark.parametrize(
    "line",
    [
        "tokenizer_source: base", "tokenizer_source: a", "tokenizer: {source: base}",
        "tokenizer_source: 'model:a'",
    ],
)  # fmt: skip
def test_the_bases_own_tokenizer(line):
    asked = load(SLERP + "parameters: {t: 0.5}\n" + line + "\n").output.vocabulary
    assert asked.source in ("base", "a")


@pytest.mark.parametrize("t, value", [(0, 0), (1 / 6, 0.25), (1 / 3, 0.5), (0.5, 0.4), (1, 0.7)])
def test_a_gradient_is_piecewise_linear(t, value):
    parameter = METHODS["slerp"].parameter("t")
    assert interpolate((0, 0.5, 0.3, 0.7), t, parameter, "") == pytest.approx(value, abs=1e-15)


def test_a_gradient_of_booleans_picks():
    parameter = METHODS["ties"].parameter("normalize")
    picked = [interpolate((True, False, True), t, parameter, "") for t in (0, 0.49, 0.5, 0.99, 1)]
    assert picked == [True, True, False, False, True]


def test_documents_are_sorted_by_need():
    text = "\n---\n".join(
        f"{LINEAR}name: {name}\nmodels: [{{model: {model}}}]"
        for name, model in [("last", "middle"), ("middle", "first"), ("first", "a")]
    )
    assert [document.name for document in load(text).documents] == ["first", "middle", "last"]


# ---------------------------------------------------------------- refusals

BAD = {
    "empty": ("\n", "the recipe is empty"),
    "only-comments": ("# nothing\n\n", "the recipe is empty"),
    "a-list": ("- model: a\n- model: b\n", "recipe:1: a document must be a mapping"),
    "text": ("hello\nworld\n", "a document must be a mapping"),
    "not-yaml": ("models: [\n", "recipe:2: not valid YAML"),
    "tab": ("models:\n\t- a\n", "recipe:2: not valid YAML"),
    "double-entry": (
        f"{LINEAR}models:\n  - model: a\n    model: b\n",
        "recipe:5: key 'model' is given twice (first on line 4); did you mean another entry?",
    ),
    "key-not-text": ("merge_method: slerp\n1: 2\n", "recipe:2: the key '1' is not text; quote it"),
    "own-anchor": ("models: &x\n  - *x\n", "recipe:1: this anchor contains itself"),
    "tag": ("merge_method: !!python/name:os.system x\n", "has no use here; leave it out"),
    "dash": ("merge_method: linear\nmodels:\n  -model: a\n", "write a blank behind each -"),
    "set": ("merge_method: !!set {a, b}\n", "has no use here"),
    "unknown-key": (
        f"{SLERP}\nparamters: {{t: 1}}\n",
        "recipe:5: unknown key 'paramters'; did you mean 'parameters'?",
    ),
    "unknown-key-in-model": (
        f"{LINEAR}models:\n  - model: a\n    wieght: 1\n",
        "recipe:5: unknown key 'wieght'",
    ),
    "parameter-as-key": (
        f"{LINEAR}models:\n  - model: a\n    weight: 1\n",
        "it belongs under 'parameters:'",
    ),
    "parameter-at-top": (
        f"{SLERP}t: 0.5\n",
        "recipe:4: unknown key 't'; it belongs under 'parameters:'",
    ),
    "method-of-another-name": (
        f"merge_method: model_soup\n{TWO}",
        "recipe:1: unknown method 'model_soup'; did you mean 'linear'?",
    ),
    "method-under-another-key": (
        f"method: linear\n{TWO}",
        "recipe:1: 'merge_method' is missing; is it 'method'?",
    ),
    "base-under-another-key": (
        f"merge_method: ties\nbase: a\n{TWO}",
        "recipe:2: unknown key 'base'; write 'base_model:'",
    ),
    "fence": (
        f"```yaml\n{SLERP}```\n",
        "recipe:1: not valid YAML ('```yaml'): a model card's fence",
    ),
    "models-and-slices": (
        f"{SLERP}slices:\n- sources: [{{model: a, layer_range: [0, 1]}}]\n",
        "recipe:4: give 'models:' or 'slices:', not both",
    ),
    "range-as-text": (
        f"{LINEAR}slices:\n- sources: [{{model: a, layer_range: 0-4}}]\n",
        "recipe:4: 'layer_range' must be a list, [start, end), as [0, 32]",
    ),
    "slice-of-a-model": (
        f"{LINEAR}slices:\n- {{model: a, layer_range: [0, 4]}}\n",
        "recipe:4: a slice lists its models under 'sources:', each with its 'layer_range:'",
    ),
    "weights-by-module": (
        f"{LINEAR}models: [{{model: a, parameters: {{weight: {{mlp: 0.5}}}}}}]\n",
        "recipe:3: a mapping with 'mlp' is no value; write a number, a list of them, or filters:",
    ),
    "tokenizer-as-text": (
        f"{SLERP}tokenizer: union\n",
        "recipe:4: 'tokenizer' must be a mapping; write `tokenizer_source: union`",
    ),
    "tokenizers-model": (
        f"{SLERP}tokenizer: {{model: a}}\n",
        "recipe:4: unknown key 'model'; write 'source:'",
    ),
    "tokenizer-misspelt": (
        f"{SLERP}tokenizer_source: Union\n",
        "recipe:4: unknown tokenizer 'Union'; did you mean 'union'?",
    ),
    "no-method": (TWO, "recipe:1: 'merge_method' is missing"),
    "unknown-method": (
        f"merge_method: slrep\n{TWO}",
        "recipe:1: unknown method 'slrep'; did you mean 'slerp'?",
    ),
    "method-a-list": (f"merge_method: [ties]\n{TWO}", "recipe:1: 'merge_method' must be text"),
    "no-models": (LINEAR, "give either 'models:' or 'slices:'"),
    "models-empty": (f"{LINEAR}models: []\n", "with at least one entry"),
    "model-is-text": (
        f"{LINEAR}models:\n  - a\n",
        "recipe:4: 'models[0]' must be a mapping with 'model:'",
    ),
    "model-missing": (
        f"{LINEAR}models:\n  - parameters: {{weight: 1}}\n",
        "recipe:4: 'model' is missing",
    ),
    "model-a-number": (
        f"{LINEAR}models:\n  - model: 7\n",
        "recipe:4: 'model' must be a folder or a Hub id",
    ),
    "model-blank": (f"{LINEAR}models:\n  - model: ''\n", "recipe:4: 'model' is empty"),
    "lora": (
        f"{LINEAR}models:\n  - model: {{model: a, lora: 7}}\n",
        "must be a folder or a Hub id",
    ),
    "architecture": (
        f"{LINEAR}models:\n  - model: {{model: a, override_architecture: X}}\n",
        "has the key 'override_architecture', which is not supported",
    ),
    "unknown-parameter": (
        f"{SLERP}parameters: {{t: 1, wieght: 2}}\n",
        "recipe:4: unknown parameter 'wieght' for slerp",
    ),
    "parameters-a-list": (
        f"{SLERP}parameters: [1]\n",
        "'parameters' must be a mapping of parameters",
    ),
    "density-below-0": (
        f"merge_method: ties\n{TWO}parameters: {{density: -0.1}}\n",
        "'density' must be in [0, 1], not -0.1",
    ),
    "density-in-gradient": (
        f"merge_method: ties\n{TWO}parameters:\n  density:\n    - 0.5\n    - 1.5\n",
        "recipe:4: 'density' must be in [0, 1], not 1.5",
    ),
    "nan": (f"{SLERP}parameters: {{t: .nan}}\n", "'t' must be finite"),
    "inf-as-text": (f"{SLERP}parameters: {{t: 'inf'}}\n", "'t' must be finite"),
    "huge": (f"{SLERP}parameters: {{t: 1{'0' * 400}}}\n", "out of range"),
    "word": (f"{SLERP}parameters: {{t: half}}\n", "recipe:4: 't' must be a number, not 'half'"),
    "number-for-flag": (
        f"merge_method: ties\n{TWO}parameters: {{normalize: 0.5}}\n",
        "'normalize' must be true or false",
    ),
    "part-of-a-whole": (
        f"merge_method: karcher\n{TWO}parameters: {{max_iter: 2.5}}\n",
        "'max_iter' must be a whole number",
    ),
    "date": (f"{SLERP}parameters: {{t: 2024-01-01}}\n", "must be a number, true or false"),
    "empty-list": (f"{SLERP}parameters: {{t: []}}\n", "recipe:4: the list of values is empty"),
    "mixed-list": (f"{SLERP}parameters: {{t: [0, {{value: 1}}]}}\n", "either values or filters"),
    "filter-key": (
        f"{SLERP}parameters: {{t: [{{filtre: mlp, value: 1}}]}}\n",
        "did you mean 'filter'?",
    ),
    "filter-without-value": (
        f"{SLERP}parameters: {{t: [{{filter: mlp}}]}}\n",
        "a filter needs a 'value:'",
    ),
    "filter-a-number": (
        f"{SLERP}parameters: {{t: [{{filter: 3, value: 1}}]}}\n",
        "'filter' must be text",
    ),
    "nested-filter": (
        f"{SLERP}parameters: {{t: [{{filter: a, value: [{{value: 1}}]}}]}}\n",
        "must be a number",
    ),
    "dtype": (
        f"{LINEAR}{TWO}dtype: bfloat15\n",
        "recipe:4: dtype: unknown dtype 'bfloat15'; did you mean 'bfloat16'?",
    ),
    "out-dtype": (f"{LINEAR}{TWO}out_dtype: int8\n", "out_dtype: cannot merge in 'int8'"),
    "seed-negative": (f"{LINEAR}{TWO}seed: -1\n", "recipe:4: 'seed' must be in [0, 2^64)"),
    "two-seeds": (f"{LINEAR}{TWO}seed: 1\nrandom_seed: 1\n", "keep one"),
    "layer-range-empty": (
        (
            "merge_method: passthrough\nslices:\n  - sources:\n      - "
            "{model: a, layer_range: [4, 4]}\n"
        ),
        "recipe:4: layer_range [4, 4] holds no layer",
    ),
    "layer-range-missing": (
        "merge_method: passthrough\nslices:\n  - sources:\n      - model: a\n",
        "recipe:4: 'layer_range' is missing",
    ),
    "layer-range-misspelt": (
        "merge_method: slerp\nslices:\n  - sources:\n    - {model: a, layer_rang: [0, 4]}\n",
        "recipe:4: unknown key 'layer_rang'; did you mean 'layer_range'",
    ),
    "layer-range-of-one": (
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [4]}]\n",
        "'layer_range[1]' is missing",
    ),
    "slice-lengths": (
        (
            "merge_method: slerp\nslices:\n  - sources:\n    - {model: a, layer_range: [0, 4]}\n"
            "    - {model: b, layer_range: [0, 3]}\n"
        ),
        "recipe:3: every source of a slice must give the same number of layers, not 4, 3",
    ),
    "slice-without-sources": (
        "merge_method: slerp\nslices:\n  - sources: []\n",
        "a slice needs at least one source",
    ),
    "modules-empty": (f"{LINEAR}modules: {{}}\n", "recipe:3: 'modules' must be a mapping with a"),
    "modules-beside-models": (
        f"{LINEAR}{TWO}modules: {{default: {{models: [{{model: a}}]}}}}\n",
        "give one of 'models:', 'slices:' and 'modules:'",
    ),
    "module-without-models": (
        f"{LINEAR}modules: {{default: {{}}}}\n",
        "recipe:3: give either 'models:' or 'slices:'",
    ),
    "layer-range-remedy": (
        "merge_method: slerp\nslices:\n  - sources:\n    - model: a\n",
        "recipe:4: 'layer_range' is missing; give the layers, [start, end), or list whole models",
    ),
    "only-a-lora": (
        f"{LINEAR}models:\n  - model: {{lora: b}}\n",
        "recipe:4: 'model' has a LoRA and no model; name the model that it adapts",
    ),
    "drop-rate": (
        f"merge_method: dare_ties\n{TWO}parameters: {{drop_rate: 0.9}}\n",
        "unknown parameter 'drop_rate' for dare_ties; did you mean 'density'? It is what stays",
    ),
    "misspelt-optional-parameter": (
        f"merge_method: ties\n{TWO}nromalize: true\n",
        "unknown key 'nromalize'; did you mean 'normalize'?",
    ),
    "misspelt-model": (
        f"{LINEAR}models:\n  - mdoel: a\n",
        "unknown key 'mdoel'; did you mean 'model'?",
    ),
    "moe": ("base_model: a\ngate_mode: hidden\nexperts: []\n", "needs two experts or more"),
    "chat-template": (f"{SLERP}chat_template: lama3\n", "did you mean 'llama3'?"),
    "no template": (f"{SLERP}chat_template: none\n", "left out, the donor's stays; for an output"),
    "off template": (f"{SLERP}chat_template: off\n", "left out, the donor's stays; for an output"),
    "a-schedule": ("baseline: {model: a}\npool: []\n", "run `fastmerge retrograde`"),
    "tokenizer-twice": (
        f"{SLERP}tokenizer_source: union\ntokenizer: {{source: base}}\n",
        "recipe:5: give 'tokenizer' or 'tokenizer_source', not both",
    ),
    "tokenizer-key": (f"{SLERP}tokenizer: {{sorce: base}}\n", "did you mean 'source'?"),
    "tokenizer-kind": (
        f"{SLERP}tokenizer: {{tokens: {{x: {{source: {{kind: zeros}}}}}}}}\n",
        "'source' has the kind 'zeros'; use 'model_token' or 'zero'",
    ),
    "tokenizer-token-of-no-model": (
        f"{SLERP}tokenizer: {{tokens: {{x: {{source: {{kind: model_token, token: y}}}}}}}}\n",
        "'source' needs a 'model'",
    ),
    "tokenizer-token-or-id": (
        f"{SLERP}tokenizer: {{tokens: {{x: {{source: {{kind: model_token, model: a}}}}}}}}\n",
        "'source' needs either 'token' or 'token_id'",
    ),
    "tokenizer-pad": (f"{SLERP}tokenizer: {{pad_to_multiple_of: 0}}\n", "or equal to 1"),
    "two-unnamed": (f"{LINEAR}{TWO}---\n{LINEAR}{TWO}", "recipe:5: 2 documents have no 'name:'"),
    "two-of-a-name": (
        f"{LINEAR}{TWO}name: x\n---\n{LINEAR}{TWO}name: x\n",
        "two documents are called 'x'",
    ),
    "circle": (
        f"{LINEAR}models: [{{model: y}}]\nname: x\n---\n{LINEAR}models: [{{model: x}}]\nname: y\n",
        "in a circle: x -> y -> x",
    ),
    "circle-beside": (
        f"{LINEAR}models: [{{model: a}}]\n---\n{LINEAR}models: [{{model: y}}]\nname: y\n",
        "in a circle: y -> y",
    ),
    "loose-end": (
        f"{LINEAR}models: [{{model: a}}]\nname: x\n---\n{LINEAR}{TWO}",
        "recipe:1: no document uses 'x'; remove it",
    ),
    "two-outputs": (
        f"{LINEAR}{TWO}name: x\n---\n{LINEAR}{TWO}name: y\n",
        "which one is the output? Keep one of them",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_line(case):
    text, expected = BAD[case]
    assert expected in refusal(text)


def test_the_files_own_name_and_line_lead(tmp_path):
    file = tmp_path / "my recipe.yml"
    file.write_text(SLERP + "\n\nparamters: {}\n")
    assert refusal(file) == "my recipe.yml:6: unknown key 'paramters'; did you mean 'parameters'?"


def test_a_dicts_places_are_its_keys():
    data = {"merge_method": "ties", "models": [{"model": "a", "parameters": {"density": [1, 2]}}]}
    assert (
        refusal(data) == "recipe.models[0].parameters.density: 'density' must be in [0, 1], not 2"
    )
    assert refusal([{}, {}]).startswith("recipe, document 1: 'merge_method' is missing")
    assert refusal({1: 2}) == "recipe: key 1 is not text"


@pytest.mark.parametrize(
    "source, expected", [(3, "not int"), ("no/such.yml", "no such recipe file")]
)
def test_what_is_no_recipe(source, expected):
    assert expected in refusal(source)


def test_unreadable_files(tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    assert "not UTF-8 text (byte 0)" in refusal(tmp_path / "latin")
    assert "cannot be read: Is a directory" in refusal(tmp_path)


def test_nested_aliases_stay_small():
    """Ten levels of ten aliases each would be 10^10 items if copied."""
    lines = ["x0: &x0 [1]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 11)]
    assert "'merge_method' is missing" in refusal("\n".join(lines) + "\n")


def test_deep_nesting_is_refused():
    assert refusal("a: " + "[" * 5000 + "]" * 5000 + "\n")


def test_json_is_yaml():
    data = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    assert load(json.dumps(data, indent=1)).output.models[0].model == "a"
