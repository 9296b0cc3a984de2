"""The result of a plan is one model: its configs, its slices, its tensors and its config agree."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fastmerge
from fastmerge.api import check
from fastmerge.errors import FastmergeError
from fastmerge.planning.planner import make_plan


def model(zoo, name, *, layers=4, seed=0, hidden=32, vocab=40, tensors=None, **change):
    """A llama with another config or other tensors (None leaves one out) than its shape has."""
    folder = zoo.base(name, layers=layers, seed=seed, hidden=hidden, vocab=vocab)
    config = json.loads((folder / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    found = zoo.read(folder) | (tensors or {})
    zoo.write(name, {n: x for n, x in found.items() if x is not None}, config)
    return str(folder)


def linear(*models):
    return {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in models],
    }


def stack(*parts):
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in parts],
    }


# ---------------------------------------------------------------- configs that disagree

DIFFERENT = {
    "rope_theta": ({"rope_theta": 5e6}, "rope_theta is not given in '{a}', 5000000.0 in '{b}'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is not given in '{a}', \"gelu\" in"),
    "norm": ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-05 in '{a}', 1e-06 in '{b}'"),
    "type": ({"model_type": "mistral"}, 'model_type is "llama" in \'{a}\', "mistral" in'),
    "window": ({"sliding_window": 16}, "sliding_window is not given in '{a}', 16 in"),
    "scaling": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        'rope_scaling is not given in \'{a}\', {{"factor": 4.0, "rope_type": "linear"}} in',
    ),
    "nested": ({"attn": {"scale": 2.0}}, "attn.scale is not given in '{a}', 2.0 in"),
    "stop": ({"eos_token_id": [2, 3]}, "eos_token_id is 2 in '{a}', [2, 3] in"),
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("sliced", [False, True])
def test_another_setting_is_one_note_with_both_values(name, sliced, zoo):
    change, said = DIFFERENT[name]
    a, b = model(zoo, "a"), model(zoo, "b", seed=1, **change)
    plan = make_plan(stack((a, 0, 2), (b, 2, 4)) if sliced else linear(a, b))
    (note,) = plan.notes
    assert said.format(a=a, b=b) in note and note.endswith("the output has the first")


SAME = {
    "who wrote it": {"transformers_version": "9", "_name_or_path": "x", "use_cache": False},
    "training": {"attention_dropout": 0.1, "initializer_range": 1.0, "router_aux_loss_coef": 0.1},
    "off or absent": {"attention_bias": False, "rope_scaling": None, "sliding_window": 0},
    "what follows": {"head_dim": 8},
    "tokens that pad": {"pad_token_id": 7},
    "generation": {"temperature": 0.5, "top_p": 0.9},
}


@pytest.mark.parametrize("name", SAME)
def test_what_means_nothing_is_not_told(name, zoo):
    assert make_plan(linear(model(zoo, "a"), model(zoo, "b", seed=1, **SAME[name]))).notes == ()


def test_both_ways_to_write_rotary_settings_are_one(zoo):
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}}
    assert make_plan(linear(model(zoo, "a", **old), model(zoo, "b", seed=1, **new))).notes == ()


def test_five_differences_are_told_and_the_rest_counted(zoo):
    change = {f"scale_{i}": 2.0 for i in range(7)}
    notes = make_plan(linear(model(zoo, "a"), model(zoo, "b", seed=1, **change))).notes
    assert len(notes) == 6
    assert notes[5] == "config.json: 2 more keys differ: scale_5, scale_6"


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
    ],
)
def test_heads_that_cut_one_matrix_differently_are_refused(change, zoo):
    a, b = model(zoo, "a"), model(zoo, "b", seed=1, **change)
    for recipe in (linear(a, b), stack((a, 0, 2), (b, 2, 4))):
        with pytest.raises(FastmergeError, match=r"into other heads .*num_attention_heads 4 and"):
            make_plan(recipe)


def test_other_kinds_of_heads_are_refused_too(zoo):
    a, b = model(zoo, "a", mamba_n_heads=4), model(zoo, "b", seed=1, mamba_n_heads=2)
    with pytest.raises(FastmergeError, match="mamba_n_heads 4 and 2"):
        make_plan(linear(a, b))


# ---------------------------------------------------------------- slices


def test_two_vocabularies_do_not_stack(zoo):
    a, b = model(zoo, "a"), model(zoo, "b", seed=1, vocab=42)
    with pytest.raises(FastmergeError, match=r"vocabulary mismatch: 40 rows .* 42 in"):
        make_plan(stack((a, 0, 2), (b, 2, 4)))


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({"model.layers.3.self_attn.q_norm.weight": np.ones(8)}, "only the former have 'model.lay"),
        ({"model.layers.3.mlp.up_proj.weight": None}, "only the latter have 'mlp.up_proj.weight'"),
        (
            {"model.layers.3.mlp.up_proj.weight": np.ones((96, 32))},
            r"\[96, 32\], there \[48, 32",
        ),
    ],
)
def test_slices_of_two_architectures_do_not_stack(tensors, said, zoo):
    a, b = model(zoo, "a"), model(zoo, "b", seed=1, tensors=tensors)
    with pytest.raises(FastmergeError, match=said):
        make_plan(stack((a, 0, 2), (b, 2, 4)))


def test_slices_of_two_widths_do_not_stack(zoo):
    a, b = model(zoo, "a"), model(zoo, "b", hidden=64)
    with pytest.raises(FastmergeError, match="do not stack"):
        make_plan(stack((a, 0, 2), (b, 2, 4)))


# ---------------------------------------------------------------- tensors and config


@pytest.mark.parametrize(
    "change, said",
    [
        ({"vocab_size": 42}, "vocab_size 42, and tensor 'model.embed_tokens.weight' is .40, 32"),
        ({"hidden_size": 64, "head_dim": 8}, "hidden_size 64, and tensor"),
        ({"intermediate_size": 64}, "intermediate_size 64, and tensor"),
        ({"num_key_value_heads": 4}, "num_key_value_heads x head_dim 32, and tensor"),
        ({"num_attention_heads": 8, "head_dim": 8}, "num_attention_heads x head_dim 64, and"),
        ({"num_hidden_layers": 5}, "has no layer 4"),
    ],
)
def test_a_config_that_contradicts_its_tensors_is_refused(change, said, zoo):
    with pytest.raises(FastmergeError, match=said):
        make_plan(linear(model(zoo, "a", **change), model(zoo, "b", seed=1, **change)))


def test_for_a_type_that_nobody_knows_it_is_noted(zoo):
    change = {"model_type": "nobody_knows", "vocab_size": 42}
    plan = make_plan(linear(model(zoo, "a", **change), model(zoo, "b", seed=1, **change)))
    (note,) = plan.notes
    assert "vocab_size 42" in note and "[40, 32]" in note


def test_an_empty_tensor_is_refused(zoo):
    empty = {"model.norm.weight": np.zeros(0)}
    a, b = (model(zoo, name, tensors=empty) for name in "ab")
    with pytest.raises(FastmergeError, match=r"'model\.norm\.weight' is empty"):
        make_plan(linear(a, b))


@pytest.mark.parametrize("method", ["linear", "ties", "sce", "magmax"])
def test_a_tensor_whose_rows_are_empty_is_written_as_it_is(method, zoo, tmp_path):
    """DINOv3's register tokens, where its config wants none."""
    none = {"model.register_tokens": np.zeros((1, 0, 32))}
    a, b = (model(zoo, name, seed=i, tensors=none) for i, name in enumerate("ab"))
    recipe = linear(a, b) if method == "linear" else linear(b) | {"base_model": a}
    if method in ("sce", "magmax"):
        del recipe["models"][0]["parameters"]
    fastmerge.merge(recipe | {"merge_method": method}, tmp_path / "out", threads=1)
    assert zoo.read(tmp_path / "out")["model.register_tokens"].shape == (1, 0, 32)


def test_a_tensor_that_one_layer_lacks_is_told(zoo):
    lost = {"model.layers.2.mlp.up_proj.weight": None}
    a, b = (model(zoo, name, seed=i, tensors=lost) for i, name in enumerate("ab"))
    (note,) = make_plan(linear(a, b)).notes
    assert note.startswith("layer 2 of") and "lacks mlp.up_proj.weight" in note


def test_a_head_that_nothing_makes_is_told(zoo):
    a, b = (
        model(zoo, name, seed=i, tensors={"lm_head.weight": None}) for i, name in enumerate("ab")
    )
    (note,) = make_plan(linear(a, b)).notes
    assert "has no head" in note and "random numbers" in note


# ---------------------------------------------------------------- --check


def test_check_returns_the_plan_of_what_loads(zoo):
    pytest.importorskip("transformers")
    a = model(zoo, "a")
    assert check(stack((a, 0, 3), (a, 1, 4))).config["num_hidden_layers"] == 6


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({"model.norm.weight": None}, "missing weight model.norm.weight"),
        ({"model.norm.weight": np.ones(5)}, r"mismatched weight model.norm.weight \(\[5\], .*32"),
        ({"model.other.weight": np.ones(5)}, "unexpected weight model.other.weight"),
    ],
)
def test_check_compares_every_name_and_shape(tensors, said, zoo, tmp_path):
    pytest.importorskip("transformers")
    a, b = (model(zoo, name, seed=i, tensors=tensors) for i, name in enumerate("ab"))
    make_plan(linear(a, b))
    with pytest.raises(FastmergeError, match=said) as error:
        check(linear(a, b))
    assert "\n" not in str(error.value)
    with pytest.raises(FastmergeError, match=said):
        fastmerge.merge(linear(a, b), tmp_path / "out", check=True)
    assert not (tmp_path / "out").exists()


def test_check_of_a_type_that_transformers_does_not_know(zoo):
    pytest.importorskip("transformers")
    with pytest.raises(FastmergeError, match=r"does not know .* model_type 'nobody_knows'"):
        check(linear(model(zoo, "a", model_type="nobody_knows")))


def test_check_without_transformers_says_so(zoo, monkeypatch):
    from fastmerge.planning import loading

    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(FastmergeError, match="needs torch, transformers and accelerate"):
        check(linear(model(zoo, "a")))


# ---------------------------------------------------------------- experts and what is not there


def experts(count, layers=4):
    return {
        f"model.layers.{i}.block_sparse_moe.experts.{j}.w1.weight": np.ones((4, 32), np.float32)
        for i in range(layers)
        for j in range(count)
    }


def test_as_many_experts_as_the_config_counts(zoo):
    a = model(zoo, "a", tensors=experts(4), model_type="mixtral", num_local_experts=8)
    with pytest.raises(FastmergeError, match=r"num_local_experts 8, and 'model\.layers\.0"):
        make_plan(linear(a))
    b = model(zoo, "b", tensors=experts(4), model_type="mixtral", num_local_experts=4)
    assert not make_plan(linear(b)).notes
    c = model(zoo, "c", tensors=experts(4), model_type="of my own", num_experts=8)
    (note,) = make_plan(linear(c)).notes
    assert "has 4 experts: check it" in note


def test_experts_that_do_nothing_may_be_stored_too(zoo):
    counts = {"model_type": "longcat_flash", "n_routed_experts": 4, "zero_expert_num": 2}
    for stored in (4, 6):
        a = model(zoo, f"a{stored}", tensors=experts(stored), **counts)
        assert not any("experts" in note for note in make_plan(linear(a)).notes)
    with pytest.raises(FastmergeError, match="has 5 experts"):
        make_plan(linear(model(zoo, "b", tensors=experts(5), **counts)))


def test_a_list_of_heads_by_layer_is_no_number(zoo):
    a = model(zoo, "a", model_type="of my own", num_key_value_heads=[2, 2, 2, 2])
    assert not any("head_dim" in note for note in make_plan(linear(a)).notes)


def test_what_a_causal_model_lacks_is_noted(zoo):
    for name, said in (
        ("model.norm.weight", "has no norm behind its layers"),
        ("model.embed_tokens.weight", "has no input embeddings"),
    ):
        a = model(zoo, "a", tensors={name: None})
        (note,) = make_plan(linear(a)).notes
        assert said in note


def test_a_config_that_counts_no_layers_is_noted(zoo):
    (note,) = make_plan(linear(model(zoo, "a", num_hidden_layers=None))).notes
    assert "does not count its 4 layers" in note


def test_embeddings_resized_without_the_head_are_told_as_that(zoo):
    rows = np.ones((42, 32), np.float32)
    a = model(zoo, "a", tensors={"model.embed_tokens.weight": rows}, vocab_size=42)
    with pytest.raises(FastmergeError, match=r"itself: 42 rows in .*, 40 in .*resize_token"):
        make_plan(linear(a))


# ---------------------------------------------------------------- lists by layer, and what is one


def test_kinds_of_layers_that_differ_are_noted_where_layers_are_merged(zoo):
    kinds = [["full"] * 10, ["full", "sliding"] * 5]
    a, b = (
        model(zoo, name, layers=10, seed=seed, layer_types=kinds[seed])
        for seed, name in enumerate("ab")
    )
    (note,) = make_plan(linear(a, b)).notes
    assert f"\"sliding\" at 1 and another in 4 more places in '{b}': the output has" in note
    (rewritten,) = make_plan(stack((a, 0, 5), (b, 5, 10))).notes
    assert "layer_types: rewritten" in rewritten


def test_a_value_is_told_whole(zoo):
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    a, b = model(zoo, "a"), model(zoo, "b", seed=1, rope_parameters=kinds)
    (note,) = make_plan(linear(a, b)).notes
    assert json.dumps(kinds) in note


@pytest.mark.parametrize("prefix", ["model.layers.4.", "mtp.layers.0."])
@pytest.mark.parametrize("first", [False, True])
def test_prediction_layers_in_one_model_are_told_as_that(prefix, first, zoo):
    extra = {f"{prefix}eh_proj.weight": np.ones((4, 4), np.float32)}
    a, b = model(zoo, "a", tensors=extra, num_nextn_predict_layers=1), model(zoo, "b", seed=1)
    with pytest.raises(FastmergeError, match="only one of them has tensors for multi-token pred"):
        make_plan(linear(a, b) if first else linear(b, a))


def test_layers_listed_and_not_counted_are_counted(zoo):
    kinds = {"layers_block_type": ["mamba"] * 4, "model_type": "nemotron_h"}
    assert not make_plan(linear(model(zoo, "a", num_hidden_layers=None, **kinds))).notes


def test_a_wrappers_prefix_in_all_models_is_noted(zoo):
    folders = []
    for name in "ab":
        folder = zoo.base(name)
        config = json.loads((folder / "config.json").read_text())
        renamed = {f"_orig_mod.{n}": x for n, x in zoo.read(folder).items()}
        folders.append(str(zoo.write(name, renamed, config)))
    (note,) = make_plan(linear(*folders)).notes
    assert "begin with '_orig_mod.' (torch.compile's wrapper)" in note


def test_factors_of_an_adapter_are_noted(zoo):
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    a = model(zoo, "a", tensors={name: np.ones((4, 32), np.float32)})
    (note,) = make_plan(linear(a)).notes
    assert f"factors of an adapter ('{name}')" in note
