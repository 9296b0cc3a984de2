"""``modules:``: the parts of a multimodal or encoder-decoder model, each merged as it is asked.

Which part a tensor belongs to is read from its name, by the words of transformers' own layouts, old
and new. Parts that no module names are copied from the lead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fastmerge.errors import ModelError, RecipeError
from fastmerge.planning.build import Builder
from fastmerge.planning.inputs import Part, TensorPlan, View

# By part: what recipes call it (mergekit's names among them), and the modules in tensors' names
# that say it. The first that fits counts: vision towers have encoders inside. What fits none is
# the text model: its layers, embeddings and head.
_PARTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "projector": (
        ("projector", "multi_modal_projector", "connector"),
        ("multi_modal_projector", "mm_projector", "connector", "merger", "deepstack_merger_list"),
    ),
    "vision": (
        ("vision", "vision_tower", "vision_model", "visual"),
        ("vision_tower", "vision_model", "visual"),
    ),
    "audio": (("audio", "audio_tower"), ("audio_tower",)),
    "encoder": (("encoder",), ("encoder",)),
    "decoder": (("decoder",), ("decoder",)),
    "text": (("text", "text_decoder", "text_model", "language_model", "shared"), ()),
}


def part_of(tensor: str) -> str:
    """The part that the tensor so named belongs to."""
    modules = tensor.split(".")[:-1]
    for part, (_, words) in _PARTS.items():
        if any(word in modules for word in words):
            return part
    return "text"


def find_parts(names: Sequence[str], lead: View, where: str) -> tuple[list[str], list[str]]:
    """The part that each module of a recipe means, and the lead's parts that none does; RecipeError
    for a name that means none of the lead's, or a part that two mean.
    """
    there = list(dict.fromkeys(map(part_of, lead.tensors)))
    found: list[str] = []
    for name in names:
        part = next((part for part, (called, _) in _PARTS.items() if name in called), None)
        if part not in there:
            raise RecipeError(
                f"{where}: '{lead.label}' has no module '{name}'; it has {', '.join(there)}"
            )
        if part in found:
            raise RecipeError(f"{where}: '{name}' means the {part} part a second time; keep one")
        found.append(part)
    return found, [part for part in there if part not in found]


def by_part(
    build: Builder, parts: Sequence[Part], names: Sequence[Sequence[str]], lead: View
) -> dict[str, TensorPlan]:
    """The lead's tensors, each from the one of ``parts`` whose ``names`` has its part."""
    made: dict[str, TensorPlan] = {}
    for part, own in zip(parts, names, strict=True):
        made |= build.whole(part, _among(own))
    for name in (*lead.tensors, *made):
        if name not in made or name not in lead.tensors:
            raise ModelError(
                f"{parts[0].where}: tensor '{name}' is not in every model of its module and in "
                f"'{lead.label}': they are not of one architecture"
            )
    return {name: made[name] for name in lead.tensors}


def _among(parts: Sequence[str]) -> Callable[[str], bool]:
    return lambda tensor: part_of(tensor) in parts
