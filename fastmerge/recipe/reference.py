"""How a recipe names a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmerge.errors import UnsupportedError
from fastmerge.recipe.section import FaultError
from fastmerge.recipe.settings import shown


def reference(value: Any) -> str:
    """``path``, ``hub/id`` or either with ``@revision``, from mergekit's text or mapping form."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("is empty; give a folder or a Hub id")
        return value.strip()
    if isinstance(value, Mapping) and "lora" in value and not {"model", "path"} & set(value):
        raise FaultError("has a LoRA and no model; name the model that it adapts")
    if not isinstance(value, Mapping) or not {"model", "path"} & set(value):
        raise ValueError(f"must be a folder or a Hub id, not {shown(value)}")
    for name, item in value.items():
        if item is None:
            continue
        if name == "lora":
            raise FaultError(
                "has a LoRA, which is not supported: merge the adapter into its base first",
                error=UnsupportedError,
            )
        if name not in ("model", "path", "revision"):
            raise ValueError(
                f"has the key '{name}', which is not supported; known: model, path, revision"
            )
    if "model" in value:
        return reference(value["model"])
    path, revision = value["path"], value.get("revision")
    if not isinstance(path, str):
        raise ValueError(f"has a path that is not text: {shown(path)}")
    if revision is not None and type(revision) not in (str, int):
        raise ValueError(f"has a revision that is not text: {shown(revision)}")
    return path if revision is None else f"{path}@{revision}"
