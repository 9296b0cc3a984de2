"""What a plan is made from: tensors, models or documents as the next one sees them, and parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fastmerge.codings import Coding
from fastmerge.dtypes import DType
from fastmerge.errors import UnsupportedError, brief
from fastmerge.methods import Method
from fastmerge.methods.types import Values
from fastmerge.models.architecture import (
    Stack,
    find_embedding,
    find_head,
    find_stack,
    layer_of,
)
from fastmerge.models.config import layer_count
from fastmerge.models.low_precision import LowPrecision, find_low_precision
from fastmerge.models.model import Model
from fastmerge.models.quantised import find_quantised
from fastmerge.models.vocabulary import Vocabulary
from fastmerge.once import cached_property
from fastmerge.planning.values import ParameterValues
from fastmerge.recipe.settings import Setting
from fastmerge.records import record
from fastmerge.tree.nodes import Merge, Node, Stored, leaves, walk

Note = Callable[[str], None]  # is told what was decided that the recipe does not say


class Written(NamedTuple):
    """A tensor of the output's files."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Encoding:
    """How numbers are written as codes with scales. ``power_of_two``: the scales are, whatever type
    they are stored in.
    """

    coding: Coding
    codes: Written
    scales: Written
    power_of_two: bool


@record()
class TensorPlan:
    """One output tensor. A bare Stored as root, of the same dtype, is copied byte for byte."""

    name: str
    shape: tuple[int, ...]
    dtype: DType  # as written, where there is no encoding
    root: Node
    encoding: Encoding | None = None
    in_float64: bool = False  # its arithmetic is, and not float32

    def __repr__(self) -> str:
        return f"TensorPlan({brief(self.name)}, {self.dtype.name}, {list(self.shape)})"

    @property
    def written(self) -> tuple[TensorPlan, ...]:
        """What it fills in the output: itself, or codes and scales."""
        if self.encoding is None:
            return (self,)
        parts = (self.encoding.codes, self.encoding.scales)
        return tuple(TensorPlan(part.name, part.shape, part.dtype, self.root) for part in parts)

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        if self.encoding is None:
            return self.dtype.bytes_for(self.count)
        return sum(part.nbytes for part in self.written)

    @cached_property  # a walk's tree has a hundred nodes, and four readers
    def sources(self) -> tuple[Stored, ...]:
        """The stored tensors that its tree reads, each once, in order of first use."""
        return tuple(leaves([self.root]))

    @cached_property
    def merges(self) -> tuple[Merge, ...]:
        """The merges of its tree, each once, inputs before what uses them."""
        if isinstance(self.root, Merge) and self.root.is_flat:
            return (self.root,)
        return tuple(node for node in walk(self.root) if isinstance(node, Merge))

    @cached_property
    def bytes_in(self) -> int:
        """Bytes of ``sources``."""
        return sum(stored.nbytes for stored in self.sources)

    @cached_property
    def bytes_moved(self) -> int:
        """Bytes read and written."""
        return self.bytes_in + self.nbytes


# ---------------------------------------------------------------- models


@dataclass(frozen=True, eq=False)
class View:
    """A model, or the result of an earlier document, as the next document sees it."""

    label: str
    config: dict[str, Any]
    tensors: dict[str, TensorPlan]
    donor: Model
    vocabulary: Vocabulary | None = None  # of a document that has another than its donor

    @cached_property
    def layers(self) -> dict[str, dict[int, dict[str, TensorPlan]]]:
        """Tensors by stack of layers, layer index, and the rest of the name."""
        found: dict[str, dict[int, dict[str, TensorPlan]]] = {}
        layer: dict[str, TensorPlan] = {}
        prefix = "\n"  # that no name begins with
        for name, tensor in self.tensors.items():
            # Nearly all names have the layer of the one before: a tenth of the time of `layer_of`.
            if name.startswith(prefix) and name != prefix:
                layer[name[len(prefix) :]] = tensor
                continue
            place = layer_of(name)
            if place is not None:
                layer = found.setdefault(place.stack, {}).setdefault(place.number, {})
                layer[place.rest] = tensor
                prefix = name[: -len(place.rest)]
        return found

    @cached_property
    def stack(self) -> Stack | None:
        """How its language model's tensors are named, or None where that is not known."""
        return find_stack(self.layers)

    @cached_property
    def counted(self) -> int | None:
        """How many layers its config counts, or None where that does not say."""
        decoder = self.stack is not None and ".decoder." in self.stack.layers
        return layer_count(self.config, decoder=decoder)

    @cached_property
    def layer_total(self) -> int:
        """Layers of the language model: as its config counts them, else as stored."""
        if self.stack is None:
            return 0
        return self.counted or self.stored(self.stack.layers)

    def stored(self, stack: str) -> int:
        """Layers of one stack in the files."""
        return max(self.layers.get(stack, {-1: {}})) + 1

    def count(self, stack: str) -> int:
        """Layers of one stack."""
        is_language = self.stack is not None and self.stack.layers == stack
        return self.layer_total if is_language else self.stored(stack)

    @cached_property
    def extra(self) -> frozenset[str]:
        """The tensors of the layers behind those that the config counts."""
        if self.stack is None:
            return frozenset()
        stack = self.stack.layers
        return frozenset(
            f"{stack}.{number}.{rest}"
            for number, layer in self.layers[stack].items()
            if number >= self.layer_total
            for rest in layer
        )

    @cached_property
    def low_precision(self) -> LowPrecision | None:
        """How its weights are codes with scales; None where they are none, or of no known format.
        ModelError where config and tensors disagree.
        """
        return find_low_precision(self.config, self.tensors, self.label)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def head(self) -> str | None:
        """The name of its stored language-model head, or None."""
        return find_head(self._shapes)

    @cached_property
    def embedding(self) -> str | None:
        """The name of its input embeddings, or None."""
        return find_embedding(self._shapes)


def check_quantised(view: View, method: Method, where: str, *, scaled: bool) -> str | None:
    """Raises UnsupportedError where a model is quantised, or says that it is, unless it is only
    copied; then a note where what it says is not so. ``scaled``: the copy is to be scaled.
    """
    found = find_quantised(view.config, view.tensors, view.donor.folder)
    if found is None:
        return None
    copied = method.name == "passthrough" and not scaled
    said = f"{found.kind} in {found.place}" if found.place else f"tensor '{found.packed}'"
    if found.packed is not None:
        if copied:
            return None
        raise UnsupportedError(
            f"{where}: model '{view.label}' is quantised ({said}), and fastmerge does not "
            "dequantise; merge the original weights"
        )
    remedy = f"remove '{found.key}' from its config.json" if found.key else f"delete {found.place}"
    leftover = (
        f"model '{view.label}' is quantised ({said}) by what it says, but no tensor is packed: "
        f"a leftover; {remedy}"
    )
    if not copied:
        raise UnsupportedError(f"{where}: {leftover}")
    return leftover


# ---------------------------------------------------------------- one slice


@dataclass(frozen=True, eq=False)
class Input:
    """A model, or an earlier document, as one of those that a part is made of; ``where`` it is
    listed, ``settings`` what it is given there.
    """

    view: View
    start: int  # first layer (slices only)
    where: str
    settings: Mapping[str, Setting]


@dataclass(frozen=True, eq=False)
class Part:
    """A run of output layers, or the whole model: who takes part, and how."""

    method: Method
    inputs: tuple[Input, ...]  # in recipe order
    base: int | None  # index into inputs, where the method keeps the base apart
    operands: tuple[int, ...]  # indices into inputs
    shared: ParameterValues
    each: tuple[ParameterValues, ...]  # parallel to operands
    layers: int | None
    where: str
    makes: tuple[str, ...] = ()  # of which modules it makes the tensors; (): of all

    @cached_property  # one for all tensors, of which there may be 90 000
    def labels(self) -> tuple[str, ...]:
        """The operands' names for people: a slice may have one model twice, of other layers."""
        items = [self.inputs[i] for i in self.operands]
        names = [item.view.label for item in items]
        return tuple(
            f"{name} from layer {item.start}" if names.count(name) > 1 else name
            for name, item in zip(names, items, strict=True)
        )

    @property
    def varies(self) -> bool:
        """Whether any parameter depends on the tensor."""
        return any(values.varies for values in (self.shared, *self.each))

    @cached_property
    def fixed(self) -> tuple[Values, tuple[Values, ...]] | None:
        """The parameters of every tensor, as `at` has them; None where they depend on it."""
        if self.varies:
            return None
        return self.shared.at("", 0.0), tuple(values.at("", 0.0) for values in self.each)

    def at(
        self, name: str, sources: Sequence[TensorPlan], t: float
    ) -> tuple[Values, tuple[Values, ...]]:
        """The parameters of the tensor ``name`` at gradient position ``t``, and each operand's;
        ``sources``: parallel to ``inputs``.
        """
        operands = zip(self.each, self.operands, strict=True)
        each = tuple(values.at(sources[i].name, t) for values, i in operands)
        return self.shared.at(name, t), each

    @property
    def lead(self) -> Input:
        """Whose tensors name the output's: the base, else the first."""
        return self.inputs[self.base if self.base is not None else self.operands[0]]


def of_language(parts: Sequence[Part]) -> Sequence[Part]:
    """Those that make the language model; all, where no module is made apart."""
    return [part for part in parts if not part.makes or "text" in part.makes] or parts


def views_of(parts: Iterable[Part], *first: View) -> dict[int, View]:
    """The views that take part, by their ids, ``first`` before the others; each once."""
    inputs = (item.view for part in parts for item in part.inputs)
    return {id(view): view for view in (*first, *inputs)}


def with_views(parts: Sequence[Part], changed: Mapping[int, View]) -> list[Part]:
    """The parts with other views in place of those whose ids ``changed`` has."""
    return [
        replace(
            part,
            inputs=tuple(
                replace(item, view=changed.get(id(item.view), item.view)) for item in part.inputs
            ),
        )
        for part in parts
    ]
