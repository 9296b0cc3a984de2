"""Recipes with tokenizers and chat templates: templates, schedules, sweeps, refusals."""

from __future__ import annotations

import json
import sys

import pytest

import fastmerge
from fastmerge import api
from fastmerge.methods import METHODS
from tests.tokenizer_models import (
    EMBED,
    HEAD,
    TEXTS,
    Maker,
    bpe,
    permuted,
    recipe,
    refused,
    trio_of,
    vocabulary,
)


@pytest.fixture(scope="module")
def maker(shared_zoo):
    return Maker(shared_zoo)


@pytest.fixture(scope="module")
def trio(maker):
    return trio_of(maker, "recipes")


# --- chat templates ---


@pytest.mark.parametrize("name", ["alpaca", "chatml", "exaone", "llama3", "mistral"])
def test_a_template_by_name_renders(maker, tmp_path, name):
    from transformers import AutoTokenizer

    a = maker.model(f"template-{name}", bpe(TEXTS, 280), seed=61)
    api.merge(recipe({"base": a}, weights=(1,), chat_template=name), tmp_path / "out", threads=1)
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "I."},
        {"role": "user", "content": "Why?"},
    ]
    text = made.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    wanted = {
        "chatml": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "llama3": "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "alpaca": "### Instruction:\nWhy?\n\n### Response:\n",
        "mistral": "[INST] Be kind.\n\nWho? [/INST] I.</s>[INST] Why? [/INST]",
        "exaone": "[|user|]Why?\n[|assistant|]",
    }
    assert text.endswith(wanted[name])
    assert text.index("Be kind.") < text.index("Who?") < text.index("I.")


@pytest.mark.parametrize(
    "text, said",
    [
        ("{% for", "is no Jinja that can be read: unexpected 'end of template' (its line 1)"),
        ("a\n{{ m }", "is no Jinja that can be read: unexpected '}' (its line 2)"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages | tojso }}", "has the filter 'tojso' (its line 1), which Jinja does not"),
        ("{% if a is strin %}b{% endif %}", "has the test 'strin'"),
        ("{% generation %}", "Unexpected end of template"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("chatlm", "did you mean 'chatml'?"),
    ],
)
def test_a_template_that_nobody_could_read_is_refused(maker, tmp_path, text, said):
    a = maker.model("template-broken", bpe(TEXTS, 280), seed=63)
    given = recipe({"base": a}, weights=(1,), chat_template=text)
    with pytest.raises(fastmerge.FastmergeError) as caught:
        api.merge(given, tmp_path / "out", threads=1)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


TAGS = (
    "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ raise_exception('x') }}"
)


def test_what_transformers_adds_to_jinja_is_known(maker):
    a = maker.model("template-tags", bpe(TEXTS, 280), seed=64)
    plan = api.plan(recipe({"base": a}, weights=(1,), chat_template=TAGS))
    assert plan.chat_template == TAGS
    assert not any("jinja2" in note for note in plan.notes)


def test_a_template_is_not_checked_without_jinja(maker, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    a = maker.model("template-unchecked", bpe(TEXTS, 280), seed=65)
    plan = api.plan(recipe({"base": a}, weights=(1,), chat_template="{% for"))
    assert "chat_template: not checked, as jinja2 is not installed" in plan.notes


def test_the_most_common_template(maker, tmp_path):
    tokenizer = bpe(TEXTS, 280)
    one, two = "{{ 'one' }}", "{{ 'two' }}"
    found = {
        n: maker.model(f"auto-{n}", tokenizer, seed=70 + i, template=t)
        for i, (n, t) in enumerate([("base", one), ("b", two), ("c", two), ("d", None)])
    }
    given = recipe(found, weights=(1, 1, 1, 1), chat_template="auto", tokenizer_source="base")
    api.merge(given, tmp_path / "out", threads=1)
    assert (tmp_path / "out/chat_template.jinja").read_text() == two
    own = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert own["chat_template"] == two


# --- schedules and sweeps ---


@pytest.fixture
def aligned(maker, shared_zoo):
    """A base, a model with its tokens in another order, and that model in the base's order."""
    one = bpe(TEXTS[:2], 300)
    two = permuted(one, 4)
    a, b = maker.model("walk-a", one, seed=121), maker.model("walk-b", two, seed=122)
    tensors, order = shared_zoo.read(b), [two.token_to_id(one.id_to_token(i)) for i in range(300)]
    for name in (EMBED, HEAD):
        tensors[name] = tensors[name][order]
    config = json.loads((a / "config.json").read_text())
    return a, b, shared_zoo.write("walk-c", tensors, config, dtype="F32")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_reads_moved_rows_as_it_reads_them_in_place(aligned, shared_zoo, name):
    a, b, c = aligned
    d = shared_zoo.tune(a, "walk-d", seed=9, dtype="F32")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (d / file).write_bytes((a / file).read_bytes())
        (c / file).write_bytes((a / file).read_bytes())
    method = METHODS[name]
    if name == "passthrough":
        pair = [[b], [c]]
    elif method.max_operands == 1:
        pair = [[a, b], [a, c]]
    else:
        pair = [[a, b], [a, c]] if method.base == "first" else [[a, b, d], [a, c, d]]
    known = {"weight": 0.4, "density": 0.6, "t": 0.3, "gamma": 0.05}
    given = {p.name: known[p.name] for p in method.parameters if p.name in known}
    made = []
    for models in pair:
        found = {"merge_method": name, "models": [{"model": str(m)} for m in models]}
        found |= {"parameters": given, "seed": 5, "tokenizer_source": str(a)}
        if method.base != "none":
            found["base_model"] = str(a)
        made.append({key: x.tobytes() for key, x in api.materialise(found, threads=2)})
    assert made[0] == made[1]


def test_a_schedule_walks_in_the_order_of_the_baseline(aligned, tmp_path):
    from fastmerge.engine.in_memory import materialise_plan
    from fastmerge.recipe.settings import constant
    from fastmerge.retrograde import open_space
    from fastmerge.retrograde.schedule import load
    from fastmerge.search.expressions import Model, blend

    a, b, c = aligned
    steps = {"steps": [{"degrade": {"partner": "next", "method": "slerp", "t": 0.3}}]}
    found = []
    for partner, line in ((b, {"tokenizer_source": "base"}), (c, {})):
        schedule = load({"baseline": str(a), "pool": [str(partner)], "schedule": steps, **line})
        cache = tmp_path / f"{partner.name}.npz"
        space = open_space(schedule, threads=1, cache=cache)
        again = open_space(schedule, threads=1, cache=cache)
        assert (again.grams == space.grams).all()
        state = blend("slerp", [Model(0), Model(1)], parameters={"t": constant(0.3)})
        made = {i.name: x.tobytes() for i, x in materialise_plan(space.plan(state), threads=1)}
        found.append((space.grams.tobytes(), made))
    assert found[0] == found[1]
    line["tokenizer_source"] = "union"
    with pytest.raises(fastmerge.FastmergeError, match="'tokenizer_source' must be 'base'"):
        load({"baseline": str(a), "pool": [str(b)], "schedule": steps, **line})


def test_a_sweep_moves_what_the_tokenizer_has_aligned(aligned, shared_zoo, tmp_path):
    from fastmerge.search.sweep import sweep

    a, b, c = aligned
    made = []
    for partner, line in ((b, {"tokenizer_source": "base"}), (c, {})):
        given = recipe({"base": a, "b": partner}, method="slerp", **line)
        for entry in given["models"]:
            entry.pop("parameters")
        given["parameters"] = {"t": 0.5}
        sweep(given, tmp_path / partner.name, [0.2, 0.7], threads=1)
        files = sorted((tmp_path / partner.name).glob("**/model.safetensors"))
        made.append([shared_zoo.read(file.parent) for file in files])
    assert len(made[0]) == len(made[1]) == 2
    for one, two in zip(*made, strict=True):
        assert all((one[name] == two[name]).all() for name in one)


def test_a_sweep_is_scored_with_the_tokenizer_that_it_makes(aligned, tmp_path, monkeypatch):
    from fastmerge.search import sweep

    a, b, _ = aligned
    seen = []

    def scorer(_settings, _folder, tokenizer, _function):
        seen.append(vocabulary(tokenizer))
        raise fastmerge.FastmergeError("enough")

    monkeypatch.setattr(sweep.Scoring, "of", scorer)
    given = recipe({"base": a, "b": b}, weights=(1, 1), tokenizer_source=str(b))
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0])
    with pytest.raises(fastmerge.FastmergeError, match="enough"):
        sweep.sweep(given, tmp_path / "out", [0.5], evaluate={"perplexity": str(text)})
    assert seen == [vocabulary(b)]


# --- refusals ---


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ({"tokenizer": {"source": "nowhere"}}, "nowhere"),
        ({"tokenizer": {"sauce": "union"}}, "did you mean 'source'?"),
        ({"tokenizer": {"tokens": {"nope": {}}}}, "no model has the token 'nope'"),
        ({"tokenizer": {"tokens": {"a": {"source": {"kind": "best"}}}}}, "kind 'best'"),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"model": "base", "token_id": 1}}}}},
            "write `kind: model_token` beside its token",
        ),
        (
            {"tokenizer": {"tokens": {"<|im_start|>": {"source": "base"}}}},
            "no token '<|im_start|>'",
        ),
        (
            {
                "tokenizer": {
                    "tokens": {
                        "a": {"source": {"kind": "model_token", "model": "base", "token_id": 999}}
                    }
                }
            },
            "none with the token_id 999",
        ),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "greater than or equal to 1"),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "not both"),
        ({"chat_template": "chatlm"}, "did you mean 'chatml'?"),
    ],
)
def test_what_cannot_be_is_one_line(trio, line, wanted):
    paths = {**trio, "base-path": trio["base"]}

    def located(value, key=""):
        if isinstance(value, dict):
            return {k: located(v, k) for k, v in value.items()}
        return str(paths["base"]) if value == "base" and key in ("source", "model") else value

    assert wanted in refused(recipe(trio, **located(line)))


def test_damaged_tokenizers_are_named(maker):
    tokenizer = bpe(TEXTS, 280)
    a = maker.model("damaged-a", tokenizer, seed=81)
    b = maker.model("damaged-b", permuted(tokenizer, 1), seed=82)
    given = recipe({"base": a, "b": b}, weights=(1, 1), tokenizer_source="union")
    file = b / "tokenizer.json"
    (b / "tokenizer_config.json").write_text("{}")  # it names tokens too
    for text, wanted in (
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no model.vocab"),
        ('{"model": {"vocab": {"a": -1}}}', "no whole number"),
        ('{"model": {"vocab": [1]}}', "no [piece, score]"),
        ('{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}', "no content, or no id"),
        ('{"model": {"vocab": {}}}', "no tokens"),
    ):
        file.write_text(text)
        message = refused(given)
        assert wanted in message
        assert "damaged-b" in message
    config = json.loads((b / "config.json").read_text())
    tokenizer.save(str(file))
    (b / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    assert "vocab_size 999" in refused(given)


def test_a_head_of_other_rows_than_the_embeddings_is_refused(maker, shared_zoo):
    one = bpe(TEXTS, 280)
    a = maker.model("head-a", one, seed=131)
    b = maker.model("head-b", permuted(one, 3), seed=132)
    tensors, config = shared_zoo.read(b), json.loads((b / "config.json").read_text())
    tensors[HEAD] = tensors[HEAD][:272]
    shared_zoo.write(b.name, tensors, config, dtype="F32")
    given = recipe({"base": a, "b": b}, weights=(1, 1), tokenizer_source="union")
    assert f"280 rows in {EMBED} and 272 in {HEAD}" in refused(given)


def test_without_a_tokenizer_line_other_sizes_are_refused_with_the_line(trio):
    assert "tokenizer_source: union" in refused(recipe(trio))
