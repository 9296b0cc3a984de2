"""Makes the trees of one document's output tensors; what is refused, and in which words, is at the
end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastmerge.dtypes import F32, F64, DType
from fastmerge.errors import FastmergeError, ModelError, UnsupportedError, and_others
from fastmerge.methods import Combination, Consensus, Elementwise
from fastmerge.models.architecture import EXTRA_PREFIXES, Stack, is_vocabulary, layer_of
from fastmerge.models.model import Model, same_bytes
from fastmerge.models.module_names import part_of
from fastmerge.models.names import prefix_hint, renamed
from fastmerge.planning.inputs import Input, Part, TensorPlan, View
from fastmerge.tree.collapse import apply_rule
from fastmerge.tree.nodes import Merge, Node, Stored
from fastmerge.tree.rewrite import narrowed

# ---------------------------------------------------------------- tensors


class Builder:
    """Makes the output tensors of one document."""

    def __init__(
        self,
        dtype: DType | None,
        seed: int | None,
        models: Sequence[Model],
        *,
        arithmetic: DType | None = None,
    ) -> None:
        """``dtype``: of the output. ``arithmetic``: float64's, or float32 for any other. None: the
        inputs' promoted type.
        """
        self._dtype, self._arithmetic = dtype, arithmetic
        self.narrowed: dict[str, None] = {}  # models whose float64 was taken as float32
        self._seed = seed
        self._models = models
        self._tried: set[tuple[int, ...]] = set()  # see _try_rule

    def whole(self, part: Part) -> dict[str, TensorPlan]:
        """Every tensor of the lead, merged with its namesakes."""
        lead = part.lead.view
        others = [item for item in part.inputs if item.view is not lead]
        for item in others:
            _check_names(lead.tensors, item.view.tensors, part.lead, item)
        result = {}
        every, varies = [item.view.tensors for item in part.inputs], part.varies
        for name, tensor in lead.tensors.items():
            if name in lead.extra:  # beyond the config's layers: see planning/layers.py
                in_float64 = tensor.dtype == F64 and not isinstance(tensor.root, Stored)
                result[name] = replace(tensor, in_float64=in_float64) if in_float64 else tensor
                continue
            sources = [tensors[name] for tensors in every]
            t = position(lead, name) if varies else 0.0
            result[name] = self._tensor(part, name, sources, t)
        return result

    def stacked(self, parts: Sequence[Part]) -> dict[str, TensorPlan]:
        """The layers of every slice, renumbered; what precedes and follows them from the first and
        last slice.
        """
        first, last = parts[0], parts[-1]
        stack = first.lead.view.stack
        assert stack is not None  # Planner._source refused the recipe otherwise
        for item in (item for part in parts for item in part.inputs):
            if item.view.stack is None or item.view.stack.layers != stack.layers:
                raise _other_stack(first.lead, item)
        result = self._around(first, stack, stack.before)
        index = 0
        for part in parts:
            length = part.layers or 0
            for offset in range(length):
                # One layer alone stands at the gradient's end, as in mergekit.
                t = offset / (length - 1) if length > 1 else 1.0
                result |= self._layer(part, stack, offset, index, t)
                index += 1
        return result | self._around(last, stack, stack.after)

    def _layer(
        self, part: Part, stack: Stack, offset: int, index: int, t: float
    ) -> dict[str, TensorPlan]:
        def layer(item: Input) -> dict[str, TensorPlan]:
            return item.view.layers.get(stack.layers, {}).get(item.start + offset, {})

        lead = layer(part.lead)
        layers = [layer(item) for item in part.inputs]
        for item, other in zip(part.inputs, layers, strict=True):
            prefix = f"{stack.layers}.{item.start + offset}."
            _check_names(lead, other, part.lead, item, prefix)
        result = {}
        for rest in lead:
            name = f"{stack.layers}.{index}.{rest}"
            result[name] = self._tensor(part, name, [other[rest] for other in layers], t)
        return result

    def _around(self, part: Part, stack: Stack, prefixes: tuple[str, ...]) -> dict[str, TensorPlan]:
        around = [self._outside(item, stack, prefixes) for item in part.inputs]
        lead = self._outside(part.lead, stack, prefixes)
        for item, other in zip(part.inputs, around, strict=True):
            _check_names(lead, other, part.lead, item)
        return {
            name: self._tensor(part, name, [other[name] for other in around], 0.0) for name in lead
        }

    def _outside(
        self, item: Input, stack: Stack, prefixes: tuple[str, ...]
    ) -> dict[str, TensorPlan]:
        """The tensors outside the layers whose names begin with ``prefixes``."""
        found = {}
        for name, tensor in item.view.tensors.items():
            if name.startswith(prefixes):
                found[name] = tensor
            elif not name.startswith((f"{stack.layers}.", *stack.before, *stack.after)):
                part, own = part_of(name), part_of(f"{stack.layers}.0.weight")
                remedy = "use 'models:'"
                if part != own:
                    remedy = f"it is of the {part} part: give the slices under 'modules: {own}:'"
                raise UnsupportedError(
                    f"{item.where}: tensor '{name}' of model '{item.view.label}' is in no layer "
                    f"and not known to stand before or after them, so 'slices:' cannot place it; "
                    f"{remedy}"
                )
        return found

    def _tensor(self, part: Part, name: str, sources: Sequence[TensorPlan], t: float) -> TensorPlan:
        """One output tensor from its inputs (parallel to ``part.inputs``) at gradient position
        ``t``.
        """
        first, mergeable, double = sources[0], True, False
        for item, tensor in zip(part.inputs, sources, strict=True):
            if tensor.shape != first.shape:
                raise _shapes(name, part.inputs[0], first, item, tensor)
            mergeable = mergeable and tensor.dtype.mergeable
            double = double or tensor.dtype == F64 or tensor.in_float64
        method, shape = part.method, first.shape
        shared, each = part.fixed or part.at(name, sources, t)
        is_copy = method.name == "passthrough" and each[0]["scale"] is None
        if not mergeable:
            self._check_copied(part, name, sources, is_copy)
            lead = sources[part.base if part.base is not None else part.operands[0]]
            return TensorPlan(name, shape, lead.dtype, lead.root)
        dtype = self._dtype or _promoted(sources)
        roots, in_float64 = [tensor.root for tensor in sources], False
        if is_copy and dtype is first.dtype and isinstance(first.root, Stored):
            return TensorPlan(name, shape, dtype, first.root)
        if double or self._arithmetic == F64:
            in_float64 = (self._arithmetic or _promoted(sources)) == F64
            in_float64 = in_float64 or any(tensor.in_float64 for tensor in sources)
            roots = roots if in_float64 else self._as_float32(part, sources)
        if is_copy and (dtype == first.dtype or isinstance(first.root, Merge)):
            return TensorPlan(name, shape, dtype, roots[0], in_float64=in_float64)
        root = Merge(
            method,
            tuple([roots[i] for i in part.operands]),
            None if part.base is None else roots[part.base],
            shared,
            each,
            self._seed,
            name,
            labels=part.labels,
        )
        self._try_rule(root, part)
        return TensorPlan(name, shape, dtype, root, in_float64=in_float64)

    def _as_float32(self, part: Part, sources: Sequence[TensorPlan]) -> list[Node]:
        """Their trees, which round float64 where they read it."""
        for item, tensor in zip(part.inputs, sources, strict=True):
            if tensor.dtype == F64:
                self.narrowed[item.view.label] = None
        return [narrowed(tensor.root) for tensor in sources]

    def _try_rule(self, node: Merge, part: Part) -> None:
        """Runs a method's rule or spec once for each set of values, on orthonormal vectors.

        So weights that sum to zero are refused now and not in the middle of the merge.
        """
        key = (id(node.method), id(node.values), *map(id, node.operand_values))
        if key in self._tried:
            return
        self._tried.add(key)
        try:
            if isinstance(node.method, Combination):
                apply_rule(node, np.eye(len(node.inputs)))
            if isinstance(node.method, Consensus):
                node.method.spec(node.values, node.operand_values)
            if isinstance(node.method, Elementwise):
                node.method.program(node.values, node.operand_values, node.base is not None)
        except FastmergeError as error:
            whose = f" (tensor '{node.name}')" if part.varies else ""
            raise type(error)(f"{part.where}: {error}{whose}") from None

    def _check_copied(
        self, part: Part, name: str, sources: Sequence[TensorPlan], is_copy: bool
    ) -> None:
        """A tensor that cannot be computed with is only taken over: alone, or as integers equal in
        all models.
        """
        if is_copy:
            return
        for item, tensor in zip(part.inputs, sources, strict=True):
            kind = tensor.dtype
            if not kind.mergeable and not kind.name.startswith(("int", "uint", "bool")):
                raise UnsupportedError(
                    f"{item.where}: tensor '{name}' of model '{item.view.label}' is {kind.name}, "
                    "which fastmerge does not merge; convert it to bfloat16, float16 or float32 "
                    "first"
                )
            if tensor is sources[0]:
                continue
            if kind != sources[0].dtype:
                raise ModelError(
                    f"{item.where}: tensor '{name}' is {sources[0].dtype.name} in model "
                    f"'{part.inputs[0].view.label}' but {kind.name} in '{item.view.label}'; "
                    "integers are only copied when equal: convert one"
                )
            if not self._is_same(tensor, sources[0]):
                raise ModelError(
                    f"{item.where}: tensor '{name}' ({kind.name}) differs between models "
                    f"'{part.inputs[0].view.label}' and '{item.view.label}'; integers are only "
                    "copied when equal: give both models one of the two"
                )

    def _is_same(self, tensor: TensorPlan, first: TensorPlan) -> bool:
        """Reads both, if nothing differs before the end: integers are few, and a merge of others
        must not begin.
        """
        a, b = tensor.root, first.root
        assert isinstance(a, Stored) and isinstance(b, Stored)  # they are never computed
        return same_bytes(self._models[a.model], a.name, self._models[b.model], b.name)


def position(view: View, name: str) -> float:
    """Where a tensor's layer lies in its stack: 0 to 1; 0 outside layers, 1 in a stack of one."""
    place = layer_of(name)
    if place is None:
        return 0.0
    count = view.count(place.stack)
    return place.number / (count - 1) if count > 1 else 1.0


def _promoted(sources: Sequence[TensorPlan]) -> DType:
    """The smallest type that holds all of the inputs' (bfloat16 with float16 gives float32)."""
    kinds = [tensor.dtype for tensor in sources]
    if kinds.count(kinds[0]) == len(kinds):
        return kinds[0]
    return F64 if F64 in kinds else F32


# ---------------------------------------------------------------- refusals


def _check_names(
    lead: Mapping[str, Any],
    other: Mapping[str, Any],
    lead_item: Input,
    item: Input,
    prefix: str = "",
) -> None:
    if lead.keys() == other.keys():
        return
    lost = [name for name in lead if name not in other]
    prefixes = None if prefix else renamed(lead, other)
    if prefixes is not None:
        a, b = prefixes
        hint = prefix_hint(a, lead_item.view.label, b, item.view.label)
        raise ModelError(
            f"{item.where}: model '{item.view.label}' lacks tensor '{lost[0]}': {hint}"
        )
    if lost:
        raise _missing(prefix + lost[0], item, lead_item, len(lost))
    extra = [name for name in other if name not in lead]
    rest = and_others(len(extra))
    raise ModelError(
        f"{item.where}: model '{item.view.label}' has tensor '{prefix}{extra[0]}'{rest}, which "
        f"'{lead_item.view.label}' lacks: {_other_names(lead_item, item)}"
    )


def _other_stack(lead: Input, item: Input) -> FastmergeError:
    """The refusal of layers called otherwise, with the prefix that all names differ by."""
    a, b = (view.stack.layers if view.stack else "" for view in (lead.view, item.view))
    prefixes = renamed(lead.view.tensors, item.view.tensors)
    hint = ""
    if prefixes is not None:
        x, y = prefixes
        hint = f": {prefix_hint(x, lead.view.label, y, item.view.label)}"
    return ModelError(
        f"{item.where}: '{item.view.label}' names its layers ({b}.N) otherwise than "
        f"'{lead.view.label}' ({a}.N){hint}"
    )


def _missing(name: str, item: Input, lead: Input, count: int) -> FastmergeError:
    return ModelError(
        f"{item.where}: model '{item.view.label}' lacks tensor '{name}'{and_others(count)}, which "
        f"'{lead.view.label}' has: {_other_names(lead, item)}"
    )


def _other_names(lead: Input, item: Input) -> str:
    """Why the two have other tensors."""
    if set(lead.view.tensors) ^ set(item.view.tensors) <= _for_prediction(lead, item):
        return (
            "only one of them has tensors for multi-token prediction; remove these and the key of "
            "its config that counts them (num_nextn_predict_layers)"
        )
    counts = []
    for view in (item.view, lead.view):
        stack = view.stack
        if stack is None:
            return "they are not of one architecture"
        counts.append(view.stored(stack.layers))
    layers = "" if counts[0] == counts[1] else f" ({counts[0]} and {counts[1]} layers)"
    return f"they are not of one architecture{layers}"


def _for_prediction(lead: Input, item: Input) -> set[str]:
    """The tensors of both that are for multi-token prediction."""
    return {
        name
        for view in (lead.view, item.view)
        for name in view.tensors
        if name in view.extra or name.startswith(EXTRA_PREFIXES)
    }


def _shapes(name: str, a: Input, x: TensorPlan, b: Input, y: TensorPlan) -> FastmergeError:
    if is_vocabulary(name) and x.shape[1:] == y.shape[1:]:
        return UnsupportedError(
            f"{b.where}: vocabulary mismatch in '{name}': {x.shape[0]} rows in '{a.view.label}', "
            f"{y.shape[0]} in '{b.view.label}'; write `tokenizer_source: union` (the tokens of "
            "all) or `tokenizer_source: base` to bring them into one order"
        )
    return ModelError(
        f"{b.where}: tensor '{name}' is {list(x.shape)} in model '{a.view.label}' but "
        f"{list(y.shape)} in '{b.view.label}'; only models of one shape can be merged"
    )
