"""How a recipe names a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmerge.recipe.section import FaultError
from fastmerge.recipe.settings import shown

_TYPOGRAPHIC = "\u201c\u201d\u2018\u2019\u201e\u00ab"


def reference(value: Any) -> str:
    """``path``, ``hub/id`` or either with ``@revision``, and behind a ``+`` the same of an adapter,
    from mergekit's text or mapping form.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("is empty; give a folder or a Hub id")
        if value.strip()[0] in _TYPOGRAPHIC:
            raise ValueError(f"stands in typographic quotes, {value.strip()}; write plain ones")
        return value.strip()
    if isinstance(value, Mapping) and "lora" in value and not {"model", "path"} & set(value):
        raise FaultError("has a LoRA and no model; name the model that it adapts")
    if not isinstance(value, Mapping) or not {"model", "path"} & set(value):
        raise ValueError(f"must be a folder or a Hub id, not {shown(value)}")
    for name, item in value.items():
        if item is None:
            continue
        if name not in ("model", "path", "revision", "lora"):
            raise ValueError(
                f"has the key '{name}', which is not supported; known: model, path, revision, lora"
            )
    if value.get("lora") is not None:
        bare = {key: item for key, item in value.items() if key != "lora"}
        return f"{reference(bare)}+{reference(value['lora'])}"
    if "model" in value:
        return reference(value["model"])
    path, revision = value["path"], value.get("revision")
    if not isinstance(path, str):
        raise ValueError(f"has a path that is not text: {shown(path)}")
    if revision is not None and type(revision) not in (str, int):
        raise ValueError(f"has a revision that is not text: {shown(revision)}")
    return path if revision is None else f"{path}@{revision}"
