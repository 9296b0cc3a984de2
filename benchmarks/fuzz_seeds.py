"""The valid files of `benchmarks/fuzz.py`: text, and models of a few bytes."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from fastmerge.models.folder import SINGLE

HEADER: dict[str, object] = {
    "__metadata__": {"format": "pt", "a": "b"},
    "model.embed_tokens.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "F16", "shape": [0, 5], "data_offsets": [32, 32]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    "bytes": {"dtype": "U8", "shape": [3], "data_offsets": [40, 43]},
}
HEADER_DATA_BYTES = 43
BITS = {  # of one item; those of fewer than 8 must fill whole bytes
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

MODEL = {
    "model.embed_tokens.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "model.layers.0.mlp.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "model.layers.1.mlp.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [32, 40]},
    "flags": {"dtype": "U8", "shape": [3], "data_offsets": [40, 43]},
}

CONFIG = {
    "model_type": "somebodys", "architectures": ["LlamaForCausalLM"], "hidden_size": 3,
    "num_hidden_layers": 2, "vocab_size": 2, "tie_word_embeddings": False,
    "text_config": {"num_hidden_layers": 2}, "torch_dtype": "bfloat16",
    "quantization_config": None, "rope_scaling": {"factor": 2.0, "type": "linear"},
}  # fmt: skip

RECIPE = """merge_method: ties
base_model: BASE
models:
  - model: BASE
  - model: {model: {path: TUNE, revision: null}}
    parameters:
      weight: [{filter: mlp, value: [0.1, 0.5]}, {value: 0.2}]
      density: 0.5
parameters: {normalize: true, int8_mask: true, lambda: 1.0}
dtype: bfloat16
"""

SCHEDULE = """baseline: {model: BASE, accuracy: 50.0}
pool: [{model: TUNE, name: tune}]
seed: 3
schedule:
  cycles: 2
  degrade: {partner: next, method: slerp, t: 0.35}
  retrace: {toward: baseline, method: dare_ties, t: 0.4, density: 0.7}
accept: always
"""

ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base",
    "target_modules": ["up_proj", "down_proj"], "layers_to_transform": [0, 1],
    "layers_pattern": "layers", "rank_pattern": {"0.mlp.up_proj": 2, r"layers\\.1\\..*": 2},
    "alpha_pattern": {"down_proj": 8.0}, "use_rslora": False, "use_dora": False, "bias": "none",
    "modules_to_save": None, "exclude_modules": None, "init_lora_weights": True,
    "fan_in_fan_out": False, "revision": None, "auto_mapping": None,
}  # fmt: skip

TOKENIZER = {
    "version": "1.0", "normalizer": None, "pre_tokenizer": None,
    "added_tokens": [{"id": 1, "content": "<s>", "special": True, "lstrip": False}],
    "model": {"type": "BPE", "vocab": {"a": 0, "<s>": 1}, "merges": ["a a", ["a", "a"]]},
}  # fmt: skip
UNIGRAM = {
    "version": "1.0", "added_tokens": [],
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]},
}  # fmt: skip
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "model_max_length": 64,
    "eos_token": {"content": "<s>", "lstrip": False}, "additional_special_tokens": ["<s>"],
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
}  # fmt: skip

SPACE = """space:
  merge_method: task_arithmetic
  base_model: BASE
  models:
    - {model: TUNE, parameters: {weight: {low: 0, high: 1, start: 0.3, layers: 2, per: [mlp]}}}
  parameters: {normalize: {choose: [true, false]}}
optimiser: {name: random, population: 4}
budget: {items: 40}
evaluate: {callable: "own:score"}
seed: 1
"""

MIXTURE = """base_model: LLAMA
gate_mode: random
dtype: bfloat16
experts_per_token: 1
architecture: mixtral
seed: 7
experts:
  - {source_model: LLAMA, positive_prompts: ["def f(x):"], negative_prompts: ["x"]}
  - {source_model: LLAMA, positive_prompts: ["once"], residual_scale: 0.9, noise_scale: 0.001}
"""
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4,
    "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip

EVALUATED = b'{"key": "score:1", "value": {"a": [1.0, null]}}\n{"key": "b", "value": 7}\n'


def llama(folder: Path) -> Path:
    """A model of two layers, of zeros."""
    shapes = {"model.embed_tokens": [6, 4], "lm_head": [6, 4], "model.norm": [4]}
    for layer in range(2):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}"] = [4]
        for name in "qkvo":
            shapes[f"model.layers.{layer}.self_attn.{name}_proj"] = [4, 4]
        for name, shape in (("gate", [8, 4]), ("up", [8, 4]), ("down", [4, 8])):
            shapes[f"model.layers.{layer}.mlp.{name}_proj"] = shape
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    folder.mkdir()
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def adapter_header() -> bytes:
    header, at = {}, 0
    for layer in range(2):
        for module, out, size in (("up_proj", 8, 4), ("down_proj", 4, 8)):
            for part, shape in (("A", [2, size]), ("B", [out, 2])):
                name = f"base_model.model.model.layers.{layer}.mlp.{module}.lora_{part}.weight"
                end = at + 4 * math.prod(shape)
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
                at = end
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def linear(*models: str | Path, **more: object) -> dict[str, object]:
    recipe = {"merge_method": "linear", "parameters": {"weight": 1.0}, **more}
    return recipe | {"models": [{"model": str(model)} for model in models]}
