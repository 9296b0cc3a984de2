"""Models stored as codes with scales, as the merge sees them: numbers, one leaf a tensor.

Only what is copied as it is stays codes: layers and whole models under `passthrough`, where no type
is asked for and all are of one format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fastmerge.dtypes import DType
from fastmerge.models.low_precision import LowPrecision, without_section
from fastmerge.plan.inputs import Part, TensorPlan, View, with_views
from fastmerge.tree.nodes import Dequantised, Stored


def settle_precision(
    parts: Sequence[Part], lead: View, dtype: DType | None, note: Callable[[str], None]
) -> tuple[list[Part], View]:
    """The parts and the lead with codes as numbers, unless all is copied as it is."""
    views = {id(lead): lead, **{id(item.view): item.view for p in parts for item in p.inputs}}
    if dtype is None and _copied(parts, list(views.values())):
        return list(parts), lead
    changed = {key: as_numbers(view, note) for key, view in views.items()}
    return with_views(parts, changed), changed.get(id(lead), lead)


def as_numbers(view: View, note: Callable[[str], None]) -> View:
    """The view with codes as numbers, and a note of it; itself where it has none."""
    found = view.low_precision
    if found is None:
        return view
    note(_said(view, found))
    return dequantised(view, found)


def _copied(parts: Sequence[Part], views: Sequence[View]) -> bool:
    copies = all(
        part.method.name == "passthrough" and not any(v.gives("scale") for v in part.each)
        for part in parts
    )
    if not copies:
        return False
    formats = [view.low_precision for view in views]
    sections = [None if found is None else found.section for found in formats]
    return all(section == sections[0] for section in sections)


def dequantised(view: View, found: LowPrecision) -> View:
    """The view with numbers in place of codes, and without the section that says so."""
    by_codes = {coded.codes: name for name, coded in found.tensors.items()}
    gone = found.consumed
    tensors: dict[str, TensorPlan] = {}
    for stored, tensor in view.tensors.items():
        name = by_codes.get(stored)
        if name is None:
            if stored not in gone:
                tensors[stored] = tensor
            continue
        coded = found.tensors[name]
        codes, scales = tensor.root, view.tensors[coded.scales].root
        assert isinstance(codes, Stored) and isinstance(scales, Stored)  # nothing merges them
        leaf = Dequantised(codes, scales, coded.coding, coded.shape)
        tensors[name] = TensorPlan(name, coded.shape, found.dtype, leaf)
    return replace(view, config=without_section(view.config, found.key), tensors=tensors)


def _said(view: View, found: LowPrecision) -> str:
    codings = dict.fromkeys(str(coded.coding) for coded in found.tensors.values())
    several = ", ..." if len(codings) > 2 else ""
    static = f"; its {len(found.static)} scales of activations are left out" if found.static else ""
    return (
        f"model '{view.label}' is {found.kind} ({'; '.join(list(codings)[:2])}{several}): its "
        f"{len(found.tensors)} coded tensors are merged as the numbers they stand for{static}"
    )
