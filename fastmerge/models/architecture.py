"""What the planner knows of model architectures: where layers, embeddings and heads are, by tensor
name.

Merging by ``models:`` needs none of the table: any set of tensors works. Slicing needs to know what
comes before and after the layers, and tied embeddings need two names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Stack(NamedTuple):
    """One way to name a language model's tensors: ``layers``.<index>.<rest>, what precedes, what
    follows.
    """

    layers: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    embedding: str
    head: str
    count_key: str = "num_hidden_layers"  # in config.json


def _stack(root: str, head: str = "lm_head") -> Stack:
    return Stack(
        layers=f"{root}layers",
        before=(f"{root}embed_tokens.", f"{root}rotary_emb."),
        after=(f"{root}norm.", f"{root}final_layernorm.", f"{head}."),
        embedding=f"{root}embed_tokens.weight",
        head=f"{head}.weight",
    )


# llama, mistral, qwen2/3, gemma 1-3, phi-3, olmo-2, ... share the first row; the others are the
# language models inside multimodal checkpoints, in the old and the new layout of transformers.
# GPT-2 is for its ties.
STACKS = (
    _stack("model."),
    _stack("language_model.model.", "language_model.lm_head"),
    _stack("model.language_model."),
    Stack(
        "transformer.h",
        ("transformer.wte.", "transformer.wpe."),
        ("transformer.ln_f.", "lm_head."),
        "transformer.wte.weight",
        "lm_head.weight",
        "n_layer",
    ),
)

VOCABULARY = frozenset(name for stack in STACKS for name in (stack.embedding, stack.head))

# Written by old versions of transformers; new ones compute it and ignore what a file holds.
COMPUTED = ".rotary_emb.inv_freq"

# config.json may leave `tie_word_embeddings` out; these families' defaults in transformers are
# True.
_TIED_BY_DEFAULT = (
    "bloom", "cohere", "ernie4_5", "falcon", "gemma", "gpt2", "gpt_bigcode", "gpt_neo", "lfm2",
    "mistral3", "mpt", "opt", "recurrent_gemma", "smollm3", "starcoder2",
)  # fmt: skip
_UNTIED = ("gpt_neox",)  # begins like a tied family

# Lists in config.json with one entry for each layer.
PER_LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")

# Settings that say by number which layers are special; stacking layers can put others there.
_BY_NUMBER = (
    "decoder_sparse_step", "first_k_dense_replace", "max_window_layers", "mlp_only_layers",
    "moe_layer_freq", "no_rope_layer_interval", "sliding_window_pattern",
)  # fmt: skip
_ALTERNATING = ("cohere2", "gemma2", "gemma3")  # sliding-window layers by their number's remainder

_LAYER = re.compile(r"(.*?\b(?:layers?|h|blocks?))\.(\d+)\.(.+)")


class LayerName(NamedTuple):
    """A tensor name taken apart: ``stack``.``number``.``rest``."""

    stack: str
    number: int
    rest: str


def layer_of(tensor: str) -> LayerName | None:
    """The outermost numbered layer in a tensor's name, or None (embeddings, final norm, head)."""
    found = _LAYER.fullmatch(tensor)
    return LayerName(found[1], int(found[2]), found[3]) if found else None


def find_stack(layers: Collection[str]) -> Stack | None:
    """The table's row for a model whose `LayerName.stack`s are ``layers``, or None."""
    return next((stack for stack in STACKS if stack.layers in layers), None)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model (multimodal ones nest it)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "num_hidden_layers" in nested else config


def numbered_settings(config: Mapping[str, Any]) -> list[str]:
    """What in a model's config depends on the layers' numbers, other than `PER_LAYER_LISTS`."""
    part = text_config(config)
    found = [key for key in _BY_NUMBER if part.get(key) not in (None, 0, 1, [])]
    if "max_window_layers" in found and not part.get("use_sliding_window", False):
        found.remove("max_window_layers")
    alternates = str(part.get("model_type", "")).startswith(_ALTERNATING)
    if alternates and not found and "layer_types" not in part:
        found.append("the pattern of sliding windows")
    return found


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with a head of its own."""
    result = {**config, "tie_word_embeddings": False}
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and "tie_word_embeddings" in nested:
        result["text_config"] = {**nested, "tie_word_embeddings": False}
    return result


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether transformers makes the head of a model with this config from its embeddings."""
    for part in (config, text_config(config)):
        value = part.get("tie_word_embeddings")
        if value is not None:
            return bool(value)
    kind = str(config.get("model_type", ""))
    return kind.startswith(_TIED_BY_DEFAULT) and not kind.startswith(_UNTIED)
