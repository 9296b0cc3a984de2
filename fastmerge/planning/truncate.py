"""Embeddings and heads cut to as many rows as all models have, as by mergekit's
``--unsafe-truncate-embeddings``: right only where all number their tokens alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastmerge.dtypes import F32
from fastmerge.models.architecture import is_vocabulary
from fastmerge.planning.inputs import Note, Part, TensorPlan, View, views_of, with_views
from fastmerge.tree.nodes import RowMap, Rows, Stored


def truncate(parts: Sequence[Part], lead: View, note: Note) -> tuple[list[Part], View]:
    """The parts and the lead with every vocabulary tensor cut to the fewest rows that it has."""
    views = views_of(parts, lead)
    fewest: dict[str, int] = {}
    for view in views.values():
        for name, tensor in view.tensors.items():
            matrix = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
            if tensor.shape and is_vocabulary(matrix):
                fewest[name] = min(fewest.get(name, tensor.shape[0]), tensor.shape[0])
    changed = {}
    for key, view in views.items():
        cut = {
            name: _first(tensor, fewest[name])
            for name, tensor in view.tensors.items()
            if name in fewest and fewest[name] < tensor.shape[0] and tensor.dtype.mergeable
        }
        changed[key] = replace(view, tensors={**view.tensors, **cut}) if cut else view
        for name, tensor in cut.items():
            before = view.tensors[name].shape[0]
            note(
                f"UNSAFE vocabulary truncation: {name} of '{view.label}' is cut from {before} to "
                f"{tensor.shape[0]} rows, which is right only where all models number their tokens "
                "alike; config.json and the tokenizer stay as they are"
            )
    return list(with_views(parts, changed)), changed[id(lead)]


def _first(tensor: TensorPlan, rows: int) -> TensorPlan:
    shape = (rows, *tensor.shape[1:])
    places = RowMap(np.zeros(rows, np.int32), np.arange(rows), (), rows)
    dtype = tensor.root.dtype if isinstance(tensor.root, Stored) else F32
    leaf = Rows((tensor.root,), (tensor.shape[0],), places, shape, dtype)
    return TensorPlan(tensor.name, shape, tensor.dtype, leaf)
