"""Tokenizers and embeddings of models that differ in tokens: against mergekit, and by the rows."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import yaml

from fastmerge import api, llama
from fastmerge.tree.nodes import Rows, walk
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
    unigram,
    vocabulary,
    words,
)  # fmt: skip


@pytest.fixture(scope="module")
def maker(shared_zoo):
    return Maker(shared_zoo)


@pytest.fixture(scope="module")
def trio(maker):
    return trio_of(maker, "rows")


def theirs(given, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(given))),
        str(out),
        MergeOptions(quiet=True, write_model_card=False),
    )
    return out


REQUESTS = {
    "union": {"tokenizer_source": "union"},
    "base": {"tokenizer_source": "base"},
    "a model": {"tokenizer_source": "other"},
    "another model": {"tokenizer": {"source": "chat"}},
    "tokens": {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<|im_end|>": {"source": "other"},
                "<|im_start|>": {"source": {"kind": "model_token", "model": "base", "token": "e"}},
                "a": {"source": "chat", "force": True},
                "b": {
                    "source": {"kind": "model_token", "model": "other", "token_id": 7},
                    "force": True,
                },
                "c": {"source": {"kind": "zero"}, "force": True},
            },
        }
    },
}


def named(value, models):
    """A request with the models' paths for their names."""
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        is_model = isinstance(inner, str) and inner in models
        is_word = inner == "base" and key != "model"
        found[key] = str(models[inner]) if is_model and not is_word else named(inner, models)
    return found


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_the_rows_are_mergekits(trio, shared_zoo, tmp_path, request_name, with_base):
    if request_name == "base" and not with_base:
        pytest.skip("mergekit then takes a model by chance")
    given = recipe(trio, base="base" if with_base else None, **named(REQUESTS[request_name], trio))
    api.merge(given, tmp_path / "ours", threads=2)
    theirs(given, tmp_path / "theirs")
    own, other = (vocabulary(tmp_path / name) for name in ("ours", "theirs"))
    assert own.keys() == other.keys()  # the ids of new tokens are theirs by chance
    a, b = (shared_zoo.read(tmp_path / name) for name in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for name in a:
        if name not in (EMBED, HEAD):
            assert (a[name] == b[name]).all(), name
            continue
        assert a[name].shape == b[name].shape
        for token, number in own.items():
            np.testing.assert_allclose(
                a[name][number], b[name][other[token]], rtol=0, atol=2e-8, err_msg=token
            )
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("ours", "theirs")]
    assert configs[0]["vocab_size"] == configs[1]["vocab_size"] == len(own)


@pytest.mark.parametrize("method", ["slerp", "ties", "task_arithmetic", "model_stock", "karcher"])
def test_methods_see_what_mergekits_see(trio, shared_zoo, tmp_path, method):
    chosen = {name: trio[name] for name in ("base", "chat", "other")}
    if method == "slerp":
        chosen.pop("other")
    given = recipe(chosen, method=method, tokenizer_source="union")
    for entry in given["models"]:
        if method in ("slerp", "model_stock", "karcher"):
            entry.pop("parameters")
    given["parameters"] = {"t": 0.4} if method == "slerp" else {}
    api.merge(given, tmp_path / "ours", threads=2)
    theirs(given, tmp_path / "theirs")
    own, other = (vocabulary(tmp_path / name) for name in ("ours", "theirs"))
    a, b = (shared_zoo.read(tmp_path / name) for name in ("ours", "theirs"))
    order = [other[token] for token in sorted(own, key=own.__getitem__)]
    for name in (EMBED, HEAD):
        np.testing.assert_allclose(a[name], b[name][order], rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize(
    ("kind", "one", "two"),
    [
        ("bpe", bpe(TEXTS[:2], 300), permuted(bpe(TEXTS[2:], 330, ["<|im_end|>"]), 1)),
        ("unigram", unigram(TEXTS, 90), permuted(unigram(TEXTS[2:], 80, ["<|im_end|>"]), 2)),
        (
            "words",
            words([w for w in TEXTS[0].split() if w != "the"]),
            permuted(words(sorted({*TEXTS[0].split(), *TEXTS[1].split()}), ["<|im_end|>"]), 4),
        ),
        ("of two kinds", bpe(TEXTS[:2], 300), words(sorted({*TEXTS[0].split()}), ["<|im_end|>"])),
    ],
)
def test_texts_come_back_and_ids_have_their_rows(maker, shared_zoo, tmp_path, kind, one, two):
    from transformers import AutoTokenizer

    a = maker.model(f"a-{kind}", one, seed=11)
    b = maker.model(f"b-{kind}", two, seed=12)
    given = recipe({"base": a, "b": b}, weights=(0.5, 0.5), tokenizer_source="union")
    api.merge(given, tmp_path / "out", threads=2)
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.get_vocab().keys() == one.get_vocab().keys() | two.get_vocab().keys()
    assert sorted(made.get_vocab().values()) == list(range(len(made)))
    rows = shared_zoo.read(tmp_path / "out")[EMBED]
    x, y = shared_zoo.read(a)[EMBED], shared_zoo.read(b)[EMBED]
    assert len(rows) == len(made)
    for text in (TEXTS[0], TEXTS[1] + "<|im_end|>", TEXTS[3]):
        ids = made(text, add_special_tokens=False)["input_ids"]
        if kind != "words" or text is TEXTS[0]:
            shown = made.decode(ids)
            plain = text.replace(" ", "") if kind == "words" else text
            if kind != "unigram" or "<unk>" not in shown:
                assert shown.replace(" ", "") == plain.replace(" ", "")
        for number, token in zip(ids, made.convert_ids_to_tokens(ids), strict=True):
            own, other = one.token_to_id(token), two.token_to_id(token)
            p = x[own] if own is not None else y[other]
            q = y[other] if other is not None else x[own]
            np.testing.assert_allclose(rows[number], (p + q) / 2, atol=1e-7, err_msg=token)
    assert made("<|im_end|>", add_special_tokens=False)["input_ids"] == [
        made.convert_tokens_to_ids("<|im_end|>")
    ]


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "LlamaTokenizer", "T5Tokenizer"])
def test_classes_that_build_a_tokenizer_themselves_keep_its_ids(maker, tmp_path, name):
    import transformers

    build = unigram if name == "T5Tokenizer" else bpe
    found = {}
    for key, texts, seed in (("base", TEXTS[:2], 101), ("b", TEXTS[2:], 102)):
        made = build(texts, 300 if build is bpe else 60)
        made.add_tokens([f"<|{key}|>"])
        made = permuted(made, seed)
        made.save(str(tmp_path / "tokenizer.json"))
        own = getattr(transformers, name)(
            tokenizer_file=str(tmp_path / "tokenizer.json"),
            bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        )  # fmt: skip
        folder = maker.model(f"class-{name}-{key}", made, seed=seed, rows=len(own))
        own.save_pretrained(folder)
        found[key] = folder
    api.merge(recipe(found, weights=(1, 1), tokenizer_source="union"), tmp_path / "o", threads=1)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "o")
    assert made.get_vocab() == vocabulary(tmp_path / "o")
    assert len(made) == json.loads((tmp_path / "o/config.json").read_text())["vocab_size"]
    assert vocabulary(found["base"]).items() <= made.get_vocab().items()
    assert made("<|b|>", add_special_tokens=False)["input_ids"] == [made.get_vocab()["<|b|>"]]


def sentencepiece_only(shared_zoo, name, texts, size, seed):
    import sentencepiece

    corpus = shared_zoo.root / f"{name}.txt"
    corpus.write_text("\n".join(texts * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(shared_zoo.root / name), vocab_size=size,
        model_type="bpe", character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    folder = shared_zoo.base(name, seed=seed, dtype="F32", vocab=size)
    (shared_zoo.root / f"{name}.model").rename(folder / "tokenizer.model")
    own = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    return folder


def test_folders_of_sentencepiece_alone(shared_zoo, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    a = sentencepiece_only(shared_zoo, "sp-a", TEXTS[:2], 80, 111)
    b = sentencepiece_only(shared_zoo, "sp-b", TEXTS[2:], 90, 112)
    given = recipe({"base": a, "b": b}, weights=(0.5, 0.5), tokenizer_source="union")
    api.merge(given, tmp_path / "out", threads=1)
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.decode(made(TEXTS[1])["input_ids"], skip_special_tokens=True) == TEXTS[1]
    x, y, z = (shared_zoo.read(path)[EMBED] for path in (a, b, tmp_path / "out"))
    ids = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (a, b)]
    for token, number in made.get_vocab().items():
        rows = [m[own[token]] for m, own in zip((x, y), ids, strict=True) if token in own]
        np.testing.assert_allclose(z[number], np.mean(rows, axis=0), atol=1e-7)
    assert not (tmp_path / "out/tokenizer.model").exists()  # it has not the new tokens
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refused(given)
    assert "has no tokenizer.json (only tokenizer.model)" in message
    assert "save_pretrained" in message
    c = shared_zoo.tune(a, "sp-c", dtype="F32")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (c / name).write_bytes((a / name).read_bytes())
    same = recipe({"base": a, "c": c}, weights=(0.5, 0.5), tokenizer_source="union")
    assert api.plan(same).vocabulary is None  # equal files need no package


def test_the_base_tokenizer_with_permuted_tokens_of_equal_number(maker, shared_zoo, tmp_path):
    one = bpe(TEXTS[:2], 300)
    two = permuted(one, 9)
    a, b = maker.model("perm-a", one, seed=21), maker.model("perm-b", two, seed=22)
    given = recipe({"base": a, "b": b}, weights=(0.5, 0.5), tokenizer_source="base")
    api.merge(given, tmp_path / "out", threads=2)
    ids, other = one.get_vocab(), two.get_vocab()
    x, y, z = (shared_zoo.read(path)[HEAD] for path in (a, b, tmp_path / "out"))
    for token, number in ids.items():
        np.testing.assert_allclose(z[number], (x[number] + y[other[token]]) / 2, atol=1e-7)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("line", [{"tokenizer_source": "union"}, {"tokenizer": {}}])
def test_equal_vocabularies_are_a_copy(maker, tmp_path, line):
    tokenizer = bpe(TEXTS, 280)
    a = maker.model("same-a", tokenizer, seed=31, rows=320)  # padded, as qwen's are
    b = maker.model("same-b", tokenizer, seed=32, rows=320)
    plan = api.plan(recipe({"base": a, "b": b}, weights=(1, 1), **line))
    assert not any(isinstance(n, Rows) for item in plan.tensors for n in walk(item.root))
    assert plan.vocabulary is None
    assert plan.config["vocab_size"] == 320
    api.merge(plan, tmp_path / "out", threads=1)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()


def test_padding_is_the_mean_of_the_rows(trio, shared_zoo, tmp_path):
    line = {"source": "union", "pad_to_multiple_of": 64}
    given = recipe(trio, tokenizer=line)
    plain = recipe(trio, tokenizer_source="union")
    api.merge(given, tmp_path / "padded", threads=2)
    api.merge(plain, tmp_path / "plain", threads=2)
    a, b = (shared_zoo.read(tmp_path / name) for name in ("padded", "plain"))
    for name in (EMBED, HEAD):
        count = len(b[name])
        assert len(a[name]) == -(-count // 64) * 64
        assert (a[name][:count] == b[name]).all()
        wanted = np.broadcast_to(b[name].mean(axis=0), a[name][count:].shape)
        np.testing.assert_allclose(a[name][count:], wanted, atol=1e-7)
    config = json.loads((tmp_path / "padded/config.json").read_text())
    assert config["vocab_size"] == len(a[EMBED])


def test_tokens_without_a_row_are_left_out(maker, shared_zoo, tmp_path):
    unused = ["<unused_0>", "<unused_1>"]
    a = maker.model("short-a", bpe(TEXTS, 280, unused), seed=41, rows=280)
    b = maker.model("short-b", bpe(TEXTS, 280, ["<|im_end|>"]), seed=42)
    given = recipe({"base": a, "b": b}, weights=(0.5, 0.5), tokenizer_source="union")
    report = api.merge(given, tmp_path / "out", threads=1)
    found = vocabulary(tmp_path / "out")
    assert "<|im_end|>" in found
    assert not found.keys() & set(unused)
    assert len(shared_zoo.read(tmp_path / "out")[EMBED]) == len(found) == 281
    assert any("2 of its tokens have none" in note for note in report.notes)


def test_ids_in_configs_follow_the_tokenizer(maker, tmp_path):
    one = bpe(TEXTS, 280)
    two = permuted(bpe(TEXTS, 280, ["<|im_end|>"]), 5)
    a = maker.model("ids-a", one, seed=51, config={"pad_token_id": one.token_to_id("e")})
    b = maker.model("ids-b", two, seed=52, config={"eos_token_id": 280})
    generation = {"eos_token_id": [2, one.token_to_id("t")], "bos_token_id": 1, "top_p": 0.9}
    (a / "generation_config.json").write_text(json.dumps(generation))
    given = recipe({"base": a, "b": b}, weights=(0.5, 0.5), tokenizer_source=str(b))
    api.merge(given, tmp_path / "out", threads=1)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["bos_token_id"] == two.token_to_id("<s>")
    assert config["eos_token_id"] == 280  # what the tokenizer's model says
    assert config["pad_token_id"] == two.token_to_id("e")  # the same token
    assert config["vocab_size"] == 281
    made = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert made == {"eos_token_id": 280, "bos_token_id": two.token_to_id("<s>"), "top_p": 0.9}


def test_a_document_of_documents_is_the_merge_of_what_they_write(trio, shared_zoo, tmp_path):
    inner = recipe({n: trio[n] for n in ("base", "chat")}, method="slerp", tokenizer_source="union")
    for entry in inner["models"]:
        entry.pop("parameters")
    inner |= {"parameters": {"t": 0.3}, "name": "first"}
    outer = recipe({"other": trio["other"], "first": "first"}, base=None, weights=(0.6, 0.4))
    outer |= {"tokenizer_source": "union", "base_model": str(trio["other"])}
    api.merge([inner, outer], tmp_path / "whole", threads=2)
    api.merge({**inner, "name": None}, tmp_path / "first", threads=2)
    outer["models"][1]["model"] = str(tmp_path / "first")
    api.merge(outer, tmp_path / "parts", threads=2)
    a, b = (shared_zoo.read(tmp_path / name) for name in ("whole", "parts"))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-7, err_msg=name)
    assert vocabulary(tmp_path / "whole") == vocabulary(tmp_path / "parts")
    outer["models"] = outer["models"][:1]  # named by the tokenizer alone
    api.merge([{**outer, "tokenizer_source": "first"}, inner], tmp_path / "named", threads=2)
    found = json.loads((tmp_path / "named/config.json").read_text())
    assert found["vocab_size"] == len(vocabulary(tmp_path / "first"))


@pytest.mark.parametrize("tied", ["base", "other"])
def test_one_real_head_among_tied_ones_is_not_lost(maker, shared_zoo, tmp_path, tied):
    from transformers import AutoModelForCausalLM

    models = {
        name: maker.model(
            f"head-{tied}-{name}",
            bpe(TEXTS, 280, added=() if name == "base" else ("<tool>",)),
            seed=70 + seed,
            tied=name == tied,
        )
        for seed, name in enumerate(("base", "other"))
    }
    given = recipe(models, weights=(0.5, 0.5), tokenizer_source="union")
    report = api.merge(given, tmp_path / "out", threads=1)
    assert any("ties its head to its embeddings" in note for note in report.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    head = shared_zoo.read(tmp_path / "out")[HEAD]
    np.testing.assert_array_equal(loaded.lm_head.weight.detach().numpy(), head)
    assert not np.array_equal(head, loaded.model.embed_tokens.weight.detach().numpy())


def test_slices_take_their_ends_from_models_with_other_tokens(trio, shared_zoo, tmp_path):
    given = {
        "merge_method": "passthrough",
        "dtype": "float32",
        "tokenizer_source": "union",
        "slices": [
            {"sources": [{"model": str(trio["base"]), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(trio["chat"]), "layer_range": [1, 2]}]},
        ],
    }
    api.merge(given, tmp_path / "out", threads=1)
    found, own = shared_zoo.read(tmp_path / "out"), vocabulary(tmp_path / "out")
    for name, first, second in ((EMBED, "base", "chat"), (HEAD, "chat", "base")):
        x, y = shared_zoo.read(trio[first])[name], shared_zoo.read(trio[second])[name]
        ids, other = vocabulary(trio[first]), vocabulary(trio[second])
        for token, number in own.items():
            row = x[ids[token]] if token in ids else y[other[token]]
            assert (found[name][number] == row).all()


def test_merged_in_memory_is_merged_to_a_folder(trio, tmp_path):
    given = recipe(trio, tokenizer={"source": "union", "pad_to_multiple_of": 16})
    api.merge(given, tmp_path / "out", threads=2)
    loaded, merged = llama.load(tmp_path / "out"), llama.load_merged(given, threads=2)
    state = merged.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert (tensor == state[name]).all(), name
    made = llama.load_tokenizer(given)
    text = TEXTS[1] + "<|im_end|>"
    assert made(text)["input_ids"] == llama.load_tokenizer(tmp_path / "out")(text)["input_ids"]


def test_tokens_in_another_order_are_noted_where_nothing_is_asked(maker):
    one = bpe(TEXTS[:2], 300)
    a = maker.model("noted-a", one, seed=91)
    b = maker.model("noted-b", permuted(one, 2), seed=92)
    c = maker.model("noted-c", one, seed=93, template="{{ 'another file' }}")
    notes = api.plan(recipe({"base": a, "b": b}, weights=(1, 1))).notes
    assert any("rows of different tokens are merged; write `tokenizer_s" in n for n in notes)
    assert not any(
        "token" in n for n in api.plan(recipe({"base": a, "c": c}, weights=(1, 1))).notes
    )


def test_embeddings_are_cut_on_demand(maker, shared_zoo, tmp_path):
    one = bpe(TEXTS, 280)
    a = maker.model("cut-a", one, seed=95, rows=300)
    b = maker.model("cut-b", one, seed=96)
    given = recipe({"base": a, "b": b}, weights=(0.5, 0.5))
    assert "vocabulary mismatch" in refused(given)
    plan = api.plan(given, truncate_embeddings=True)
    assert any(note.startswith("UNSAFE vocabulary truncation") for note in plan.notes)
    api.merge(plan, tmp_path / "out", threads=1)
    x, y, z = (shared_zoo.read(path)[EMBED] for path in (a, b, tmp_path / "out"))
    assert (z == (x[:280] * np.float32(0.5) + y * np.float32(0.5))).all()
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 300
    )  # as mergekit
    line = {**given, "tokenizer_source": "base"}
    assert api.plan(line, truncate_embeddings=True).config["vocab_size"] == 280


# --- what it costs ---


def test_no_matrix_is_made_but_of_rows_that_no_file_has(trio, monkeypatch):
    from fastmerge.compute.cpu import CpuBackend
    from fastmerge.compute.leaves import view_of
    from fastmerge.engine.inputs import Inputs

    asked = []
    scratch = CpuBackend.scratch
    monkeypatch.setattr(
        CpuBackend, "scratch", lambda self, count: (asked.append(count), scratch(self, count))[1]
    )
    plan = api.plan(recipe(trio, tokenizer={"source": "union", "pad_to_multiple_of": 64}))
    found = [n for item in plan.tensors for n in walk(item.root) if isinstance(n, Rows)]
    assert len(found) == 6  # three models, embeddings and head
    backend, inputs = CpuBackend(1), Inputs(plan.models)
    for leaf in found:
        view = view_of(leaf, backend, inputs.fetch)
        assert view.is_gathered
        assert view.count == leaf.shape[0] * leaf.shape[1]
    width = found[0].shape[1]
    assert set(asked) == {width, 2 * width}  # the padding, and <|im_end|> for the base
    plain = api.plan(recipe(trio, tokenizer_source="union"))
    asked.clear()
    for item in plain.tensors:
        for leaf in walk(item.root):
            if isinstance(leaf, Rows):
                view_of(leaf, backend, inputs.fetch)
    assert set(asked) == {width}
