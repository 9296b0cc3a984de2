"""Adapters whose modules transformers calls otherwise than the base's files do: against PEFT's
merge, as transformers writes it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.errors import ModelError, UnsupportedError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {**SIZES, "num_key_value_heads": 1, "vocab_size": 40, "rope_parameters": rope}
    vision = {
        "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 4, "spatial_merge_size": 2,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def gpt_neox():
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, vocab_size=40))


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config)


def make(folder, model, **settings):
    """Folders of a base and of an adapter with factors at random, which PEFT loads."""
    model.save_pretrained(folder / "base")
    base = type(model).from_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **settings)
    peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


# model, settings, a tensor of the base's files that is changed
ROWS = {
    "text": (qwen2_vl, {"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj.weight"),
    "vision": (qwen2_vl, {"target_modules": ["qkv"]}, "visual.blocks.1.attn.qkv.weight"),
    "both": (
        qwen2_vl,
        {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]},
        "visual.merger.mlp.2.weight",
    ),
    "a layer and a part": (
        qwen2_vl,
        {"target_modules": r".*(layers\.1\.mlp\.up_proj|blocks\.0\.attn\.proj)"},
        "visual.blocks.0.attn.proj.weight",
    ),
    "head": (gpt_neox, {"target_modules": ["query_key_value", "lm_head"]}, "embed_out.weight"),
    "saved head": (
        gpt_neox,
        {"target_modules": ["dense"], "modules_to_save": ["lm_head"]},
        "embed_out.weight",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_found_under_the_names_of_the_files(tmp_path, row) -> None:
    build, settings, changed = ROWS[row]
    torch.manual_seed(0)
    base, adapter = make(tmp_path, build(), **settings)
    fastmerge.fold(base, adapter, tmp_path / "out")
    model = type(build()).from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    mine, theirs, before = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "theirs", "base")
    )
    assert mine.keys() == theirs.keys() == before.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
        moved = not torch.equal(theirs[name], before[name])
        assert moved == (not torch.equal(tensor, before[name])), name
    # What is saved whole is as it was.
    assert torch.equal(mine[changed], before[changed]) == ("saved" in row)


def test_names_that_are_not_known_say_so_of_the_base_that_the_adapter_names(tmp_path) -> None:
    base, adapter = make(tmp_path, vit(), target_modules=["q_proj"])
    with pytest.raises(UnsupportedError, match=r"which '.*base' lacks, though its config names"):
        fastmerge.fold(base, adapter, tmp_path / "out")
    base.rename(tmp_path / "other")
    with pytest.raises(fastmerge.FastmergeError, match=r"it is for another base; its config names"):
        fastmerge.fold(tmp_path / "other", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_config_says_is_saved_whole_is_there(tmp_path) -> None:
    """PEFT fails to load it (KeyError), where a base's own head would be another than was trained.
    Names that no module has are nothing: PEFT writes some for every classifier.
    """
    settings = {"target_modules": ["dense"], "modules_to_save": ["lm_head", "score"]}
    base, adapter = make(tmp_path, gpt_neox(), **settings)
    fastmerge.fold(base, adapter, tmp_path / "whole")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    fastmerge.fold(base, adapter, tmp_path / "head")  # embed_out: what they call it is not told
    for folder in (base, adapter):
        file = next(folder.glob("*.safetensors"))
        named = {n.replace("embed_out.", "lm_head."): t for n, t in load_file(file).items()}
        save_file(named, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"modules_to_save names 'lm_head', and the adapter has"):
        fastmerge.fold(base, adapter, tmp_path / "out")
