"""The output's config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.dtypes import DType
from fastmerge.errors import ModelError
from fastmerge.models.architecture import PER_LAYER_LISTS, Stack, text_config
from fastmerge.plan.inputs import Part, TensorPlan

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


def set_layers(
    config: dict[str, Any],
    parts: Sequence[Part],
    stack: Stack | None,
) -> None:
    """num_hidden_layers, and the lists with one entry for each layer, as stacked."""
    if stack is None or not config:
        return
    target = text_config(config)
    assert isinstance(target, dict)
    target[stack.count_key] = sum(part.layers or 0 for part in parts)
    for key in PER_LAYER_LISTS:
        if not isinstance(target.get(key), list):
            continue
        entries: list[Any] = []
        for part in parts:
            item = part.lead
            given = text_config(item.view.config).get(key)
            end = item.start + (part.layers or 0)
            if not isinstance(given, list) or len(given) < end:
                raise ModelError(
                    f"{item.where}: config.json of '{item.view.label}' has no '{key}' for layers "
                    f"up to {end}, as stacking layers needs"
                )
            entries += given[item.start : end]
        target[key] = entries
