"""The model card: what the Hub reads, what a person reads."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastmerge.output.card import model_card
from fastmerge.output.provenance import display_name, provenance
from fastmerge.planning.plan import Plan
from fastmerge.planning.planner import make_plan

RECIPE = """\
# ``` a comment with a fence of its own
merge_method: dare_ties
base_model: {base}
models:
  - model: {one}
    parameters: {{weight: 0.6, density: 0.5}}
  - model: {two}
    parameters: {{weight: 0.4}}
dtype: bfloat16
"""


@pytest.fixture
def plan(zoo) -> Plan:
    base = zoo.base(tied=True)
    one, two = zoo.tune(base, "one", seed=1), zoo.tune(base, "two", seed=2)
    return make_plan(RECIPE.format(base=base, one=one, two=two), seed=77)


def test_front_matter(plan):
    card = model_card(plan, "mine")
    _, front, rest = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "fastmerge"],
    }
    assert rest.lstrip().startswith("# mine\n")


def test_recipe_is_whole(plan):
    """The fence outlasts backticks in the recipe, so that the recipe can be taken out again."""
    fenced = re.search(
        r"^(`{4,})yaml\n(.*?)\n\1$", model_card(plan, "mine"), re.DOTALL | re.MULTILINE
    )
    assert fenced is not None
    assert fenced[2] == provenance(plan).recipe_text.rstrip()
    with_paths = re.sub(r"\./(\w+)", rf"{plan.models[0].path.parent}/\1", fenced[2])
    assert with_paths == plan.recipe_text.rstrip()


def test_lineage(plan):
    card = model_card(plan, "mine")
    count = len(plan.tensors)
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\w+) \| `([0-9a-f]{64})` \|$", card, re.MULTILINE)
    expected = [
        (name, str(count), "base" if name == "base" else "source", model.fingerprint)
        for name, model in zip(["base", "one", "two"], plan.models, strict=True)
    ]
    assert rows == expected


def test_method_and_paper(plan):
    card = model_card(plan, "mine")
    assert "**dare_ties**, drop delta entries at random, rescale, elect a sign" in card
    assert "[arXiv:2311.03099](https://arxiv.org/abs/2311.03099)" in card
    assert f"): {len(plan.tensors)} tensors" in card
    assert "random seed: 77" in card


def test_doi_link(zoo):
    base = zoo.base()
    text = f"merge_method: karcher\nmodels: [{{model: {base}}}, {{model: {zoo.tune(base, 't')}}}]\n"
    assert "(https://doi.org/10.1007/BF01214303)" in model_card(make_plan(text), "m")


def test_copies_and_notes(zoo):
    """A stack of layers: copied tensors are counted, notes shown, no random seed named."""
    base = zoo.base(tied=True)
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: {base}, layer_range: [{i}, {i + 1}]}}]\n" for i in (0, 1, 0)
    )
    plan = make_plan(text)
    card = model_card(plan, "m")
    assert f"copied as they are: {len(plan.tensors)} tensors" in card
    assert "random seed" not in card and "passthrough**" not in card
    assert plan.notes or "## Notes" not in card
    assert all(f"- {note}" in card for note in plan.notes)


def test_same_plan_same_card(plan):
    assert model_card(plan, "mine") == model_card(plan, "mine")


@pytest.mark.parametrize(
    ("reference", "name"),
    {
        "mistralai/Mistral-7B-v0.1": "mistralai/Mistral-7B-v0.1",
        "mistralai/Mistral-7B-v0.1@main": "mistralai/Mistral-7B-v0.1@main",
        "./models/tuned": "tuned",
        "~/models/tuned/": "tuned",
        "/mnt/secret/tuned": "tuned",
        "models/of/mine": "mine",
    }.items(),
)
def test_no_local_path_on_a_card(reference, name):
    assert display_name(reference, Path("/cache/snapshots/0123abcd")) == name


@pytest.mark.parametrize(
    ("reference", "found", "name"),
    [
        ("models/tuned", "/srv/models/tuned", "tuned"),
        ("tuned/model.safetensors", "/srv/tuned/model.safetensors", "tuned"),
        ("org/model", "/cache/models--org--model/snapshots/0123abcd", "org/model"),
    ],
)
def test_a_relative_folder_is_no_hub_id(reference, found, name):
    assert display_name(reference, Path(found)) == name


def test_path_without_name():
    assert display_name("/", Path("/")) == "/"


def test_a_tokenizer_is_loaded_where_there_is_one(plan: Plan) -> None:
    with_one = model_card(plan, "mine", ["config.json", "tokenizer.json"])
    assert "tokenizer = AutoTokenizer.from_pretrained(folder)" in with_one
    assert "import AutoModelForCausalLM, AutoTokenizer\n" in with_one
    without = model_card(plan, "mine", ["config.json", "processor_config.json"])
    assert "okenizer" not in without and "import AutoModelForCausalLM\n" in without


@pytest.mark.parametrize("said", ["no", "[no, en]", '["no"]'])
def test_norwegian_is_a_language(said, zoo):
    base = zoo.base()
    (base / "README.md").write_text(f"---\nlanguage: {said}\n---\n")
    models = [{"model": str(base), "parameters": {"weight": 1}}]
    card = model_card(make_plan({"merge_method": "linear", "models": models}), "mine")
    assert "no" in yaml.safe_load(card.split("---\n")[1])["language"]


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("T5ForConditionalGeneration", "T5ForConditionalGeneration"),
        ("os; system('x')", "AutoModel"),
    ],
)
def test_the_snippet_loads_the_model_with_its_head(kind, auto, zoo):
    folder = zoo.write("a", {"w": np.ones(4)}, {"architectures": [kind]})
    models = [{"model": str(folder), "parameters": {"weight": 1}}]
    card = model_card(make_plan({"merge_method": "linear", "models": models}), "mine")
    assert f"import {auto}\n" in card and f"model = {auto}.from_pretrained" in card
