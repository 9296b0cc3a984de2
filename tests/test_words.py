"""What is said where models do not fit, are quantised or are not there; and how much of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastmerge import api
from fastmerge.errors import FastmergeError, few_of_a_kind
from fastmerge.models.hub import resolve
from fastmerge.models.names import common_prefix, renamed
from fastmerge.models.summary import open_named, summarise

LLAMA = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]


def linear(*models):
    listed = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": listed}


def refusal(*models):
    with pytest.raises(FastmergeError) as caught:
        api.plan(linear(*models))
    return str(caught.value)


# ---------------------------------------------------------------- names and types


@pytest.mark.parametrize(
    ("change", "prefixes"),
    [
        (lambda n: f"_orig_mod.{n}", ("", "_orig_mod.")),
        (
            lambda n: n.replace("model.", "model.language_model."),
            ("model.", "model.language_model."),
        ),
        (lambda n: n.removeprefix("model."), ("model.", "")),
        (lambda n: f"base_model.model.{n}", ("", "base_model.model.")),
    ],
)
def test_names_that_differ_by_a_prefix(zoo, change, prefixes):
    assert renamed(LLAMA, [change(n) for n in LLAMA]) == prefixes
    a = zoo.base("a", layers=1)
    b = zoo.write("b", {change(n): x for n, x in zoo.read(a).items()})
    said = refusal(a, b)
    assert "the names differ only by a prefix" in said
    for prefix in filter(None, prefixes):
        assert f"'{prefix}' in '" in said


def test_slices_of_names_that_differ_by_a_prefix(zoo):
    a = zoo.base("a", layers=1)
    b = zoo.write("b", {f"language_model.{n}": x for n, x in zoo.read(a).items()})
    sources = [{"model": str(model), "layer_range": [0, 1]} for model in (a, b)]
    recipe = {
        "merge_method": "slerp",
        "base_model": str(a),
        "slices": [{"sources": sources}],
        "parameters": {"t": 0.5},
    }
    with pytest.raises(FastmergeError) as caught:
        api.plan(recipe)
    assert "names its layers (language_model.model.layers.N) otherwise" in str(caught.value)
    assert "the names differ only by a prefix, none in" in str(caught.value)


def test_a_prefix_is_told_where_a_tensor_is_missing_besides():
    theirs = [f"module.{n}" for n in LLAMA[:-1]]
    assert renamed(LLAMA, theirs) == ("", "module.")


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (LLAMA, LLAMA),
        (LLAMA, LLAMA[:-1]),
        (["a.q.weight"], ["a.k.weight"]),
        ([f"h.{i}.x.weight" for i in range(3)], [f"h.{i}.x.weight" for i in range(1, 4)]),
    ],
    ids=["equal", "fewer", "another tensor", "another layer"],
)
def test_other_names_differ_by_no_prefix(mine, theirs):
    assert renamed(mine, theirs) is None


def test_info_shows_the_prefix(zoo):
    a = zoo.base("a", layers=1)
    wrapped = zoo.write("b", {f"_orig_mod.{n}": x for n, x in zoo.read(a).items()})
    for model, prefix, layers in (
        (a, "", "model.layers"),
        (wrapped, "_orig_mod.", "_orig_mod.model.layers"),
    ):
        found = summarise(model)
        assert (found.prefix, found.layers) == (prefix, layers)
    assert common_prefix(["bert.a.w", "bert.a.x", "bert.ab"]) == "bert."


def test_both_types_of_a_buffer_are_named(zoo):
    ids = np.arange(4)
    a = zoo.raw("a", {"ids": ("I64", ids)})
    b = zoo.raw("b", {"ids": ("F16", ids.astype(np.float16))})
    assert "tensor 'ids' is int64 in model" in refusal(a, b)
    assert "but float16 in" in refusal(a, b)


# ---------------------------------------------------------------- quantised models

U8, I32, F16 = (np.zeros(4, t) for t in (np.uint8, np.int32, np.float16))
PACKED = {
    "gptq": {"q.qweight": ("I32", I32), "q.scales": ("F16", F16), "q.g_idx": ("I32", I32)},
    "awq": {"q.qweight": ("I32", I32), "q.qzeros": ("I32", I32), "q.scales": ("F16", F16)},
    "bitsandbytes 4": {"q.weight": ("U8", U8), "q.weight.absmax": ("F16", F16)},
    "bitsandbytes 8": {"q.weight": ("I8", U8), "q.SCB": ("F16", F16)},
    "mlx": {"q.weight": ("U32", I32), "q.scales": ("F16", F16), "q.biases": ("F16", F16)},
    "compressed-tensors": {"q.weight_packed": ("I32", I32), "q.weight_scale": ("F16", F16)},
    "int8": {"q.weight": ("I8", U8), "q.weight_scale": ("F16", F16)},
    "hqq": {"q.W_q": ("U8", U8), "q.scale": ("F16", F16), "q.zero": ("F16", F16)},
    "eetq": {"q.qweight": ("I8", U8), "q.weight_scales": ("F16", F16)},
    "fp8": {"q.weight": ("F8_E4M3", U8), "q.weight_scale_inv": ("F16", F16)},
    "quanto": {"q.weight._data": ("I8", U8), "q.weight._scale": ("F16", F16)},
    "marlin": {"layers.0.q.B": ("I32", I32[None]), "layers.0.q.s": ("F16", F16)},
    "exl3": {"q.trellis": ("I16", I32.astype(np.int16)), "q.suh": ("F16", F16)},
    "bitnet": {"q.weight": ("U8", U8[None]), "norm.weight": ("F16", F16)},
    "torchao": {"layers.0.q.weight:qdata": ("I8", U8[None]), "layers.0.q.s": ("F16", F16)},
    "mxfp4": {"e.up_blocks": ("U8", U8), "e.up_scales": ("U8", U8), "norm.weight": ("F16", F16)},
}


@pytest.mark.parametrize("kind", PACKED)
def test_codes_are_refused_though_they_are_equal_and_nothing_says_so(zoo, kind):
    a, b = (zoo.raw(name, PACKED[kind]) for name in "ab")
    said = refusal(a, b)
    assert "is quantised (tensor '" in said
    assert "does not dequantise; merge the original weights" in said
    copy = {"merge_method": "passthrough", "models": [{"model": str(a)}]}
    assert api.plan(copy).methods == {"copy": len(PACKED[kind])}


def test_buffers_beside_a_scale_of_their_own_kind_are_no_codes(zoo):
    ids = {"e.position_ids": ("I64", np.arange(4)), "e.scale": ("F16", F16)}
    mask = {"attn.bias": ("U8", U8), "norm.weight": ("F16", F16)}
    causal = {"h.0.attn.bias": ("U8", U8[None]), "h.0.ln_1.weight": ("F16", F16)}
    for name, tensors in {"ids": ids, "mask": mask, "causal": causal}.items():
        a, b = (zoo.raw(f"{name}{i}", tensors) for i in range(2))
        assert len(api.plan(linear(a, b)).tensors) == 2


SECTION = {"quant_method": "bitsandbytes", "load_in_4bit": True}
LEFTOVERS = {
    "quantization_config": {"quantization_config": SECTION},
    "text_config.quantization_config": {"text_config": {"quantization_config": SECTION}},
    "a.b.quantization": {"a": {"b": {"quantization": {"bits": 4}}}},
    "awq_config": {"awq_config": {"w_bit": 4}},
    "compression_config": {"compression_config": {"quant_method": "compressed-tensors"}},
}


@pytest.mark.parametrize("key", LEFTOVERS)
def test_a_leftover_section_is_told_as_that(zoo, key):
    a = zoo.write("a", {"w": np.ones(4)}, LEFTOVERS[key])
    said = refusal(a, zoo.write("b", {"w": np.ones(4)}))
    assert f"no tensor is packed: a leftover; remove '{key}' from its config.json" in said
    copy = {"merge_method": "passthrough", "models": [{"model": str(a)}]}
    assert any("a leftover; remove" in note for note in api.plan(copy).notes)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_file_beside_the_weights_says_it_too(zoo, name):
    plain = zoo.write("plain", {"w": np.ones(4)})
    packed = zoo.raw("packed", PACKED["gptq"])
    for folder in (plain, packed):
        (folder / name).write_text('{"bits": 4}')
    assert f"a leftover; delete {name}" in refusal(plain, plain.parent / "packed")
    assert f"is quantised ({name} in {name})" in refusal(packed, plain)


def test_empty_sections_say_nothing(zoo):
    a = zoo.write("a", {"w": np.ones(4)}, {"quantization_config": {}, "quantization": None})
    assert (
        api.plan(linear(a, zoo.write("b", {"w": np.ones(4)}))).config["quantization_config"] == {}
    )


def test_a_scaled_copy_of_a_quantised_model_is_refused(zoo):
    a = zoo.raw("a", PACKED["gptq"])
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": str(a), "parameters": {"scale": [{"filter": "q", "value": 2}]}}],
    }
    with pytest.raises(FastmergeError, match="is quantised"):
        api.plan(recipe)


# ---------------------------------------------------------------- metadata


@pytest.mark.parametrize("metadata", [None, {}, {"format": "mlx"}, {"é": "模"}])
def test_metadata_that_the_library_reads(tmp_path, metadata):
    header = {
        "__metadata__": metadata,
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert len(api.plan(linear(file)).tensors) == 1


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize("reference", ["./gone", "here/gone", "gone.safetensors", "here/x/gone"])
def test_a_missing_path_says_where_it_was_looked_for(tmp_path, monkeypatch, reference):
    def never(*_args, **_kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastmergeError) as caught:
        resolve(reference)
    place = tmp_path / reference
    assert f"{reference}: no such folder or file (looked for {place})" in str(caught.value)
    assert ("@main" in str(caught.value)) == (reference == "here/gone")


def test_a_schedules_missing_path_names_both_places(tmp_path, monkeypatch):
    from fastmerge.planning.planner import make_plan

    (tmp_path / "schedules").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastmergeError) as caught:
        make_plan(linear("./gone"), base_folder=tmp_path / "schedules")
    assert f"{tmp_path}/schedules/gone and {tmp_path}/gone" in str(caught.value)


# ---------------------------------------------------------------- how much is said


def test_five_notes_of_a_kind_and_a_count():
    notes = [f"r.yml:{i}: filter 'nix{i}' matches no tensor" for i in range(30)]
    found = few_of_a_kind(["first", *notes, "last"])
    assert found == (
        "first",
        *notes[:5],
        "25 more of the kind: r.yml:...: filter ... matches no tensor",
        "last",
    )


def test_many_filters_that_match_nothing(zoo):
    recipe = linear(zoo.base("a", layers=1))
    rules = [{"filter": f"nix{i}", "value": i} for i in range(50)]
    recipe["models"][0]["parameters"]["weight"] = [*rules, {"value": 1}]
    notes = [note for note in api.plan(recipe).notes if "filter" in note]
    assert len(notes) == 6
    assert notes[-1].startswith("45 more of the kind:")


def test_a_message_shows_the_ends_of_a_megabyte():
    said = str(FastmergeError(f"r.yml:8: unknown dtype '{'x' * 1_000_000}'; known: bfloat16"))
    assert len(said) < 1600
    assert said.startswith("r.yml:8: unknown dtype 'xxx")
    assert said.endswith("xxx'; known: bfloat16")
    assert len(str(FastmergeError("y" * 1600))) == 1600


@pytest.mark.parametrize("end", ["", "/tree/main", "/resolve/main/config.json"])
def test_an_address_of_the_hub_is_told_its_id(end):
    with pytest.raises(FastmergeError, match="write 'some/model'"):
        resolve(f"https://huggingface.co/some/model{end}")


def test_a_folder_above_the_model_says_where_the_model_is(zoo):
    inner = zoo.root / "models--a--b" / "snapshots" / "abc"
    inner.parent.mkdir(parents=True)
    zoo.write("plain", {"w": np.ones(4)}).rename(inner)
    for above in (inner.parent, inner.parent.parent):
        with pytest.raises(FastmergeError, match=f"the model is in {inner}: give that"):
            api.plan(linear(above, inner))


def test_a_base_with_an_adapter_is_no_folder_to_look_at(zoo):
    reference = f"{zoo.base()}+{zoo.root / 'lora'}"
    with pytest.raises(FastmergeError, match=r"which recipes take; `fastmerge fold` writes it"):
        open_named(reference)


def test_a_distributed_checkpoint_is_no_folder_to_look_at(zoo):
    folder = zoo.root / "dcp"
    folder.mkdir()
    (folder / ".metadata").touch()
    with pytest.raises(FastmergeError, match=r"`fastmerge average .*dcp -o OUT` writes it as safe"):
        open_named(str(folder))


def test_a_folder_of_several_models_says_how_many_there_are(zoo):
    inner = [zoo.write(name, {"w": np.ones(4)}) for name in ("step-1", "step-2")]
    with pytest.raises(FastmergeError, match=rf"2 models are in it, as {inner[0]}: give one"):
        api.plan(linear(zoo.root, inner[1]))
