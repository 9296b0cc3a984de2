"""What PEFT's tests of weighted adapters would download: tiny models, with random weights, of the
architectures that their names say; and what their modules import and these tests do not use.
"""

import sys
from types import ModuleType
from typing import Any

import torch
import transformers

if "diffusers" not in sys.modules:
    absent = ModuleType("diffusers")
    absent.StableDiffusionPipeline = None  # type: ignore[attr-defined]
    sys.modules["diffusers"] = absent

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MADE = {
    "OPT": lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "GPT2": lambda: transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4),
    "GPTJ": lambda: transformers.GPTJConfig(
        vocab_size=100, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
    ),
    "Llama": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=48),
    "DebertaV2": lambda: transformers.DebertaV2Config(**SIZES, intermediate_size=48),
    "Deberta": lambda: transformers.DebertaConfig(**SIZES, intermediate_size=48),
    "Roberta": lambda: transformers.RobertaConfig(**SIZES, intermediate_size=48),
    "Bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=48),
}


def _made(cls: Any, name: str, *_: Any, **__: Any) -> Any:
    kind = next((kind for kind in MADE if f"random-{kind}" in name), None)
    if kind is None:
        raise OSError(f"{name}: no tiny model of this architecture here")
    torch.manual_seed(0)
    return cls.from_config(MADE[kind]())


for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM):
    auto.from_pretrained = classmethod(_made)
