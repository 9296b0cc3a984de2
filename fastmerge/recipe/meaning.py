"""What a recipe comes to, as text that stays the same however it is written down."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmerge.recipe.document import (
    AnyDocument,
    Document,
    ModelEntry,
    Module,
    Slice,
    SliceSource,
    settings_for,
)
from fastmerge.recipe.mixture import Mixture

Section = Document | Module | ModelEntry | Slice | SliceSource


def meaning(documents: Sequence[AnyDocument]) -> str:
    """The methods, the models, their layers and the values that are read, as JSON.

    The same for recipes that differ in comments, layout, the order of keys, the spelling of numbers
    and the way to a model's folder, whose own name counts; types, tokenizers and whatever has no
    effect are no part of it.
    """
    numbers = {document.name: number for number, document in enumerate(documents)}

    def model(reference: str | None) -> int | str | None:
        if reference is None or reference in numbers:
            return None if reference is None else numbers[reference]
        return Path(os.path.abspath(os.path.expanduser(reference))).name

    def values(document: Document, section: Section) -> Any:
        found = settings_for(document.method, section)
        return {name: [rule[:2] for rule in found[name].rules] for name in sorted(found)}

    def listed(document: Document, section: Document | Module) -> list[Any]:
        return [[model(entry.model), values(document, entry)] for entry in section.models or ()]

    def stacked(document: Document, section: Document | Module) -> list[Any]:
        return [
            [
                model(part.base_model),
                values(document, part),
                [
                    [model(source.model), source.layer_range, values(document, source)]
                    for source in part.sources
                ],
            ]
            for part in section.slices or ()
        ]

    def module(document: Document, name: str, section: Module) -> list[Any]:
        # A seed that follows from this stays what it was where there are no slices.
        layers = stacked(document, section)
        own = [name, values(document, section), listed(document, section)]
        return [*own, layers] if layers else own

    def described(document: Document) -> list[Any]:
        return [
            document.merge_method,
            model(document.base_model),
            values(document, document),
            listed(document, document),
            [module(document, *item) for item in (document.modules or {}).items()],
            stacked(document, document),
        ]

    def mixed(mixture: Mixture) -> list[Any]:
        # Prompts draw nothing: only what the random numbers are for.
        return [
            "mixture",
            mixture.gate_mode,
            model(mixture.base_model),
            [
                [[model(one.source_model), one.noise_scale] for one in experts or ()]
                for experts in (mixture.experts, mixture.shared_experts)
            ],
        ]

    return json.dumps(
        [mixed(one) if isinstance(one, Mixture) else described(one) for one in documents]
    )
