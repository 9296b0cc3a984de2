"""The models of a search and their geometry: coefficients and plans of expressions.

Where every blend is a combination, the coefficients over the models follow from the Gram matrices
that one pass over the weights found (see fastmerge.tree), for all tensors at once; so any state is
one linear merge, however many steps led to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastmerge.methods import Combination, Consensus
from fastmerge.methods.types import Float64
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.plan import Plan
from fastmerge.planning.values import ParameterValues
from fastmerge.search.expressions import Blend, Expr, Model, as_json, order
from fastmerge.search.geometry import Geometry, angle, small_angle
from fastmerge.tree.collapse import Collapsed, coefficients, weighted_sum
from fastmerge.tree.nodes import Leaf, Merge, Node, Rows, Stored, walk
from fastmerge.tree.rewrite import fold
from fastmerge.tree.unread import without_unread


class Space:
    """The models of a run and their geometry: makes plans and coefficients of expressions.

    ``template`` is the plan of any linear merge of all models: it has checked that they can be
    merged. ``grams`` are stacked over ``names``: float64 (tensors, n, n), of [x_0, x_1 - x_0 ...];
    None before they are known: then there are plans, but no coefficients.
    """

    def __init__(
        self, template: Plan, grams: Float64 | None, positions: Sequence[float], origin: int = 0
    ) -> None:
        self.template = template
        self._items = merged(template)
        # Not the plan's models, which are more (a base and its adapter) or fewer (one base of two).
        self.count = len(_sources(self._items[0])) if self._items else len(template.models)
        self.is_measured = grams is not None
        if grams is None:
            grams = np.zeros((len(self._items), self.count, self.count))
        # A NaN in one model must not reach states that it has no part in (0 * NaN is NaN).
        self._broken = ~np.isfinite(np.einsum("tii->i", grams))
        self.grams = np.nan_to_num(grams, nan=0.0, posinf=0.0, neginf=0.0)
        self.names = [item.name for item in self._items]
        self._positions = positions
        self._origin = origin
        self._known: dict[Expr, Float64 | None] = {}
        self._values: dict[int, tuple[Blend, _Values]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what goes by the ids of this process's objects."""
        return {**vars(self), "_known": {}, "_values": {}}

    def sources(self, name: str) -> tuple[Leaf, ...]:
        """The models' tensors that one merged tensor is made from."""
        return _sources(self._items[self.names.index(name)])

    def input_fingerprint(self, number: int) -> str:
        """The fingerprint of a model, or of an adapted one (hex): of its base and its adapters."""
        every = [_sources(item)[number] for item in self._items]
        # Rows of a merged vocabulary may be another model's.
        leaves = [leaf for leaf in every if not isinstance(leaf, Rows)] or every
        own = dict.fromkeys(stored.model for leaf in leaves for stored in leaf.stored)
        found = [self.template.models[model].fingerprint for model in own]
        return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()

    def coefficients(self, root: Expr) -> Float64 | None:
        """What ``root`` takes of each model, float64 (tensors, n); None if it does not collapse."""
        if root not in self._known:
            self._known[root] = self._coefficients(root)
        return self._known[root]

    def _coefficients(self, root: Expr) -> Float64 | None:
        tensors = len(self.names)
        if isinstance(root, Model):
            return np.tile(np.eye(self.count)[root.index], (tensors, 1))
        nodes = order(root)
        if not self.is_measured or not all(isinstance(node.method, Combination) for node in nodes):
            return None
        values = [self._resolved(node) for node in nodes]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index in range(tensors):
            key = tuple(value.key(index) for value in values)
            groups.setdefault(key, []).append(index)
        result = np.empty((tensors, self.count))
        for members in groups.values():
            parts = tuple(Stored(i, "") for i in range(self.count))
            tree = self._tree(root, members[0], parts)
            assert isinstance(tree, Merge)
            if any(node.axis is not None for node in walk(tree) if isinstance(node, Merge)):
                return None
            collapsed = Collapsed(tree, parts, None, True, 0)
            result[members] = coefficients(collapsed, self.grams[members])
        return result

    def check(self, node: Blend) -> None:
        """Raises FastmergeError where a parameter of ``node`` has no value for some tensor, or the
        method does not take its values together.
        """
        values = self._resolved(node)
        for tensor in range(len(self.names) if values.varies else min(1, len(self.names))):
            shared, each = values.at(tensor)
            if isinstance(node.method, Consensus):
                node.method.spec(shared, each)

    def _resolved(self, node: Blend) -> _Values:
        if id(node) not in self._values:
            self._values[id(node)] = node, _Values(node, self.names, self._positions)
        return self._values[id(node)][1]

    def _tree(self, root: Expr, tensor: int, sources: Sequence[Node]) -> Node:
        """The algebra tree of one tensor; shared states are shared nodes."""

        def of(node: Expr, inputs: Sequence[Node]) -> Node:
            if isinstance(node, Model):
                return sources[node.index]
            base, operands = node.parted(inputs)
            shared, each = self._resolved(node).at(tensor)
            return Merge(node.method, operands, base, shared, each, node.seed)

        return fold(root, of)

    def plan(self, root: Expr, text: str = "") -> Plan:
        """The plan that materialises ``root``: one linear merge where it collapses.

        ``text`` is recorded in the output as what it was made from. Without Gram matrices the
        engine finds them on its way: every tree then names all models, so that what it finds for a
        tensor is just what ``grams`` holds.
        """
        factors = self.coefficients(root)
        varies = any(self._resolved(node).varies for node in order(root))
        may_leave_out = True
        roots: dict[str, Node] = {}
        for index, item in enumerate(self._items):
            sources = _sources(item)
            if factors is None:
                tree = self._tree(root, index, sources)
                if may_leave_out:
                    reduced = without_unread(tree)
                    # The first tensor tells for all, where their values are the same.
                    may_leave_out, tree = reduced is not tree or varies, reduced
                if not self.is_measured:
                    weights = [0.0] * self.count + [1.0]
                    tree = weighted_sum((*sources, tree), weights)
                roots[item.name] = tree
                continue
            used = [i for i in range(self.count) if factors[index, i] != 0]
            if len(used) == 1 and factors[index, used[0]] == 1:
                roots[item.name] = sources[used[0]]
                continue
            chosen = used or [0]
            roots[item.name] = weighted_sum([sources[i] for i in chosen], factors[index, chosen])
        tensors = tuple(
            replace(item, root=roots.get(item.name, item.root)) for item in self.template.tensors
        )
        template = self.template
        return replace(template, tensors=tensors, recipe_text=text, template=template)

    def fingerprint(self, root: Expr) -> str:
        """sha256 (hex) of all that decides the state's weights: equal states have equal ones."""
        factors = self.coefficients(root)
        digest = hashlib.sha256(b"fastmerge state 1")
        dtypes = sorted({item.dtype.code for item in self._items})
        inputs = [model.fingerprint for model in self.template.models]
        digest.update(json.dumps([inputs, dtypes]).encode())
        if factors is None:
            digest.update(json.dumps(as_json(root)).encode())
        else:
            # combine rounds its coefficients to fp32, so these decide the weights.
            digest.update(np.ascontiguousarray(factors, dtype="<f4").tobytes())
        return digest.hexdigest()

    def geometry(self, factors: Float64) -> Geometry:
        """Where the combination with these coefficients (tensors, n) lies."""
        delta = factors.copy()
        delta[:, 0] = factors.sum(axis=1) - 1.0  # over [x_0, x_1 - x_0, ...], less the baseline
        if self._broken[0] or (factors[:, self._broken] != 0).any():
            delta[:] = np.nan
        # All tensors alike: the state is that merge, whatever rounding would make of it.
        exact = factors[0] if (factors == factors[:1]).all() else None
        return self._geometry(delta, self.grams, exact)

    def geometry_of(self, grams: Float64) -> Geometry:
        """Where a materialised state lies: ``grams`` (tensors, n + 1, n + 1) end with its delta."""
        delta = np.zeros((len(self.names), self.count + 1))
        delta[:, -1] = 1.0 if np.isfinite(grams[:, -1, -1]).all() else np.nan
        return self._geometry(delta, np.nan_to_num(grams, nan=0.0, posinf=0.0, neginf=0.0), None)

    def _nearest(self, delta: Float64, grams: Float64) -> Float64:
        """The weights (n,) of the whole-model merge nearest to x_0 + ``delta``."""
        known = np.nan_to_num(delta)
        total = grams.sum(axis=0)[: self.count, : self.count]
        target = np.einsum("tij,tj->i", grams, known)[: self.count]
        # A model with a NaN anywhere takes no part: 1e-4 of it would be NaN.
        broken = np.flatnonzero(self._broken)
        total[broken], total[:, broken], target[broken] = 0.0, 0.0, 0.0
        # x_0 is a thousand deltas long: unscaled, their part would be lost below lstsq's cut-off.
        scale = np.sqrt(np.diagonal(total))
        scale = np.where(scale > 0, scale, 1.0)
        found = np.linalg.lstsq(total / np.outer(scale, scale), target / scale, rcond=None)[0]
        weights = found / scale
        weights[0] = 1.0 + weights[0] - weights[1:].sum()
        return np.asarray(weights, dtype=np.float64)

    def _geometry(self, delta: Float64, grams: Float64, exact: Float64 | None) -> Geometry:
        one_shot = self._nearest(delta, grams) if exact is None else exact

        def inner(a: Float64, b: Float64) -> float:
            return float(np.einsum("ti,tij,tj->", a, grams, b))

        unit = np.eye(delta.shape[1])

        def model(index: int) -> Float64:
            return np.broadcast_to(unit[index] if index else 0 * unit[0], delta.shape)

        baseline = np.broadcast_to(unit[0], delta.shape)
        origin = model(self._origin)
        own = delta - origin
        at_origin = inner(own, own) <= 1e-24 * inner(baseline, baseline)
        angles = {}
        for index in range(self.count):
            if index == self._origin:
                continue  # it has no delta
            other = model(index) - origin
            if self._broken[index]:
                angles[index] = float("nan")
                continue
            angles[index] = (
                float(np.sqrt(max(inner(other, other), 0.0)))
                if at_origin
                else angle(inner(own, other), inner(own, own), inner(other, other))
            )
        norm = np.sqrt(max(inner(delta, delta), 0.0))
        state = delta + baseline
        line = np.zeros(delta.shape[1])
        line[: self.count] = one_shot
        line[0] = one_shot.sum() - 1.0
        rest = inner(delta - line, delta - line)
        size = inner(baseline, baseline)
        return Geometry(
            norm=float(norm),
            relative_norm=float(norm / np.sqrt(size)) if size > 0 else float("nan"),
            angle=small_angle(
                inner(baseline, delta), inner(delta, delta), size, inner(state, state)
            ),
            angles=angles,
            one_shot=tuple(float(weight) for weight in one_shot),
            residual=0.0 if norm == 0 else float(np.sqrt(max(rest, 0.0)) / norm),
        )


class _Values:
    """One blend's parameters for every tensor."""

    def __init__(self, node: Blend, names: Sequence[str], positions: Sequence[float]) -> None:
        own = [p for p in node.method.parameters if p.per_model]
        shared = [p for p in node.method.parameters if not p.per_model]
        missing = f"{node.method.name} needs the parameter '{{name}}'"
        self._shared = ParameterValues(shared, [dict(node.shared)], missing)
        each = node.each or tuple({} for _ in node.operands)
        self._each = [ParameterValues(own, [values], missing) for values in each]
        self._names, self._positions = names, positions
        self.varies = any(values.varies for values in (self._shared, *self._each))

    def at(self, tensor: int) -> tuple[Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
        """Shared values and each operand's for a tensor's number."""
        name, t = self._names[tensor], self._positions[tensor]
        return self._shared.at(name, t), tuple(values.at(name, t) for values in self._each)

    def key(self, tensor: int) -> tuple[int, ...] | None:
        """Equal for tensors with equal values (equal values share one mapping)."""
        if not self.varies:
            return None
        shared, each = self.at(tensor)
        return (id(shared), *(id(values) for values in each))


def merged(template: Plan) -> list[TensorPlan]:
    """The tensors that are computed; the others are only copied."""
    return [item for item in template.tensors if isinstance(item.root, Merge)]


def _sources(item: TensorPlan) -> tuple[Leaf, ...]:
    assert isinstance(item.root, Merge)
    sources = tuple(node for node in item.root.operands if isinstance(node, Leaf))
    assert len(sources) == len(item.root.operands)
    return sources
