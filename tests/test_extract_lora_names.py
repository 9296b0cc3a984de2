"""Adapters extracted from models whose modules transformers 5 calls or stacks otherwise than their
files: PEFT loads them onto the base, which is then the tuned model.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastmerge
from fastmerge.errors import FastmergeError
from fastmerge.planning.peft_names import _TAKEN

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

_TEXT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
_EACH = {"moe_intermediate_size": 12, "num_experts_per_tok": 2, "intermediate_size": 20}


def mixtral():
    config = transformers.MixtralConfig(
        **_TEXT, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def qwen3_moe():
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**_TEXT, **_EACH, head_dim=8, num_experts=3)
    )


def qwen2_moe():
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **_TEXT, **_EACH, num_experts=3, shared_expert_intermediate_size=14
        )
    )


def deepseek():
    config = transformers.DeepseekV3Config(
        **_TEXT, **_EACH, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=6, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
        n_shared_experts=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def llava():
    text = transformers.LlamaConfig(**_TEXT, intermediate_size=20)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=39)
    )


def pair(folder: Path, model, tuned) -> tuple[Path, Path]:
    """Folders of a tuned model and of its base: the parameters that ``tuned`` is in differ."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / "base")
        for name, parameter in model.named_parameters():
            if tuned in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder / "tuned")
    return folder / "tuned", folder / "base"


# model, what of it is tuned, options
ROWS = {
    "mixtral": (mixtral, "", {}),
    "qwen3_moe": (qwen3_moe, "", {}),
    "one layer's routers": (qwen3_moe, "layers.1.mlp.gate", {}),
    "one layer's experts": (qwen3_moe, "layers.1.mlp.experts.gate_up", {}),
    "shared and dense": (deepseek, "", {}),
    "no experts": (qwen2_moe, "", {"exclude": [r"\.experts\."], "skip_undecomposable": True}),
    "a multimodal model's language": (llava, "language_model", {}),
}


@pytest.mark.parametrize("row", ROWS)
def test_on_the_base_it_is_the_tuned_model(tmp_path: Path, row: str) -> None:
    build, part, options = ROWS[row]
    model = build()
    tuned, base = pair(tmp_path, model, part)
    fastmerge.extract_lora(tuned, base, tmp_path / "lora", max_rank=64, **options)
    loaded = type(model).from_pretrained(base, dtype=torch.float32)
    peft.PeftModel.from_pretrained(loaded, tmp_path / "lora").merge_and_unload().save_pretrained(
        tmp_path / "theirs"
    )
    fastmerge.fold(base, tmp_path / "lora", tmp_path / "ours")
    wanted, before = (load_file(each / "model.safetensors") for each in (tuned, base))
    for made in ("theirs", "ours"):
        tensors = load_file(tmp_path / made / "model.safetensors")
        assert tensors.keys() == wanted.keys()
        for name, own in tensors.items():
            left_out = "exclude" in options and (".experts." in name or "norm" in name)
            expected = before[name] if left_out else wanted[name]
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5, msg=f"{made} {name}")


@pytest.mark.parametrize(
    ("build", "part", "options", "said"),
    [
        (qwen2_moe, "experts", {}, "model_type 'qwen2_moe' as it loads them, and PEFT loads no"),
        (qwen3_moe, "experts", {"exclude": [r"experts\.1"]}, "all of the experts' matrices or of"),
        (llava, "vision_tower", {}, "leave 'vision_tower' out"),
    ],
)
def test_what_peft_would_not_find_is_refused(tmp_path: Path, build, part, options, said) -> None:
    tuned, base = pair(tmp_path, build(), part)
    with pytest.raises(FastmergeError) as refused:
        fastmerge.extract_lora(tuned, base, tmp_path / "lora", max_rank=64, **options)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "lora").exists()


def test_whose_experts_peft_converts() -> None:
    from peft.utils import transformers_weight_conversion as theirs
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kinds = theirs._MODEL_TO_CONVERSION_PATTERN
    wanted = {
        kind: tuple(theirs._MOE_TARGET_MODULE_MAPPING[of])
        for kind, of in kinds.items()
        if of in theirs._MOE_TARGET_MODULE_MAPPING and kind == kind.lower()
        and get_checkpoint_conversion_mapping(kind) is not None
    }  # fmt: skip
    assert {kind: set(taken) for kind, taken in _TAKEN.items()} == {
        kind: set(taken) for kind, taken in wanted.items()
    }
