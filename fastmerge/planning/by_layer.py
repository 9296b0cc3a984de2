"""What a plan's parameters come to, layer by layer: for people who look before they merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastmerge.errors import some_of
from fastmerge.models.architecture import kinds_of, layer_of
from fastmerge.planning.inputs import TensorPlan
from fastmerge.tree.nodes import Leaf, Merge, Node, Stored

_ALWAYS = ("t", "weight", "density", "scale")  # shown also where they are the same everywhere
_MOST_KINDS = 4  # named, before a count


class Row(NamedTuple):
    """Tensors of some kinds in layers ``first`` to ``last`` (None: outside of layers) that have the
    same values. ``values``: by parameter, of a per-model one ``weight of chat``; ``copy``: the
    model that they are copied from, and how far its layer lies from theirs.
    """

    first: int | None
    last: int | None
    kinds: tuple[str, ...]
    values: Mapping[str, Any]

    @property
    def layers(self) -> str:
        if self.first is None:
            return "-"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    @property
    def tensors(self) -> str:
        return some_of(self.kinds, _MOST_KINDS)

    def as_dict(self) -> dict[str, Any]:
        return {"layers": [self.first, self.last], "tensors": list(self.kinds),
                "values": dict(self.values)}  # fmt: skip


def by_layer(tensors: Iterable[TensorPlan], references: Sequence[str]) -> list[Row]:
    """The values of every tensor that is merged or copied, where any is merged or moved: kinds of
    tensors that have the same in every layer are one row, for as many layers as they stay the same.
    ``references``: the plan's models. Of documents that name each other, those of the last.
    """
    kinds: dict[str, dict[int | None, Mapping[str, Any]]] = {}
    every = [*tensors]
    for tensor, (kind, layer) in zip(every, kinds_of(t.name for t in every), strict=True):
        if isinstance(tensor.root, Merge):
            converted = _converted(tensor.root)
            if converted is None:
                values = _values(tensor.root, references)
            else:
                values = {"copy": _copied(converted, tensor.name, references)}
        elif isinstance(tensor.root, Stored) and tensor.dtype.mergeable:
            values = {"copy": _copied(tensor.root, tensor.name, references)}
        else:
            continue
        kinds.setdefault(kind, {})[layer] = values
    constant = _constant([values for layers in kinds.values() for values in layers.values()])
    alike: dict[Any, list[str]] = {}
    for kind, layers in kinds.items():
        shown = tuple(
            (number, tuple((k, v) for k, v in values.items() if k not in constant))
            for number, values in sorted(layers.items(), key=lambda item: item[0] or 0)
        )
        alike.setdefault(shown, []).append(kind)
    rows = []
    for layers, names in alike.items():
        for first, last, values in _runs(layers):
            rows.append(Row(first, last, tuple(names), dict(values)))
    return sorted(rows, key=lambda row: (row.first is None, row.first or 0))


def _values(merge: Merge, references: Sequence[str]) -> dict[str, Any]:
    found = dict(merge.values)
    alone = [_alone(node) for node in merge.operands]
    names = merge.labels or [_called(node, references) for node, _ in alone]
    places = merge.numbers if merge.labels and merge.numbers else range(len(merge.operands))
    for place, own, (_, below) in zip(places, merge.operand_values, alone, strict=True):
        for name, value in {**below, **own}.items():
            found[f"{name} of {names[place]}"] = value
    return found


def _alone(node: Node) -> tuple[Node, Mapping[str, Any]]:
    """What a merge of one tensor alone (its noise) is of, with its values; else the node."""
    if isinstance(node, Merge) and node.base is None and len(node.operands) == 1:
        inner, values = _alone(node.operands[0])
        return inner, {**values, **node.values, **node.operand_values[0]}
    return node, {}


def _converted(merge: Merge) -> Stored | None:
    """What a merge writes in another type, and does no more."""
    alone = merge.method.name == "passthrough" and merge.operand_values[0].get("scale") is None
    source = merge.operands[0]
    return source if alone and isinstance(source, Stored) else None


def _copied(source: Stored, name: str, references: Sequence[str]) -> str:
    model = references[source.model]
    layer, own = layer_of(name), layer_of(source.name)
    moved = own.number - layer.number if layer and own else 0
    return f"{model}, layer {moved:+d}" if moved else model


def _called(node: Node, references: Sequence[str]) -> str:
    if isinstance(node, Leaf):
        stored = node.stored
        return references[stored[0].model] if stored else "what is made"
    return f"a {node.method.name}"


def _constant(each: Sequence[Mapping[str, Any]]) -> set[str]:
    """The parameters of no interest: the same everywhere, and not among those always shown."""
    names = {name for values in each for name in values}
    return {
        name
        for name in names
        if name.partition(" of ")[0] not in _ALWAYS
        and len({repr(values.get(name)) for values in each}) == 1
    }


def _runs(layers: Iterable[tuple[int | None, Any]]) -> list[tuple[int | None, int | None, Any]]:
    runs: list[tuple[int | None, int | None, Any]] = []
    for number, values in layers:
        if runs and number is not None and runs[-1][1] == number - 1 and runs[-1][2] == values:
            runs[-1] = (runs[-1][0], number, values)
        else:
            runs.append((number, number, values))
    return runs
