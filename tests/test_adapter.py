"""Adapters as PEFT writes them are read as PEFT reads them, or refused in one line."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastmerge.errors import FastmergeError, ModelError, UnsupportedError
from fastmerge.models.adapter import CONFIG, PREFIX, WEIGHTS, Adapter
from fastmerge.models.patterns import Patterns, Targets

MODULE = "model.layers.0.self_attn.q_proj"


def write_adapter(folder, config=None, tensors=None):
    """One module of rank 2, 8 by 6, unless ``tensors`` (None: without) and ``config`` say else."""
    folder.mkdir()
    given = {f"{MODULE}.lora_A.weight": (2, 6), f"{MODULE}.lora_B.weight": (8, 2)}
    given |= tensors or {}
    arrays = {PREFIX + k: np.ones(v, np.float32) for k, v in given.items() if v is not None}
    save_file(arrays, folder / WEIGHTS)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    said |= config or {}
    text = json.dumps({k: v for k, v in said.items() if v is not Ellipsis})
    (folder / CONFIG).write_text(text)
    return folder


def test_scales_and_ranks_are_peft_s(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32,
    )  # fmt: skip
    for rooted in (False, True):
        lora = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=rooted,
            rank_pattern={"layers.1.self_attn.q_proj": 3, r"^model\.layers\.\d\.mlp.*": 5},
            alpha_pattern={"down_proj": 7.5, r"layers\.(0|2)\.self_attn\.q_proj": 1},
        )  # fmt: skip
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
        model.save_pretrained(tmp_path / str(rooted))
        adapter = Adapter.open(tmp_path / str(rooted))
        wanted = {
            name.removeprefix(PREFIX): (module.r["default"], module.scaling["default"])
            for name, module in model.named_modules()
            if hasattr(module, "lora_A")
        }
        assert {k: (f.rank, f.scale) for k, f in adapter.factors.items()} == wanted
        assert adapter.ranks == (3, 4, 5)
        shapes = {name: array.shape for name, array in load_file(adapter.files[0]).items()}
        for factors in adapter.factors.values():
            assert shapes[factors.a] == (factors.rank, factors.in_size)
            assert shapes[factors.b] == (factors.out_size, factors.rank)


def test_parts_of_a_module_and_what_replaces_the_base_s(tmp_path):
    tensors = {
        f"{MODULE}.lora_magnitude_vector": (8,),
        "model.embed_tokens.lora_embedding_A": (2, 10),
        "model.embed_tokens.lora_embedding_B": (6, 2),
        "model.embed_tokens.lora_magnitude_vector": (6,),
        "model.embed_tokens.base_layer.weight": (10, 6),
        "lm_head.weight": (10, 6),
        f"{MODULE}.base_layer.bias": (8,),
    }
    config = {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}
    adapter = Adapter.open(write_adapter(tmp_path / "a", config, tensors))
    assert adapter.factors[MODULE].magnitude == f"{PREFIX}{MODULE}.lora_magnitude_vector"
    embedding = adapter.factors["model.embed_tokens"]
    assert (embedding.embedding, embedding.out_size, embedding.in_size) == (True, 6, 10)
    assert adapter.saved == {
        "model.embed_tokens.weight": f"{PREFIX}model.embed_tokens.base_layer.weight",
        "lm_head.weight": f"{PREFIX}lm_head.weight",
        f"{MODULE}.bias": f"{PREFIX}{MODULE}.base_layer.bias",
    }


REFUSED = {
    "peft_type 'IA3'": ({"peft_type": "IA3"}, {}),
    "peft_type 'LOHA'": ({"peft_type": "LOHA"}, {}),
    "has no peft_type": ({"peft_type": ...}, {}),
    "'r': a rank must be": ({"r": 0}, {}),
    "'lora_alpha': must be a finite number, not nan": ({"lora_alpha": float("nan")}, {}),
    "'lora_alpha': must be a finite number, not 1e+39": ({"lora_alpha": 1e39}, {}),
    "rank 4 for 'model.layers.0.self_attn.q_proj', whose": ({"r": 4}, {}),
    "'rank_pattern' of 'q_proj': a rank": ({"rank_pattern": {"q_proj": "x"}}, {}),
    "could take for ever": ({"alpha_pattern": {"(a+)+": 1}}, {}),
    "'use_qalora' is set": ({"use_qalora": True}, {}),
    "init_lora_weights 'pissa_niter_4' changes": ({"init_lora_weights": "pissa_niter_4"}, {}),
    "use_dora is set, but": ({"use_dora": True}, {}),
    "use_dora is not set, but": ({}, {f"{MODULE}.lora_magnitude_vector": (8,)}),
    "leave out 'model.layers.0.self_attn.q_proj'": ({"target_modules": ["k_proj"]}, {}),
    "leave out 'model.layers.0": ({"layers_to_transform": [1, 2]}, {}),
    "not both factors": ({}, {f"{MODULE}.lora_B.weight": None}),
    "A [2, 6] has rank 2, B [8, 3] has rank 3": ({}, {f"{MODULE}.lora_B.weight": (8, 3)}),
    "not (rank, in) and (out, rank)": ({}, {f"{MODULE}.lora_B.weight": (8,)}),
    "needs 8 numbers": ({"use_dora": True}, {f"{MODULE}.lora_magnitude_vector": (7,)}),
    "is no part of a LoRA that is known": ({}, {f"{MODULE}.lora_C.weight": (2, 2)}),
    "'trainable_token_indices' must be": (
        {"trainable_token_indices": [1]},
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 6)},
    ),
    "'target_modules' must be a list": ({"target_modules": [1]}, {}),
    "'base_model_name_or_path' must be text": ({"base_model_name_or_path": 3}, {}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_lora_is_refused_by_name(tmp_path, said):
    config, tensors = REFUSED[said]
    folder = write_adapter(tmp_path / "a", config, tensors)
    with pytest.raises(FastmergeError) as caught:
        Adapter.open(folder)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_missing_pickled_truncated_or_linked_away(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        Adapter.open(tmp_path / "none")
    folder = write_adapter(tmp_path / "a")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-4])
    with pytest.raises(ModelError, match="truncated"):
        Adapter.open(folder)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedError, match=r"a pickle.*save_pretrained"):
        Adapter.open(folder)
    (tmp_path / "outside").write_bytes(data)
    (folder / WEIGHTS).symlink_to(tmp_path / "outside")
    with pytest.raises(ModelError, match="a link out of"):
        Adapter.open(folder)
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ModelError, match=CONFIG):
        Adapter.open(folder)


def test_patterns_match_as_peft_s():
    utils = pytest.importorskip("peft.utils.other")
    keys = {"q_proj": 1, r"layers\.1\d\..*": 2, "layers.1.mlp.up": 3, "^mlp.up": 4, "a|up": 5}
    patterns = Patterns(keys, "here")
    for name in ("q_proj", "x.q_proj", "xq_proj", "m.layers.12.up", "m.layers.1.mlp.up", "mlp.up",
                 "m.mlp.up", "m.a", "aup", "none"):  # fmt: skip
        assert patterns.of(name, 0) == keys.get(utils.get_pattern_key(keys, name), 0), name


def test_targets_match_as_peft_s():
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    names = ["model.layers.0.q", "model.layers.10.q", "model.layers.1.aq", "q", "h.1.q", "a.h.1.q"]
    for config in (
        {"target_modules": ["q"]},
        {"target_modules": ["layers.0.q", "q"], "exclude_modules": ["layers.10.q"]},
        {"target_modules": r".*layers\.\d\..*q"},
        {"target_modules": ["q"], "layers_to_transform": [1, 10]},
        {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "h"},
    ):
        targets, lora = Targets(config, "here"), peft.LoraConfig(**config)
        for name in names:
            wanted = bool(check_target_module_exists(lora, name))
            assert targets.tell(name) == wanted, (config, name)
