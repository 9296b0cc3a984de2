"""How many layers a model has, and what goes by layer when they are stacked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastmerge.errors import FastmergeError
from fastmerge.planning.planner import make_plan
from fastmerge.tree.nodes import Stored


def model(zoo, name, layers=4, *, stored=None, drop=(), **change):
    """A llama that counts ``layers`` and stores ``stored`` of them, but those in ``drop``."""
    folder = zoo.base(name, layers=stored or layers)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    tensors = {
        n: x
        for n, x in zoo.read(folder).items()
        if not any(f".layers.{number}." in n for number in drop)
    }
    return str(zoo.write(name, tensors, config | change))


def stack(*parts):
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in parts],
    }


def slerp(a, b, t):
    models = [{"model": a}, {"model": b}]
    return {
        "merge_method": "slerp",
        "base_model": a,
        "models": models,
        "parameters": {"t": t},
    }


LIST = ["a", "b", "c", "d"]
# Stacked as layers 0 1, 0 1 2 3.
REWRITTEN = {
    "layer_types": (LIST, ["a", "b", *LIST]),
    "block_configs": ([{"n": i} for i in range(4)], [{"n": i} for i in (0, 1, 0, 1, 2, 3)]),
    "num_key_value_heads_per_layer": ([2, 1, 2, 2], [2, 1, 2, 1, 2, 2]),
    "intermediate_sizes": ([48, 48, 96, 48], [48, 48, 48, 48, 96, 48]),
    "hybrid_override_pattern": ("M*ME", "M*M*ME"),
    "mlp_only_layers": ([1, 3], [1, 3, 5]),
    "full_attn_idxs": ([0], [0, 2]),
    "attn_layer_indices": ([3], [5]),
    "no_rope_layers": ([1, 1, 1, 0], [1, 1, 1, 1, 1, 0]),
    "moe_layer_freq": ([0, 1, 1, 1], [0, 1, 0, 1, 1, 1]),
    "layer_sizes": ({"1": 5}, {"1": 5, "3": 5}),
    "first_k_dense_replace": (2, 4),
    "num_dense_layers": (4, 6),
    "linear_attn_config": (
        {"full_attn_layers": [4], "kda_layers": [1, 2, 3]},  # counted from 1
        {"full_attn_layers": [6], "kda_layers": [1, 2, 3, 4, 5]},
    ),
    "moe_layers_enum": ("1,2,3", "1,3,4,5"),
    "dense_layer_indices": ("3", "5"),
    "attention_kinds": ("[full; linear; full; none]", "[full; linear; full; linear; full; none]"),
}


@pytest.mark.parametrize("key", REWRITTEN)
@pytest.mark.parametrize("nested", [False, True])
def test_what_goes_by_layer_is_rewritten(key, nested, zoo):
    before, after = REWRITTEN[key]
    change = {key: before}
    if nested:
        change = {"text_config": {"num_hidden_layers": 4, **change}}
    a = model(zoo, "a", **change)
    plan = make_plan(stack((a, 0, 2), (a, 0, 4)))
    part = plan.config["text_config"] if nested else plan.config
    assert part[key] == after
    assert part["num_hidden_layers"] == 6
    inner = list(before) if key == "linear_attn_config" else [key]
    assert f"config.json: {', '.join(inner)}: rewritten for the layers as stacked" in plan.notes


MOVED = "goes by layer number, and layers were renumbered; check it"
# Layers move by 3: no period but 3 holds.
TOLD = {
    "attn_layer_period": 4,
    "full_attention_interval": 2,
    "interleave_moe_layer_step": 2,
    "global_attn_every_n_layers": 2,
    "num_kv_shared_layers": 2,
    "moe_layer_start_index": 1,
    "sliding_window_pattern": "LG",
    "decoder_sparse_step": 2,
    "cross_attention_freq": 2,
    "first_k_dense_replace": 1,  # layers 0, 1, 0: no longer the first ones
}


@pytest.mark.parametrize("key", TOLD)
def test_what_cannot_be_rewritten_is_told_by_name(key, zoo):
    a = model(zoo, "a", **{key: TOLD[key]})
    plan = make_plan(stack((a, 0, 3), (a, 0, 4)))
    told = [note for note in plan.notes if "layer number" in note]
    assert told == [f"config.json: {key} {MOVED}"]


MADE = {
    "diffllama": "lambda_init from a layer's number, which no setting can say",
    "minimax": "the decay of linear attention from a layer's number and their count, which",
    "beam": "the scale of residuals from a layer's number, which no setting can say",
}


@pytest.mark.parametrize("kind", MADE)
def test_what_a_class_makes_of_a_layers_number_is_told(kind, zoo):
    a = model(zoo, "a", model_type=kind, layer_types=["full_attention"] * 4)
    assert any(MADE[kind] in note for note in make_plan(stack((a, 0, 3), (a, 1, 4))).notes)
    assert not any(MADE[kind] in note for note in make_plan(stack((a, 0, 2), (a, 2, 4))).notes)
    cut = any(MADE[kind] in note for note in make_plan(stack((a, 0, 3))).notes)
    assert cut == (kind == "minimax")


def test_minicpms_residuals_keep_their_scale(zoo):
    """Its classes divide scale_depth by the root of the count of layers."""
    a = model(zoo, "a", scale_depth=1.4)
    plan = make_plan(stack((a, 0, 4), (a, 0, 4)))
    assert plan.config["scale_depth"] == pytest.approx(1.4 * 2**0.5)
    assert plan.notes == ("config.json: scale_depth: rewritten for the layers as stacked",)


def test_a_flag_that_speaks_of_a_layers_number_is_told(zoo):
    a = model(zoo, "a", scale_attn_by_inverse_layer_idx=True)
    told = f"config.json: scale_attn_by_inverse_layer_idx {MOVED}"
    assert make_plan(stack((a, 0, 3), (a, 1, 4))).notes == (told,)
    assert make_plan(stack((a, 0, 4))).notes == ()


@pytest.mark.parametrize("end", [0, 3])
def test_a_first_or_last_layer_with_tensors_of_its_own_is_told(end, zoo):
    """rwkv's first layer has one norm more; no setting says so."""

    def made(name, **change):
        folder = Path(model(zoo, name, **change))
        more = {f"model.layers.{end}.pre_ln.weight": np.ones(32)}
        config = json.loads((folder / "config.json").read_text())
        return str(zoo.write(name, zoo.read(folder) | more, config))

    a = made("a")
    (note,) = make_plan(stack((a, 1, 4), (a, 0, 3))).notes
    assert note.startswith("tensor 'pre_ln.weight' is in some layers alone") and note.endswith(
        "it goes by layer number, and layers were renumbered; check it"
    )
    assert make_plan(stack((a, 0, 2), (a, 1, 4))).notes == ()
    b = made("b", kinds=["own" if i == end else "usual" for i in range(4)])
    plan = make_plan(stack((b, 1, 4), (b, 0, 3)))
    assert plan.notes == ("config.json: kinds: rewritten for the layers as stacked",)


def test_a_period_holds_where_layers_move_by_multiples_of_it(zoo):
    a = model(zoo, "a", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=4)
    plan = make_plan(stack((a, 0, 2), (a, 0, 4)))
    assert plan.notes == (
        "config.json: attn_layer_period, attn_layer_offset: still true of the layers as stacked",
        f"config.json: expert_layer_period {MOVED}",
    )


UNMOVED = {
    "eos_token_id": [2, 3, 4, 5],
    "architectures": ["LlamaForCausalLM"],
    "layer_norm_eps": 1e-5,
    "time_step_rank": 4,
    "layer_norm_type": "norm",
    "index_block_size": 4,
    "index_topk_blocks": 4,
    "index_local_blocks": 1,
    "full_attention_interval": 1,
    "moe_layer_end_index": -1,
    "rope_scaling": {"short_factor": [1.0, 1.0, 2.0, 2.0], "rope_type": "longrope"},
}


@pytest.mark.parametrize("key", UNMOVED)
def test_what_goes_by_no_layer_stays(key, zoo):
    a = model(zoo, "a", **{key: UNMOVED[key]})
    plan = make_plan(stack((a, 0, 3), (a, 0, 4)))
    assert plan.config[key] == UNMOVED[key] and plan.notes == ()


def test_layers_of_two_models_bring_their_own_settings(zoo):
    a = model(zoo, "a", mlp_only_layers=[0], layer_types=LIST)
    b = model(zoo, "b", mlp_only_layers=[2, 3], layer_types=list("wxyz"))
    plan = make_plan(stack((a, 0, 2), (b, 1, 4)))
    assert plan.config["mlp_only_layers"] == [0, 3, 4]
    assert plan.config["layer_types"] == list("abxyz")


# ---------------------------------------------------------------- layers behind the counted ones


def test_layers_for_multi_token_prediction_are_copied_and_in_no_gradient(zoo):
    a = model(zoo, "a", stored=5, num_nextn_predict_layers=1)
    b = model(zoo, "b", stored=5, num_nextn_predict_layers=1)
    plan = make_plan(slerp(a, b, [0, 1]))
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    name = "self_attn.q_proj.weight"
    assert by_name[f"model.layers.4.{name}"].root == Stored(0, f"model.layers.4.{name}")
    assert by_name[f"model.layers.3.{name}"].root.values["t"] == 1
    assert by_name[f"model.layers.0.{name}"].root.values["t"] == 0
    assert any("multi-token prediction: copied, not merged" in note for note in plan.notes)


def test_layers_that_nothing_counts_are_left_out(zoo):
    a, b = model(zoo, "a", stored=6), model(zoo, "b", stored=6)
    plan = make_plan(slerp(a, b, [0, 1]))
    assert not any("layers.4." in t.name or "layers.5." in t.name for t in plan.tensors)
    assert any("config.json counts: left out" in note for note in plan.notes)


def test_a_stack_has_only_counted_layers(zoo):
    a = model(zoo, "a", stored=5, num_nextn_predict_layers=1)
    with pytest.raises(FastmergeError, match=r"\[0, 5\] is out of range: .* has 4 layers"):
        make_plan(stack((a, 0, 5)))
    plan = make_plan(stack((a, 0, 4)))
    assert plan.config["num_hidden_layers"] == 4 and plan.config["num_nextn_predict_layers"] == 0
    assert not any("layers.4." in tensor.name for tensor in plan.tensors)


def test_a_model_without_those_layers_is_refused_by_name(zoo):
    a = model(zoo, "a", stored=5, num_nextn_predict_layers=1)
    with pytest.raises(FastmergeError, match=r"'.*b' lacks tensor 'model\.layers\.4\."):
        make_plan(slerp(a, model(zoo, "b"), 0.5))


@pytest.mark.parametrize("drop", [(2,), (3,), (0, 1)])
def test_a_hole_is_refused(drop, zoo):
    a = model(zoo, "a", drop=drop)
    for recipe in (
        stack((a, 0, 4)),
        {"merge_method": "passthrough", "models": [{"model": a}]},
        slerp(a, model(zoo, "b", drop=drop), 0.5),
    ):
        with pytest.raises(FastmergeError, match=f"has no layer {drop[0]}"):
            make_plan(recipe)


# ---------------------------------------------------------------- counts and disguised lists


def test_every_count_of_layers_is_the_stacks(zoo):
    text = {"num_hidden_layers": 4}
    a = model(zoo, "a", num_layers=4, n_layer=4, mtp_depth=4, text_config=text)
    config = make_plan(stack((a, 0, 2), (a, 0, 4))).config
    counts = [config[key] for key in ("num_hidden_layers", "num_layers", "n_layer")]
    assert counts == [6, 6, 6] and config["mtp_depth"] == 4
    assert config["text_config"]["num_hidden_layers"] == 6


def test_openelms_count_is_known(zoo):
    a = model(zoo, "a", num_hidden_layers=None, num_transformer_layers=4)
    config = make_plan(stack((a, 0, 2), (a, 0, 4))).config
    assert config["num_transformer_layers"] == 6 and not config["num_hidden_layers"]


def test_another_count_of_layers_is_told(zoo):
    a = model(zoo, "a", mup_num_layers=4)
    (note,) = make_plan(stack((a, 0, 2), (a, 0, 4))).notes
    assert "mup_num_layers goes by layer number" in note


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_that_hides_stored_layers_is_refused(count, zoo):
    a, b = (model(zoo, name, num_hidden_layers=count) for name in "ab")
    for recipe in (slerp(a, b, 0.5), stack((a, 0, 2), (b, 2, 4))):
        with pytest.raises(FastmergeError, match=f"says num_hidden_layers {count}, and its files"):
            make_plan(recipe)


def test_kinds_and_how_often_they_follow_are_written_out(zoo):
    a = model(zoo, "a", attention_types=[[["global", "local"], 2]])
    config = make_plan(stack((a, 0, 1), (a, 0, 4))).config
    kinds = ["global", "global", "local", "global", "local"]
    assert config["attention_types"] == [[kinds, 1]]


def test_names_of_layers_are_no_kinds_that_repeat(zoo):
    a = model(zoo, "a", global_layers=["model.layers.0", "model.layers.3"])
    (note,) = make_plan(stack((a, 0, 2), (a, 0, 4))).notes
    assert "global_layers goes by layer number" in note


def test_a_small_pattern_is_rewritten_and_a_word_is_not(zoo):
    a = model(zoo, "a", layer_pattern="mamm", layers_pattern="none")
    config = make_plan(stack((a, 0, 2), (a, 0, 4))).config
    assert config["layer_pattern"] == "mamamm" and config["layers_pattern"] == "none"


def test_groups_of_layers_are_a_period(zoo):
    a = model(zoo, "a", layer_group_size=2)
    (held,) = make_plan(stack((a, 0, 2), (a, 0, 4))).notes
    assert "layer_group_size: still true" in held
    (moved,) = make_plan(stack((a, 0, 1), (a, 0, 4))).notes
    assert "layer_group_size goes by layer number" in moved


def test_a_list_may_have_entries_for_prediction_layers(zoo):
    a = model(zoo, "a", num_nextn_predict_layers=1, compress_ratios=[1, 4, 4, 128, 0])
    config = make_plan(stack((a, 0, 2), (a, 0, 4))).config
    assert config["compress_ratios"] == [1, 4, 1, 4, 4, 128]
    assert config["num_nextn_predict_layers"] == 0


def test_lists_of_prediction_layers_are_not_the_stacks(zoo):
    a = model(zoo, "a", mtp_layer_types=["a", "b", "c", "d"])
    assert make_plan(stack((a, 0, 2), (a, 0, 4))).config["mtp_layer_types"] == list("abcd")


@pytest.mark.parametrize(
    ("key", "value"), [("block_types", ["r", "r", "a", "a"]), ("sliding_window_pattern", 2)]
)
def test_kinds_that_a_key_says_are_no_default(zoo, key, value):
    change = {"model_type": "recurrent_gemma", key: value, "tie_word_embeddings": False}
    (note,) = make_plan(
        stack((model(zoo, "a", **change), 0, 2), (model(zoo, "a", **change), 0, 4))
    ).notes
    assert key in note


@pytest.mark.parametrize("count", [None, "4", 4.0])
def test_an_odd_count_is_the_stacks_too(count, zoo):
    a = model(zoo, "a", num_hidden_layers=count)
    plan = make_plan(stack((a, 0, 2), (a, 0, 4)))
    assert plan.config["num_hidden_layers"] == 6 and not plan.notes


def test_an_empty_list_of_slices_or_models_is_none(zoo):
    listed = [{"model": str(zoo.base("whole"))}]
    plain = {"merge_method": "passthrough", "models": listed}
    stacked = stack((listed[0]["model"], 0, 1))
    assert make_plan({**plain, "slices": []}).key == make_plan(plain).key
    assert make_plan({**stacked, "models": []}).key == make_plan(stacked).key
