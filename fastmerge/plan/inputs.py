"""What a plan is made from: tensors, models or documents as the next one sees them, and parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fastmerge.dtypes import DType
from fastmerge.errors import UnsupportedError
from fastmerge.methods import Method
from fastmerge.models.architecture import STACKS, Stack, find_stack, is_tied, layer_of
from fastmerge.models.model import Model
from fastmerge.plan.values import ParameterValues
from fastmerge.recipe.settings import Setting
from fastmerge.tree.nodes import Node, leaves


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor. A bare Source as root, of the same dtype, is copied byte for byte."""

    name: str
    shape: tuple[int, ...]
    dtype: DType  # as written
    root: Node

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self.dtype.bytes_for(self.count)

    @property
    def bytes_in(self) -> int:
        """Bytes of the stored tensors that its tree reads, each once."""
        return sum(stored.nbytes for stored in leaves([self.root]))


# ---------------------------------------------------------------- models


@dataclass(frozen=True, eq=False)
class View:
    """A model, or the result of an earlier document, as the next document sees it."""

    label: str
    config: dict[str, Any]
    tensors: dict[str, TensorPlan]
    donor: Model

    @cached_property
    def layers(self) -> dict[str, dict[int, dict[str, TensorPlan]]]:
        """Tensors by stack of layers, layer index, and the rest of the name."""
        found: dict[str, dict[int, dict[str, TensorPlan]]] = {}
        for name, tensor in self.tensors.items():
            place = layer_of(name)
            if place is not None:
                found.setdefault(place.stack, {}).setdefault(place.number, {})[place.rest] = tensor
        return found

    @cached_property
    def stack(self) -> Stack | None:
        """How its language model's tensors are named, or None where that is not known."""
        return find_stack(self.layers)

    def count(self, stack: str) -> int:
        """Layers of one stack."""
        return max(self.layers.get(stack, {-1: {}})) + 1


def has_own_head(view: View) -> bool:
    """Whether its head is another tensor than its embeddings."""
    heads = (stack.head in view.tensors for stack in STACKS)
    return any(heads) and not is_tied(view.config)


def with_head(view: View, tied: bool) -> View:
    """The view as an output needs it whose config does (``tied``) or does not tie the head to the
    embeddings.
    """
    tensors = view.tensors
    for stack in STACKS:
        head, embedding = stack.head, stack.embedding
        if embedding not in tensors:
            continue
        if tied and head in tensors:
            return replace(view, tensors={k: v for k, v in tensors.items() if k != head})
        if not tied and head not in tensors and is_tied(view.config):
            return replace(view, tensors={**tensors, head: replace(tensors[embedding], name=head)})
    return view


def check_quantised(view: View, method: Method, where: str) -> None:
    quantised = view.config.get("quantization_config")
    if quantised and method.name != "passthrough":
        kind = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
        raise UnsupportedError(
            f"{where}: model '{view.label}' is quantised ({kind or 'quantization_config'} in "
            "config.json), and fastmerge does not dequantise; merge the original weights"
        )


# ---------------------------------------------------------------- one slice


@dataclass(frozen=True, eq=False)
class Input:
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

    @property
    def varies(self) -> bool:
        """Whether any parameter depends on the tensor."""
        return any(values.varies for values in (self.shared, *self.each))

    @property
    def lead(self) -> Input:
        """Whose tensors name the output's: the base, else the first."""
        return self.inputs[self.base if self.base is not None else self.operands[0]]
