"""The output's config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastmerge.dtypes import DType
from fastmerge.models.config import LAYER_COUNTS, count_key, extra_layers, text_config
from fastmerge.models.vocabulary import Vocabulary, text_of
from fastmerge.planning.inputs import Part, TensorPlan, View
from fastmerge.planning.per_layer import Layer, restack

# ---------------------------------------------------------------- the output's config


def output_config(
    config: Mapping[str, Any], dtype: DType | None, tensors: Mapping[str, TensorPlan]
) -> dict[str, Any]:
    """A copy of the donor's config with the written dtype."""
    result: dict[str, Any] = json.loads(json.dumps(config))
    written = {tensor.dtype for tensor in tensors.values() if tensor.dtype.mergeable}
    if dtype is None and len(written) == 1:
        dtype = written.pop()
    if dtype is None or not result:
        return result
    parts = [result, *(part for part in result.values() if isinstance(part, dict))]
    keys = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part, key in keys or [(result, "torch_dtype")]:
        part[key] = dtype.name
    return result


def set_tokens(config: dict[str, Any], rows: int | None, ids: Mapping[str, Any]) -> None:
    """vocab_size (``rows``; None: it stays) and ids of tokens, where the config has them."""
    parts = [config, text_config(config)]
    for part in parts:
        assert isinstance(part, dict)
        for key in ids.keys() & part.keys():
            part[key] = ids[key]
        if rows is not None and (part is parts[1] or "vocab_size" in part):
            part["vocab_size"] = rows


def token_ids(
    config: Mapping[str, Any], old: Vocabulary, new: Vocabulary, of: Mapping[str, Any]
) -> dict[str, Any]:
    """The ids (bos_token_id and such) in a config of the vocabulary ``old`` as ``new`` has them:
    those that the tokenizer's own model says (``of``), else those of the same tokens.
    """
    found: dict[str, Any] = {}
    for part in (config, text_config(config)):
        for key, value in part.items():
            if not key.endswith(("_token_id", "_token_index")) or value is None:
                continue
            role = text_of(new.config.get(key.rpartition("_")[0]))
            if of.get(key) is not None:
                found[key] = of[key]
            elif of and role is not None and role in new.ids:
                found[key] = new.ids[role]
            elif isinstance(value, list):
                moved = [new.ids.get(old.tokens.get(each, ""), each) for each in value]
                found[key] = moved
            else:
                found[key] = new.ids.get(old.tokens.get(value, ""), value)
    return found


def set_layers(
    config: dict[str, Any],
    parts: Sequence[Part],
    lead: View,
    note: Callable[[str], None],
) -> None:
    """The count of layers, and what goes by layer, as stacked; no layers for multi-token
    prediction, which a stack leaves out.
    """
    stack = lead.stack
    if stack is None or not config:
        return
    target = text_config(config)
    assert isinstance(target, dict)
    layers = [
        Layer(item.view, item.start + at, item.where)
        for part in parts
        for item in [part.lead]
        for at in range(part.layers or 0)
    ]
    restack(target, lead, layers, note)
    usual = "n_layer" if stack.layers == "transformer.h" else LAYER_COUNTS[0]
    target[count_key(target) or usual] = lead.layer_total
    for part in (target, config):  # chatglm has two counts; some repeat the language model's
        for key in LAYER_COUNTS:
            if part.get(key) == lead.layer_total:
                part[key] = len(layers)
    if ".decoder." in stack.layers and "decoder_layers" in target:
        target["decoder_layers"] = len(layers)
    for key in extra_layers(config):
        target[key] = 0
        note(f"config.json: {key} is 0: a stack leaves these layers out")
