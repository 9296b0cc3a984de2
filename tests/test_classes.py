"""Causal language models of transformers, each made tiny, saved, merged and loaded again: no tensor
may be missing, unexpected or of another shape, whatever the family's names and layers are.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.errors import FastmergeError
from fastmerge.models.architecture import layer_of
from fastmerge.planning.planner import make_plan

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

# What makes a config tiny, by the names that configs have for it.
SMALL = {
    "vocab_size": 48, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "ffn_hidden_size": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_hidden_layers": 4,
    "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4, "encoder_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "state_size": 4,
    "mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_d_ssm": 64, "mamba_dt_rank": 4,
    "time_step_rank": 4, "conv_kernel": 2, "ssm_state_size": 4, "n_groups": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "lru_width": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "vocab_size_per_layer_input": 48,
    "hidden_size_per_layer_input": 8, "first_k_dense_replace": 1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 16, "window_size": 16,
}  # fmt: skip

# Every causal language model of transformers 5.23 that these numbers alone make: encoders with a
# head, and models that take custom settings to make, are not here.
KINDS = """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam bitnet blenderbot
    bloom codegen cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 diffllama doge
    ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint
    gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2
    gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax
    internlm3 iquestcoder jais2 jamba jetmoe kolibri1 laguna lfm2 lfm3 llama llama4_text
    mamba mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral
    mixtral modernbert-decoder moshi mpt nanochat nemotron olmo olmo2 olmo3 olmo_hybrid
    olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next recurrent_gemma rwkv seed_oss smollm3 solar_open
    stablelm starcoder2 vaultgemma xglm youtu
"""

# Layers that hold a part of every layer's settings, or that go by number in a way that no setting
# of these configs can say of a stack.
NO_STACK = {"gemma4_text", "hy_v4", "jamba", "recurrent_gemma", "ernie4_5_moe"}


# Language models inside multimodal ones, in the nests that transformers has for them.
MULTIMODAL = """
    aria aya_vision gemma3 glm4v idefics3 internvl llava llava_onevision mistral3 mllama
    paligemma qwen2_5_vl qwen2_vl qwen3_vl qwen3_5 smolvlm video_llava
"""
SMALL_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "depth": 2,
    "num_attention_heads": 2, "num_heads": 2, "embed_dim": 32, "image_size": 32,
    "patch_size": 16, "head_dim": 16, "out_hidden_size": 32, "projection_dim": 32,
}  # fmt: skip


def fitting(known, small):
    """Those of ``small`` that a config class has, each under one of its names."""
    names = known.attribute_map or {}
    has = set(known().to_dict()) | set(names)
    return {
        key: value
        for key, value in small.items()
        if key in has and not (names.get(key) in small and names[key] in has)
    }


def tiny_config(kind):
    known = transformers.CONFIG_MAPPING[kind]
    return known(**fitting(known, SMALL))


def tiny_multimodal(kind):
    known = transformers.CONFIG_MAPPING[kind]
    parts = {}
    for key in known.sub_configs or {}:
        part = getattr(known(), key, None)
        if part is not None:
            small = SMALL if key == "text_config" else SMALL_VISION
            parts[key] = fitting(type(part), small) | {"model_type": part.model_type}
    return known(**parts)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def recipes(a, b):
    yield {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in (a, b)],
    }
    yield {
        "merge_method": "slerp",
        "base_model": a,
        "models": [{"model": a}, {"model": b}],
        "parameters": {"t": [0, 1]},
    }


def stack(a, b, parts):
    return {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": m, "layer_range": [i, j]}]}
            for m, (i, j) in zip((a, b), parts, strict=True)
        ],
    }


def save_two(made, config, folder):
    """Two random models of one class, the second near the first; their folders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = made(config).to(torch.bfloat16)
        model.save_pretrained(folder / "a")
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(folder / "b")
    return str(folder / "a"), str(folder / "b")


@pytest.mark.parametrize("kind", KINDS.split())
def test_what_is_merged_loads_whole(kind, tmp_path):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = tiny_config(kind)
    made = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    a, b = save_two(made, config, tmp_path)
    plans = [make_plan(recipe) for recipe in recipes(a, b)]
    if kind not in NO_STACK:
        plans.append(make_plan(stack(a, b, ((0, 3), (1, 4)))))
    for number, plan in enumerate(plans):
        out = tmp_path / f"out{number}"
        fastmerge.merge(plan, out, threads=1)
        loaded, info = made.from_pretrained(out, dtype="auto", output_loading_info=True)
        assert {key: sorted(map(str, names)) for key, names in info.items() if names} == {}
        if number == 2:
            counted = json.loads((out / "config.json").read_text())
            assert loaded.config.num_hidden_layers in counted.values()


@pytest.mark.parametrize("kind", ["jamba", "recurrent_gemma"])
def test_a_stack_that_its_settings_cannot_describe_is_told_and_checked(kind, tmp_path):
    """Attention every so many layers: layers moved by 2 are others than the config says."""
    config = tiny_config(kind)
    made = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    made(config).save_pretrained(tmp_path / "a")
    a = str(tmp_path / "a")
    recipe = stack(a, a, ((0, 3), (1, 4)))
    assert any("goes by layer number" in note for note in make_plan(recipe).notes)
    with pytest.raises(FastmergeError, match=r"missing weight model\.layers\.4"):
        fastmerge.api.check(recipe)


@pytest.mark.parametrize("kind, name", [
    ("whisper", "WhisperForConditionalGeneration"), ("bert", "BertForSequenceClassification"),
])  # fmt: skip
@pytest.mark.parametrize("named", [None, ["OwnForCausalLM"]])
def test_a_class_that_the_config_does_not_name_is_found_by_its_tensors(kind, name, named, tmp_path):
    a, b = save_two(getattr(transformers, name), tiny_config(kind), tmp_path)
    for folder in (a, b):
        config = json.loads(Path(folder, "config.json").read_text()) | {"architectures": named}
        Path(folder, "config.json").write_text(json.dumps(config))
    fastmerge.api.check(next(recipes(a, b)))
    for folder in (a, b):
        file = Path(folder, "model.safetensors")
        tensors = load_file(file)
        del tensors[min(tensors)]
        save_file(tensors, file)
    with pytest.raises(FastmergeError, match="missing weight"):
        fastmerge.api.check(next(recipes(a, b)))


@pytest.mark.parametrize("kind, name", [
    ("bert", "BertModel"), ("bert", "BertForMaskedLM"), ("bert", "BertForSequenceClassification"),
    ("roberta", "RobertaForMaskedLM"), ("roberta", "RobertaForTokenClassification"),
    ("electra", "ElectraForPreTraining"), ("electra", "ElectraForMaskedLM"),
    ("distilbert", "DistilBertForMaskedLM"), ("distilbert", "DistilBertForQuestionAnswering"),
    ("distilbert", "DistilBertForSequenceClassification"), ("vit", "ViTForImageClassification"),
    ("llama", "LlamaForSequenceClassification"), ("qwen2", "Qwen2ForTokenClassification"),
    ("mistral", "MistralForQuestionAnswering"),
])  # fmt: skip
def test_stacks_of_encoders_and_of_classes_with_other_heads(kind, name, tmp_path):
    """mergekit takes them, too: what precedes the layers is the first slice's, what follows the
    last's.
    """
    made = getattr(transformers, name)
    a, b = save_two(made, tiny_config(kind), tmp_path)
    fastmerge.merge(stack(a, b, ((0, 3), (1, 4))), tmp_path / "out", threads=1)
    _, info = made.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: sorted(map(str, names)) for key, names in info.items() if names} == {}
    one, two, out = (load_file(Path(f, "model.safetensors")) for f in (a, b, tmp_path / "out"))
    assert out.keys() > one.keys()
    for tensor, value in out.items():
        place = layer_of(tensor)
        if place is not None:
            number = place.number if place.number < 3 else place.number - 2
            source = one if place.number < 3 else two
            wanted = source[f"{place.stack}.{number}.{place.rest}"]
        else:
            wanted = (one if "embed" in tensor else two)[tensor]
        assert torch.equal(value, wanted), tensor


@pytest.mark.parametrize("kind", MULTIMODAL.split())
@pytest.mark.parametrize("silent", [False, True])
def test_multimodal_models_load_whole(kind, silent, tmp_path):
    """As saved, and with a config that does not speak of ties."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = tiny_multimodal(kind)
    made = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    a, b = save_two(made, config, tmp_path)
    if silent:
        for folder in (tmp_path / "a", tmp_path / "b"):
            found = json.loads((folder / "config.json").read_text())
            for part in (found, *(part for part in found.values() if isinstance(part, dict))):
                part.pop("tie_word_embeddings", None)
            (folder / "config.json").write_text(json.dumps(found))
    fastmerge.merge(next(recipes(a, b)), tmp_path / "out", threads=1)
    _, info = made.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert {key: sorted(map(str, names)) for key, names in info.items() if names} == {}
