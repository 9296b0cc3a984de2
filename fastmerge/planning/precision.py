"""Models stored as codes with scales, as the merge sees them: numbers, one leaf a tensor.

Only what is copied as it is stays codes: layers and whole models under `passthrough`, where no type
is asked for and all are of one format.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fastmerge.dtypes import DType
from fastmerge.errors import ModelError, UnsupportedError
from fastmerge.models.architecture import layer_of
from fastmerge.models.low_precision import LowPrecision, with_section, without_section
from fastmerge.models.patterns import followed
from fastmerge.models.quantised import sections
from fastmerge.planning.inputs import (
    Encoding,
    Note,
    Part,
    TensorPlan,
    View,
    Written,
    views_of,
    with_views,
)
from fastmerge.tree.nodes import Dequantised, Leaf, LowRank, Merge, Node, Stored, walk


def settle_precision(
    parts: Sequence[Part], lead: View, dtype: DType | None, note: Note
) -> tuple[list[Part], View]:
    """The parts and the lead with codes as numbers, unless all is copied as it is."""
    views = views_of(parts, lead)
    if dtype is None and _copied(parts, list(views.values())):
        return list(parts), lead
    changed = {key: as_numbers(view, note) for key, view in views.items()}
    return with_views(parts, changed), changed.get(id(lead), lead)


def as_numbers(view: View, note: Note) -> View:
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
    by_codes = {coded.codes: (name, coded) for name, coded in found.tensors.items()}
    gone = found.consumed
    tensors: dict[str, TensorPlan] = {}
    for stored, tensor in view.tensors.items():
        if stored not in gone:
            tensors[stored] = tensor
        if stored not in by_codes:
            continue
        name, coded = by_codes[stored]
        codes, scales = tensor.root, view.tensors[coded.scales].root
        assert isinstance(codes, Stored) and isinstance(scales, Stored)  # nothing merges them
        leaf = Dequantised(codes, scales, coded.coding, coded.shape)
        tensors[name] = TensorPlan(name, coded.shape, found.dtype, leaf)
    return replace(view, config=without_section(view.config, found.key), tensors=tensors)


def _said(view: View, found: LowPrecision) -> str:
    static = f"; its {len(found.static)} scales of activations are left out" if found.static else ""
    return (
        f"model '{view.label}' is {found}: its {len(found.tensors)} coded tensors are merged as "
        f"the numbers they stand for{static}"
    )


def said_narrowed(models: Iterable[str], note: Note) -> None:
    """Notes that float64 ``models`` are merged in float32."""
    for model in models:
        note(
            f"weights of '{model}' are float64: merged in float32, each rounded to it where it is "
            "read"
        )


# ---------------------------------------------------------------- written as the base is


def as_stored(
    result: View,
    lead: View,
    models: Sequence[View],
    where: str,
    note: Note,
) -> View:
    """The result with each tensor written as the one of the lead (before its codes were numbers)
    is stored, or of the model that leads its layers; the lead's section says so in the config.

    models: as they are stored, by their number. Raises ModelError where the formats of several
    would be needed.
    """
    own = _own_models(lead)
    format_of_lead = lead.low_precision
    if any(isinstance(tensor.root, LowRank) for tensor in lead.tensors.values()):
        # Its adapter is for numbers; its base is what is stored.
        format_of_lead = next((f for m in sorted(own) if (f := models[m].low_precision)), None)
    tensors: dict[str, TensorPlan] = {}
    static: dict[str, TensorPlan] = {}
    coded = rounded = 0
    for name, tensor in result.tensors.items():
        leaf = _lead_of(tensor.root, own)
        if isinstance(leaf, Dequantised):
            model = models[leaf.codes.model]
            found = model.low_precision
            if found is None or format_of_lead is None or found.section != format_of_lead.section:
                raise ModelError(
                    f"{where}: as_base: tensor '{name}' comes from '{model.label}', whose format "
                    f"is not that of '{lead.label}'; a model has one: give a type instead"
                )
            if tensor.in_float64:
                raise UnsupportedError(
                    f"{where}: as_base: codes are made of float32, and '{name}' is merged in "
                    "float64; write `dtype: float32`"
                )
            tensors[name] = replace(tensor, encoding=_encoding(tensor, leaf, found))
            static |= _static(name, leaf, model, found)
            coded += 1
            rounded += tensor.root is not leaf
        elif isinstance(leaf, Stored) and leaf.dtype.mergeable and tensor.dtype.mergeable:
            tensors[name] = replace(tensor, dtype=leaf.dtype)
        else:
            tensors[name] = tensor
    if not coded or format_of_lead is None:
        note(
            f"as_base: '{lead.label}', the model that leads, has no codes: what is written has the "
            "types of its tensors"
        )
        return replace(result, tensors=tensors)
    if rounded:
        note(
            f"{rounded} tensors are rounded to the codes of '{lead.label}' ({format_of_lead.kind})"
        )
    if static:
        note(f"{len(static)} scales of activations are those of the model that leads: check them")
    config = with_section(result.config, format_of_lead.key, format_of_lead.section)
    return replace(result, tensors={**tensors, **static}, config=config)


def with_moved_names(result: View, lead: View) -> View:
    """The result with the modules that its quantiser's section names (those left as numbers, say)
    named as they are now, where the layers of ``lead``, as it is stored, are others' or elsewhere.
    """
    found = list(sections(result.config))
    if not found:
        return result
    own = _own_models(lead)
    moves: dict[str, dict[str, None]] = {}
    for name, tensor in result.tensors.items():
        leaf = _lead_of(tensor.root, own)
        stored = leaf.own if isinstance(leaf, Leaf) else None
        if stored is not None:
            before, after = stored.name.rpartition(".")[0], name.rpartition(".")[0]
            moves.setdefault(before, {})[after] = None
    if all(before in after and len(after) == 1 for before, after in moves.items()):
        return result
    config = result.config
    for key, section in found:
        config = with_section(config, key, followed(section, moves, f"'{lead.label}': {key}"))
    return replace(result, config=config)


def _own_models(view: View) -> set[int]:
    """The numbers of the models whose tensors a view has, as they are or adapted."""
    roots = (tensor.root for tensor in view.tensors.values())
    return {own.model for root in roots if isinstance(root, Leaf) and (own := root.own)}


def _lead_of(root: Node, models: set[int]) -> Leaf | None:
    """The leaf of one of the lead's models, else the one that leads the tree, under adapters."""
    for node in walk(root):
        if isinstance(node, Leaf) and node.own is not None and node.own.model in models:
            root = node
            break
    while isinstance(root, Merge):
        root = root.base if root.base is not None else root.operands[0]
    while isinstance(root, LowRank):
        root = root.base
    return root


def _encoding(tensor: TensorPlan, leaf: Dequantised, found: LowPrecision) -> Encoding:
    codes = scales = tensor.name
    shape = tensor.shape
    if leaf.coding.code == "mxfp4":
        codes, scales = f"{codes}_blocks", f"{scales}_scales"
        shape = leaf.codes.shape
    else:
        scales += leaf.scales.name.removeprefix(leaf.codes.name)
    powers = isinstance(found.section, dict) and found.section.get("scale_fmt") == "ue8m0"
    return Encoding(
        leaf.coding,
        Written(codes, leaf.codes.dtype, shape),
        Written(scales, leaf.scales.dtype, leaf.scales.shape),
        powers,
    )


def _static(
    name: str, leaf: Dequantised, model: View, found: LowPrecision
) -> dict[str, TensorPlan]:
    """The scales of activations that belong to a tensor's layer, or module outside the layers,
    under the output's names.
    """
    theirs, ours = layer_of(leaf.codes.name), layer_of(name)
    if theirs is None or ours is None:
        old, new = leaf.codes.name.rpartition(".")[0], name.rpartition(".")[0]
    else:
        old, new = f"{theirs.stack}.{theirs.number}", f"{ours.stack}.{ours.number}"
    return {
        (made := f"{new}.{each.removeprefix(f'{old}.')}"): replace(model.tensors[each], name=made)
        for each in found.static
        if each.startswith(f"{old}.")
    }
