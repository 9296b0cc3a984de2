"""States as expressions over whole models: a `Model`, or a `Blend` of other states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fastmerge.methods import METHODS, Method
from fastmerge.recipe.settings import Setting, constant
from fastmerge.tree.collapse import AS_THEY_ARE
from fastmerge.tree.nodes import Based, walk
from fastmerge.tree.rewrite import fold

Given = Mapping[str, Setting]


@dataclass(frozen=True)
class Model:
    """One of the run's models, by number: 0 the baseline, then the pool, then base_model."""

    inputs: ClassVar[tuple[Expr, ...]] = ()
    index: int


@dataclass(frozen=True, eq=False)
class Blend(Based["Expr"]):
    """A merge of whole models; parameters may still differ by tensor (gradients, filters)."""

    method: Method
    operands: tuple[Expr, ...]
    base: Expr | None = None
    shared: Given = field(default_factory=dict)
    each: tuple[Given, ...] = ()  # parallel to operands
    seed: int | None = None


Expr = Model | Blend


def blend(
    method: str,
    operands: Sequence[Expr],
    weights: Sequence[Setting | float] | None = None,
    *,
    base: Expr | None = None,
    parameters: Given | None = None,
    seed: int | None = None,
) -> Blend:
    """A merge by the table's row called ``method``; ``weights`` are parallel to ``operands``."""
    row = METHODS[method]
    given = dict(parameters or {})
    own = {p.name for p in row.parameters if p.per_model}
    common = {name: setting for name, setting in given.items() if name in own}
    shared = {name: setting for name, setting in given.items() if name not in own}
    each = [dict(common) for _ in operands]
    for values, weight in zip(each, weights or [], strict=False):
        values["weight"] = weight if isinstance(weight, Setting) else constant(float(weight))
    return Blend(row, tuple(operands), base, shared, tuple(each), seed if row.random else None)


def average(operands: Sequence[Expr], weights: Sequence[Setting | float]) -> Blend:
    """The weighted sum of ``operands`` as it is: the weights are not divided by their sum."""
    plain = {name: constant(value) for name, value in AS_THEY_ARE.items()}
    return blend("linear", operands, weights, parameters=plain)


def uniform(models: Sequence[int]) -> Blend:
    """The mean of the models of these numbers."""
    return average([Model(i) for i in models], [1.0 / len(models)] * len(models))


def order(root: Expr) -> list[Blend]:
    """Every blend below ``root`` once, inputs before those that use them."""
    return [node for node in walk(root) if isinstance(node, Blend)]


def as_json(root: Expr) -> list[dict[str, Any]]:
    """The expression in plain values: blends in order, inputs as model numbers or "#position"."""
    nodes = order(root)
    place: dict[int, str] = {id(node): f"#{i}" for i, node in enumerate(nodes)}

    def name(node: Expr) -> int | str:
        return node.index if isinstance(node, Model) else place[id(node)]

    def plain(settings: Given) -> dict[str, Any]:
        return {
            key: [[rule.filter, list(rule.values)] for rule in setting.rules]
            for key, setting in dict(settings).items()
        }

    if isinstance(root, Model):
        return [{"model": root.index}]
    return [
        {
            "method": node.method.identity,
            "base": None if node.base is None else name(node.base),
            "operands": [name(operand) for operand in node.operands],
            "parameters": plain(node.shared),
            "each": [plain(values) for values in node.each],
            "seed": node.seed,
        }
        for node in nodes
    ]


def is_random(state: Expr) -> bool:
    """Whether any merge below draws masks."""
    return any(node.method.random for node in order(state))


def reseeded(state: Expr, shift: int) -> Expr:
    """The same expression with other masks: every seed moved by ``shift``."""

    def moved(node: Expr, inputs: Sequence[Expr]) -> Expr:
        if isinstance(node, Model):
            return node
        base, operands = node.parted(inputs)
        seed = None if node.seed is None else node.seed + shift
        return replace(node, operands=operands, base=base, seed=seed)

    return fold(state, moved)
