"""Whether the output has a head of its own: what the models hold decides, not what they are called.

A stored head whose bytes are the embeddings' is one tensor written twice; any other is real, as it
is for transformers 5, whatever the config says. Comparing the two is the one time that a plan reads
weights, and only where the config ties them, or does not say, and a head is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fastmerge.models.config import is_tied, says_tied, untied, written_out
from fastmerge.planning.inputs import (
    Note,
    Part,
    TensorPlan,
    View,
    of_language,
    views_of,
    with_views,
)

Same = Callable[[TensorPlan, TensorPlan], bool]  # whether two tensors' bytes are equal


def settle_heads(
    parts: Sequence[Part],
    lead: View,
    same: Same,
    note: Note,
) -> tuple[list[Part], View]:
    """The parts with every view as the output needs it, with or without a head, and the lead with
    the config that says so. Of stacked slices the last one gives the head.
    """
    views = views_of(parts)
    own = {key: has_own_head(view, same) for key, view in views.items()}
    makers = of_language(parts)
    whole = makers[0].layers is None
    heads = [item.view for part in (makers if whole else makers[-1:]) for item in part.inputs]
    real = next((view for view in heads if own[id(view)]), None)
    if real is not None and says_tied(lead.config) is not False and lead.config:
        if real is lead or own.get(id(lead)):
            note(
                f"'{lead.label}' has a head of its own (not the embeddings' values), which its "
                "config does not say: the output's config has tie_word_embeddings false"
            )
        else:
            note(
                f"'{lead.label}' ties its head to its embeddings and another model does not: the "
                "output has a head of its own"
            )
        lead = replace(lead, config=untied(lead.config))
    config = written_out(lead.config)
    lead = lead if config == lead.config else replace(lead, config=config)
    changed = {}
    for key, view in views.items():
        if real is not None:
            changed[key] = _with_head(view, real.head or "", note)
        elif is_tied(lead.config) or is_tied(view.config):
            changed[key] = _without_head(view, note)
        else:
            changed[key] = view
    return with_views(parts, changed), lead


def has_own_head(view: View, same: Same) -> bool:
    """Whether its head is stored and another tensor than its embeddings."""
    head, embedding = view.head, view.embedding
    if head is None:
        return False
    tied = says_tied(view.config)
    if tied is False or embedding is None:
        return True
    return not same(view.tensors[head], view.tensors[embedding])


def _with_head(view: View, name: str, note: Note) -> View:
    if view.head is not None or view.embedding is None or not is_tied(view.config):
        return view
    note(f"'{view.label}' ties its head to its embeddings: these stand in for its lm_head")
    stand_in = replace(view.tensors[view.embedding], name=name)
    return replace(view, tensors={**view.tensors, name: stand_in})


def _without_head(view: View, note: Note) -> View:
    if view.head is None:
        return view
    note(f"{view.head} is not written: the config ties it to the embeddings")
    return replace(view, tensors={k: v for k, v in view.tensors.items() if k != view.head})
