"""How many layers a model has: as many as its config counts.

What its files hold behind them, and prediction heads beside them, serves multi-token prediction.
Under ``models:`` layers that the config counts as such are copied from the lead, never merged and
never counted in a gradient; others behind the last are left out, as transformers leaves them out.
Under ``slices:`` all are left out: they predict for a model that the stack no longer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastmerge.errors import ModelError, RecipeError, UnsupportedError, and_others, some_of
from fastmerge.limits import MAX_LAYERS
from fastmerge.models.architecture import EXTRA_PREFIXES, layer_of
from fastmerge.models.config import LAYER_COUNTS, extra_layers, text_config
from fastmerge.models.names import layer_stacks
from fastmerge.planning.inputs import Note, Part, View, of_language, views_of, with_views
from fastmerge.recipe.document import SliceSource


def check_layers(view: View, where: str) -> None:
    """Raises ModelError where the language model lacks one of the layers that it counts."""
    stack = view.stack
    if view.layer_total > MAX_LAYERS:
        raise ModelError(
            f"{where}: model '{view.label}' counts {view.layer_total} layers, over {MAX_LAYERS}; "
            "mend its config.json"
        )
    if stack is None or "block_configs" in text_config(view.config):  # whose layers may be empty
        return
    stored = view.stored(stack.layers)
    for key in LAYER_COUNTS:
        count = text_config(view.config).get(key)
        if isinstance(count, int) and count < 1 and view.counted is None:
            raise ModelError(
                f"{where}: config.json of '{view.label}' says {key} {count}, and its files hold "
                f"{stored} layers: the result would not load; mend it"
            )
    held = view.layers[stack.layers]
    # Never one by one: a stranger's config may count 2^64.
    lost = view.layer_total - sum(number < view.layer_total for number in held)
    if not lost:
        return
    first = next(number for number in range(view.layer_total) if number not in held)
    counts = f"config.json counts {view.layer_total}" if view.counted else "there are later ones"
    raise ModelError(
        f"{where}: model '{view.label}' has no layer {first}{and_others(lost)}: no tensor is named "
        f"{stack.layers}.{first}.*, and {counts}; download or copy it again"
    )


def check_whole_range(view: View, given: tuple[int, ...] | None, where: str) -> None:
    """Raises RecipeError for a ``layer_range`` beside a whole model that is not all of it."""
    count = 0 if view.stack is None else view.count(view.stack.layers)
    if given is not None and given != (0, count):
        start, end = given
        raise RecipeError(
            f"{where}: layer_range [{start}, {end}] under 'models:' would have no effect "
            f"('{view.label}' has {count} layers); to choose layers use 'slices:'"
        )


def check_range(view: View, end: int, source: SliceSource) -> None:
    """Raises FastmergeError where there are no layers, or none up to ``end``."""
    stack = view.stack
    if stack is None:
        stacks = layer_stacks(view.tensors)
        called = f", but {stacks[0]}.0." if stacks else ""
        raise UnsupportedError(
            f"{source.at('model')}: '{source.model}' has no layers named as fastmerge knows "
            f"them (such as model.layers.0.){called}; use 'models:', which takes any names"
        )
    count = view.count(stack.layers)
    if end > count:
        start, stored = source.layer_range[0], view.stored(stack.layers)
        behind = (
            f" (config.json; the {stored} in its files include others, such as those for "
            "multi-token prediction)"
        )
        raise RecipeError(
            f"{source.at('layer_range')}: layer_range [{start}, {end}] is out of range: "
            f"'{source.model}' has {count} layers{behind if stored > count else ''}"
        )


def settle_layers(parts: Sequence[Part], note: Note) -> list[Part]:
    """The parts without what a merge of whole models or a stack leaves out of its models."""
    whole = of_language(parts)[0].layers is None
    views = views_of(parts)
    for view in {id(part.lead.view): part.lead.view for part in parts if whole}.values():
        kept = [name for name in view.tensors if name in view.extra] if view.extra else []
        if kept and extra_layers(view.config):
            note(
                f"'{view.label}': {some_of(kept)} stand behind the {view.layer_total} layers that "
                "config.json counts, for multi-token prediction: copied, not merged"
            )
    return with_views(parts, {key: _settled(view, whole, note) for key, view in views.items()})


def _settled(view: View, whole: bool, note: Note) -> View:
    stack = view.stack
    if stack is None:
        return view
    copied = view.layer_total + (sum(extra_layers(view.config).values()) if whole else 0)
    behind = [
        name
        for name in sorted(view.extra)
        if (place := layer_of(name)) is not None and place.number >= copied
    ]
    beside = [name for name in view.tensors if not whole and name.startswith(EXTRA_PREFIXES)]
    if behind:
        note(
            f"'{view.label}': {some_of(behind)} stand behind the {view.layer_total} layers that "
            "config.json counts: left out"
        )
    if beside:
        note(f"'{view.label}': {some_of(beside)} serve multi-token prediction: left out of a stack")
    out = {*behind, *beside}
    if not out:
        return view
    return replace(view, tensors={k: v for k, v in view.tensors.items() if k not in out})
