"""The output's config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.dtypes import DType
from fastmerge.errors import ModelError
from fastmerge.models.config import (
    DECODER_COUNTS,
    LAYER_COUNTS,
    count_key,
    extra_layers,
    part_layers,
    section,
    text_config,
    whole,
)
from fastmerge.models.vocabulary import Vocabulary, text_of
from fastmerge.planning.inputs import Note, TensorPlan
from fastmerge.planning.modules import ModulePlan
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


def set_layers(config: dict[str, Any], module: ModulePlan, note: Note) -> None:
    """The count of a module's layers, and what goes by layer, as stacked; no layers for multi-token
    prediction, which a stack leaves out.
    """
    lead, stack = module.lead, module.lead.stack
    if stack is None or not config or module.whole:
        return
    layers = [
        Layer(item.view, item.start + at, item.where)
        for part in module.runs
        for item in [part.lead]
        for at in range(part.layers or 0)
    ]
    if module.part not in ("", "text"):
        _set_in_part(config, module, layers, note)
        return
    target = text_config(config)
    assert isinstance(target, dict)
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


def _set_in_part(
    config: dict[str, Any], module: ModulePlan, layers: Sequence[Layer], note: Note
) -> None:
    """The same of a part that is not the language model of a multimodal one."""
    said = part_layers(config, module.part)
    where, label, old = layers[0].where, module.lead.label, module.lead.layer_total
    if said.path is None or said.number is None:
        if len(layers) != old:
            raise ModelError(
                f"{where}: config.json of '{label}' does not count the {old} layers of its "
                f"{module.part} part, so it cannot say that there are {len(layers)}; give {old}"
            )
        return
    target = section(config, said.path)
    assert isinstance(target, dict)
    before = {key: len(value) for key, value in target.items() if isinstance(value, list)}
    restack(target, module.lead, layers, note)
    for key in target:
        # Each has a merger of its own in the projector.
        if "deepstack" in key and key in before and len(target[key]) != before[key]:
            raise ModelError(
                f"{where}: config.json of '{label}' takes {before[key]} layers by {key}, and of "
                f"these slices it would take {len(target[key])}; give each of them once"
            )
    for key in said.keys:
        target[key] = len(layers)
    apart = any(whole(config, key) > 0 for key in DECODER_COUNTS)
    if not said.path and config.get("is_encoder_decoder") and not apart:
        # One count was both halves'.
        target[DECODER_COUNTS[1]] = len(layers) if module.part == "decoder" else old
