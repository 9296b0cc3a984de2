"""What the configs of the models of one document say differently.

Weights that were trained under another setting are merged under the lead's: told, key by key, with
both values. Head counts that cut one matrix differently are refused: its rows then mean other
things in each model, and no setting of the output is right for both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.errors import ModelError
from fastmerge.models.config import LAYER_COUNTS, layer_count, text_config, whole
from fastmerge.planning.inputs import Note, Part, View

MOST = 5  # differences told one by one

# Keys that change nothing in what a merged model computes: who wrote the file and how, training,
# generation, names for people; what is checked by the tensors themselves or told elsewhere.
_SILENT = {
    "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map", "name_or_path",
    "use_cache", "return_dict", "torchscript", "gradient_checkpointing", "pretraining_tp",
    "tokenizer_class", "finetuning_task", "problem_type", "id2label", "label2id", "num_labels",
    "task_specific_params", "prefix", "license", "tie_word_embeddings", "vocab_size",
    "quantization_config", "compression_config", "use_bfloat16", "chunk_size_feed_forward",
    "is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size",
    "tie_encoder_decoder", "pruned_heads", "output_scores",
    "pad_token_id", "bos_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
    "mask_token_id", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "max_length", "min_length", "do_sample", "num_beams", "early_stopping", "length_penalty",
    "num_return_sequences", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "diversity_penalty",
    "num_beam_groups", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "remove_invalid_values", "output_attentions", "output_hidden_states", "tf_legacy_loss",
    *LAYER_COUNTS,
}  # fmt: skip
_SILENT_WORDS = (
    "dropout", "pdrop", "initializer", "loss", "aux_", "unsloth", "_coef", "rescale_layer",
    "attn_implementation",
)  # fmt: skip
# The rope settings of transformers 4, which 5 writes together as rope_parameters.
_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_parameters")


def check_agreement(parts: Sequence[Part], lead: View, note: Note, *, tokens: bool = True) -> None:
    """Notes what the inputs' configs say otherwise than the lead's; ModelError for head counts that
    cut the same matrices differently. tokens: whether the vocabulary is the lead's too.
    """
    views = {id(item.view): item for part in parts for item in part.inputs}
    said: dict[str, list[str]] = {}
    # Stacked layers bring their own entries of lists by layer; layers merged with others do not.
    merged = any(len(part.inputs) > 1 for part in parts)
    own = {} if not lead.config else _flat(lead.config, merged)
    for item in views.values():
        if not own or not item.view.config or item.view.config == lead.config:
            continue
        _check_heads(lead, item.view, item.where)
        for key, (mine, other) in _differences(own, _flat(item.view.config, merged)).items():
            if not tokens and (key.endswith("vocab_size") or "_token_i" in key):
                continue
            values = said.setdefault(key, [f"{_show(mine)} in '{lead.label}'"])
            values.append(f"{_show_beside(other, mine)} in '{item.view.label}'")
    for key in list(said)[:MOST]:
        note(f"config.json: {key} is {', '.join(said[key])}: the output has the first")
    rest = list(said)[MOST:]
    if rest:
        more = "s" if len(rest) > 1 else ""
        note(f"config.json: {len(rest)} more key{more} differ: {', '.join(rest)}")


# ---------------------------------------------------------------- heads

_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")


def _check_heads(lead: View, other: View, where: str) -> None:
    mine, theirs = text_config(lead.config), text_config(other.config)
    a, b = _heads(mine), _heads(theirs)
    # Where the products differ too, so do the shapes, which are refused by the tensor's name.
    cut_one = all(
        a[count] * a["head_dim"] == b[count] * b["head_dim"]
        for count in ("num_attention_heads", "num_key_value_heads")
    )
    differ = {key: (a[key], b[key]) for key in a if cut_one and a[key] != b[key]}
    for key in mine:  # of linear attention, of state spaces, ...
        given = whole(mine, key), whole(theirs, key)
        other_heads = key not in (*_COUNTS, *_KEY_COUNTS) and "heads" in key.split("_")
        if other_heads and all(given) and given[0] != given[1]:
            differ[key] = given
    if not differ:
        return
    values = ", ".join(f"{key} {x} and {y}" for key, (x, y) in differ.items())
    raise ModelError(
        f"{where}: config.json of '{lead.label}' and of '{other.label}' cut the same matrices into "
        f"other heads ({values}); only models with equal heads can be merged"
    )


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    """The head counts and the width of a head, with what follows where one is left out."""
    heads = _of(config, _COUNTS)
    own = whole(config, "head_dim")
    keys = _of(config, _KEY_COUNTS) or heads
    width = _of(config, _WIDTHS)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": own or (width // heads if heads else 0),
    }


def _of(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    return next((whole(config, key) for key in keys if whole(config, key) > 0), 0)


# ---------------------------------------------------------------- other settings


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    found = {}
    for key in dict.fromkeys((*mine, *theirs)):
        a, b = mine.get(key), theirs.get(key)
        if a == b or (_is_off(a) and _is_off(b)):
            continue
        found[key] = (a, b)
    return found


def _is_off(value: Any) -> bool:
    """Whether a setting is what a file that leaves it out means."""
    return value is None or value is False or value in (0, [], {}, "")


def _flat(config: Mapping[str, Any], merged: bool) -> dict[str, Any]:
    """What a config says that has a meaning for a merged model, by dotted key; the language model's
    part without its nest, so that both layouts of one model agree. merged: lists by layer too.
    """
    part = text_config(config)
    found = _settings(part, layers=0 if merged else layer_count(config) or 0)
    # Left out by one version of transformers, written by another.
    found |= {key: count for key, count in _heads(part).items() if count and key not in _COUNTS}
    if part is not config:
        for key, value in _settings(config, layers=0).items():
            if not key.split(".")[0].endswith("_config") or "vision" in key or "audio" in key:
                found.setdefault(key, value)
        if "model_type" in config:
            found["model_type"] = config["model_type"]
    return found


def _settings(config: Mapping[str, Any], layers: int, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        silent = key.startswith("_") or key in _SILENT or any(w in key for w in _SILENT_WORDS)
        by_layer = isinstance(value, list) or "pattern" in key
        if silent or key in _ROPE or (by_layer and layers > 2 and _length(value) == layers):
            continue  # entries by layer differ where the layers do
        if isinstance(value, Mapping):
            found |= _settings(value, layers, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found | {f"{prefix}{key}": value for key, value in _rope(config).items()}


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (list, str)) else 0


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in the names of transformers 4: rope_theta, and rope_scaling without what
    says nothing.
    """
    found = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    scaling: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key)
        scaling |= given if isinstance(given, Mapping) else {}
    for key in tuple(found):
        if scaling.get(key) is not None:
            found[key] = scaling[key]
        scaling.pop(key, None)
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind)
    if scaling["rope_type"] in (None, "default"):
        del scaling["rope_type"]
    found["rope_scaling"] = scaling or None
    return {key: value for key, value in found.items() if value is not None}


def _show_beside(value: Any, mine: Any) -> str:
    """``value``; of a list as long as the lead's, an entry a layer, the first that is another."""
    if not isinstance(value, list) or not isinstance(mine, list):
        return _show(value)
    if len(value) != len(mine) or len(mine) <= 8:
        return _show(value)
    other = [index for index, entry in enumerate(value) if entry != mine[index]]
    more = f" and another in {len(other) - 1} more places" if len(other) > 1 else ""
    return f"{_show(value[other[0]])} at {other[0]}{more}"


def _show(value: Any) -> str:
    if value is None:
        return "not given"
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:297]}..."
