"""Recipes as people write them: what mergekit ignores, spells in other words or rewrites itself."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import yaml

import fastmerge
from fastmerge.errors import FastmergeError, near_miss
from fastmerge.planning.planner import make_plan
from fastmerge.recipe.located import located
from fastmerge.recipe.tokenizer import TokenizerSection

pytestmark = pytest.mark.usefixtures("family")

DARE = """\
merge_method: dare_ties
base_model: blur
models:
- model: dolphin
  parameters: {weight: 0.5, density: 0.5}
- model: chat
  parameters: {weight: 0.25, density: 0.5}
parameters: {normalize: true}
"""
LINEAR = """\
merge_method: linear
models:
- {model: blur, parameters: {weight: 1}}
- {model: chat, parameters: {weight: 3}}
"""


def notes(text: str) -> str:
    return "\n".join(make_plan(text).notes)


# ---------------------------------------------------------------- said in other words


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("parameters: {weight: 1}", "params: {weight: 1}", "did you mean 'parameters'?"),
        ("{weight: 1}", "{weight: '0,5'}", "must be a number, not '0,5'; write 0.5"),
        ("{weight: 1}", "{weight: 50 %}", "must be a number, not '50 %'; write 0.5"),
        (
            "blur",
            "\u201cblur\u201d",
            "stands in typographic quotes, \u201cblur\u201d; write plain ones",
        ),
        ("{weight: 1}", '"weight:\\_1"', "; a plain space belongs behind the ':'"),
        ("{weight: 1}", "{weight: 'half'}", "must be a number, not 'half'"),
        (
            "{weight: 1}",
            "{weight: {mlp: 0.5}}",
            "a list of them, or filters: [{filter: mlp, value: 0.5}, {value: 0.3}]",
        ),
        ("{weight: 1}", "{weight: 1, mine: {a: 1}}", "a mapping with 'a' is no value"),
        ("{weight: 1}", "{weight: {}}", "a filter needs a 'value:'"),
    ],
)
def test_the_line_says_what_to_write(old: str, new: str, said: str) -> None:
    with pytest.raises(FastmergeError) as caught:
        make_plan(LINEAR.replace(old, new))
    assert str(caught.value).startswith("recipe:3: ")
    assert said in str(caught.value)


def test_a_blank_that_is_no_space_is_named() -> None:
    """Copied from a web page."""
    with pytest.raises(FastmergeError) as caught:
        make_plan(f"models:\n- model: blur\n{chr(0xA0) * 2}parameters: {{weight: 1}}\n- a: 1")
    assert str(caught.value) == (
        "recipe:3: not valid YAML: indented with U+00A0, which is no space to YAML; "
        "use plain spaces"
    )


def test_a_comma_is_only_told_of_a_number() -> None:
    with pytest.raises(FastmergeError) as caught:
        make_plan(LINEAR.replace("{weight: 1}", "{weight: 'a,5'}"))
    assert "write" not in str(caught.value)


# ---------------------------------------------------------------- without effect


@pytest.mark.parametrize(
    "line, words",
    [
        ("architecture: LlamaForCausalLM", "'architecture' (recipe:5)"),
        ("select_topk: 0.1", "'select_topk' (recipe:5"),
        ("int8_mask: true", "'int8_mask' (recipe:5; it belongs under 'parameters:')"),
        ("custom_dir: x", "'custom_dir' (recipe:5)"),
        ("target_model: x", "'target_model' (recipe:5)"),
        ("embed_slerp: true", "'embed_slerp' (recipe:5)"),
        ("input_model_parameters: {}", "'input_model_parameters' (recipe:5; mergekit dropped it"),
        ("parameters: {random_seed: 3}", "'random_seed' (recipe:5; it belongs at the top)"),
        ("parameters: {dtype: bfloat16}", "'dtype' (recipe:5; it belongs at the top)"),
        ("parameters: {drop_rate: 0.3}", "'drop_rate' (recipe:5)"),
        ("parameters: {int_space: cs}", "'int_space' (recipe:5)"),
    ],
)
def test_what_mergekit_ignores_is_one_note(line: str, words: str) -> None:
    (found,) = [n for n in make_plan(LINEAR + line + "\n").notes if "without effect" in n]
    assert found.startswith("without effect, here as in mergekit: ") and words in found
    assert make_plan(LINEAR + line).key == make_plan(LINEAR).key


def test_one_note_lists_them_all() -> None:
    text = "foo: 1\nparameters: {bar: 2}\n" + LINEAR.replace("chat,", "chat, revision: main,")
    assert (
        "without effect, here as in mergekit: 'foo' (recipe:1), 'bar' (recipe:2), "
        "'revision' (recipe:6; write the model as 'name@revision')" in make_plan(text).notes
    )


def test_keys_of_slices_and_sources_are_ignored_too() -> None:
    text = (
        "merge_method: slerp\nbase_model: blur\nparameters: {t: 0.5}\nslices:\n"
        "- residual_weight: 0.1\n  sources:\n"
        "  - {model: blur, layer_range: [0, 8]}\n"
        "  - {model: chat, layer_range: [0, 8], down_proj: {value: 1}}\n"
    )
    assert "'residual_weight' (recipe:5), 'down_proj' (recipe:8)" in notes(text)


@pytest.mark.parametrize(
    "word, expected",
    [
        ("lamda", "lambda"),
        ("Base-Model", "base_model"),
        ("dype", "dtype"),
        ("target_model", None),
        ("architecture", None),
    ],
)
def test_a_near_miss_is_a_misspelling(word: str, expected: str | None) -> None:
    assert near_miss(word, ["lambda", "base_model", "dtype", "tokenizer"]) == expected


def test_a_key_that_is_given_twice_counts_where_it_stands_last() -> None:
    text = f"{LINEAR}dtype: float16\nparameters: {{normalize: true}}\ndtype: bfloat16\n"
    text = text.replace("weight: 3}", "weight: 9, weight: 3}")
    assert notes(text) == (
        "without effect, here as in mergekit: 'dtype' (recipe:5; given again on line 7, which "
        "counts), 'weight' (recipe:4; given again on line 4, which counts)"
    )
    assert make_plan(text).key == make_plan(f"{LINEAR}dtype: bfloat16\n").key


def test_keys_beside_a_filter_are_ignored() -> None:
    ruled = LINEAR.replace("weight: 3", "weight: [{filter: mlp, value: 2, note: x}, {value: 3}]")
    assert "'note' (recipe:4)" in notes(ruled)
    with pytest.raises(FastmergeError, match="unknown key 'filtre'; did you mean 'filter'"):
        make_plan(ruled.replace("filter:", "filtre:"))
    with pytest.raises(FastmergeError, match="unknown key 'layers'; did you mean 'filter'"):
        make_plan(ruled.replace("filter:", "layers:"))


def test_keys_of_a_tokenizer_section_are_ignored() -> None:
    section = "tokenizer: {source: union, chat_template: auto, tokens: {<s>: {note: 1}}}"
    data = yaml.safe_load(section)
    asked = TokenizerSection(located(data["tokenizer"], "tokenizer"))
    assert asked.ignored == ("'chat_template' (tokenizer.chat_template; it belongs at the top)",)
    assert asked.tokens["<s>"].ignored == ("'note' (tokenizer.tokens.<s>.note)",)
    with pytest.raises(FastmergeError, match="unknown key 'sorce'; did you mean 'source'"):
        TokenizerSection(located({"sorce": "union"}, "tokenizer"))


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("listed", ["models", "slices"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della", "sce", "ram", "ramplus_tl"])
def test_a_base_alone_is_the_result(family, method: str, listed: str) -> None:
    entry: dict[str, Any] = {"model": "blur", "parameters": {"weight": 1}}
    data: dict[str, Any] = {"merge_method": method, "base_model": "blur", "models": [entry]}
    if listed == "slices":
        del data["models"]
        data["slices"] = [{"sources": [entry | {"layer_range": [0, 8]}]}]
    assert "no model besides the base 'blur', which the result of" in notes(yaml.safe_dump(data))
    fastmerge.merge(data, family.root / "alone")
    alone, blur = family.read(family.root / "alone"), family.read(family.root / "blur")
    assert alone.keys() == blur.keys()
    assert all(np.array_equal(value, blur[name]) for name, value in alone.items())


@pytest.mark.parametrize("model", ["chat@main", "{path: chat, revision: main}"])
def test_a_folder_has_no_revisions(model: str) -> None:
    plan = make_plan(LINEAR.replace("chat", model, 1))
    assert plan.key == make_plan(LINEAR).key
    assert "'chat' is a folder here, which has no revisions: '@main' has no effect" in plan.notes


def test_a_model_as_mergekit_dumps_it() -> None:
    model = "{model: {path: chat, revision: null}, lora: null, override_architecture: null}"
    assert make_plan(LINEAR.replace("chat", model, 1)).key == make_plan(LINEAR).key


@pytest.mark.parametrize(
    "method", ["dare_ties", "dare_linear", "ties", "breadcrumbs", "della", "della_linear"]
)
def test_a_density_of_0_leaves_a_model_out(family, method: str) -> None:
    data = yaml.safe_load(DARE.replace("dare_ties", method))
    data["parameters"] = {}
    data["models"][0]["parameters"]["density"] = 0
    data["models"][1]["parameters"]["density"] = 1
    fastmerge.merge(data, family.root / "zero")
    del data["models"][0]
    fastmerge.merge(data, family.root / "without")
    zero, without = family.read(family.root / "zero"), family.read(family.root / "without")
    for name, value in without.items():
        np.testing.assert_array_equal(zero[name], value, err_msg=name)


# ---------------------------------------------------------------- modules


def test_the_default_module_is_the_model() -> None:
    data = yaml.safe_load(DARE)
    wrapped = {k: v for k, v in data.items() if k != "models"}
    wrapped["modules"] = {"default": {"models": data["models"]}}
    assert make_plan(wrapped, seed=1).key == make_plan(data, seed=1).key


def test_a_modules_values_come_before_the_documents() -> None:
    data = yaml.safe_load(LINEAR)
    for model in data["models"]:
        del model["parameters"]
    inner = [{"filter": "mlp", "value": 1}]
    module = {"models": data.pop("models"), "parameters": {"weight": inner, "normalize": False}}
    data |= {"modules": {"default": module}, "parameters": {"weight": 2, "normalize": True}}
    values = {t.name: t.root.operand_values[0]["weight"] for t in make_plan(data).tensors}
    assert {v for n, v in values.items() if "mlp" in n} == {1}
    assert {v for n, v in values.items() if "mlp" not in n} == {2}
    assert all(not t.root.values["normalize"] for t in make_plan(data).tensors)


def test_a_configuration_that_mergekits_planner_rewrote(family, tmp_path) -> None:
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from fastmerge.integrations.mergekit import run_merge

    config = MergeConfiguration.model_validate(yaml.safe_load(LINEAR))
    before = run_merge(config, tmp_path / "before")
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    mergekit.merge.run_merge(config, str(tmp_path / "theirs"), options=options)
    assert config.modules is not None
    after = run_merge(config, tmp_path / "after")
    assert before.tensors == after.tensors
    one, two = (family.read(tmp_path / out) for out in ("before", "after"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(value, two[name]) for name, value in one.items())


# ---------------------------------------------------------------- the seed


def _seed(recipe: Any) -> int:
    plan = make_plan(recipe)
    assert plan.seed_derived and plan.seed is not None
    return plan.seed


@pytest.mark.parametrize(
    "same",
    [
        f"# a comment\n{DARE}",
        DARE.replace("density: 0.5", "density: 5.0e-1 "),
        DARE.replace("{weight: 0.25, density: 0.5}", "{density: 0.5, weight: 0.25}"),
        DARE.replace("model: chat", "model: ./chat/"),
        DARE.replace("model: chat", "model: {path: ../{here}/chat}"),
        DARE.replace("normalize: true", "normalize: 1, gamma: 3"),
        f"{DARE}dtype: bfloat16\nnonsense: 3\n",
    ],
)
def test_what_means_the_same_draws_the_same(family, same: str) -> None:
    assert _seed(same.replace("{here}", family.root.name)) == _seed(DARE)


def test_keys_in_another_order_draw_the_same() -> None:
    data = yaml.safe_load(DARE)
    assert _seed(dict(reversed(data.items()))) == _seed(data) == _seed(DARE)


def test_what_means_something_else_draws_anew() -> None:
    data = yaml.safe_load(DARE)
    others = []
    for change in (
        lambda d: d["models"][0]["parameters"].update(weight=0.75),
        lambda d: d["models"][0].update(model="math"),
        lambda d: d["models"].reverse(),
        lambda d: d.update(merge_method="dare_linear"),
        lambda d: d["models"][1]["parameters"].update(
            weight=[{"filter": "mlp", "value": 0.25}, {"value": 0.25}]
        ),
    ):
        other = copy.deepcopy(data)
        change(other)
        others.append(_seed(other))
    assert len({_seed(data), *others}) == 1 + len(others)


# ---------------------------------------------------------------- remedies that work


@pytest.mark.parametrize("listed", ["models", "slices"])
def test_a_foreign_base_of_slerp_names_the_sources(listed: str) -> None:
    sources = [{"model": m} for m in ("blur", "chat")]
    data: dict[str, Any] = {"merge_method": "slerp", "base_model": "math", "parameters": {"t": 0.5}}
    if listed == "models":
        data["models"] = sources
    else:
        data["slices"] = [{"sources": [s | {"layer_range": [0, 8]} for s in sources]}]
    with pytest.raises(FastmergeError, match="name 'blur' or 'chat'"):
        make_plan(data)
    assert make_plan(data | {"base_model": "chat"}).tensors
