"""``fastmerge methods``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastmerge.cli.app import PROGRAM, Json, command
from fastmerge.cli.console import pairs, print_json, put, table
from fastmerge.cli.options import Argument, Option
from fastmerge.errors import RecipeError, nearest

if TYPE_CHECKING:
    from fastmerge.methods import Method


@command
def methods(
    name: Annotated[str | None, Argument(help="One method, with its parameters.")] = None,
    adapters: Annotated[bool, Option("--adapters", help="Those of adapters alone.")] = False,
    json: Json = False,
) -> None:
    """List the merge methods, or one method's parameters."""
    chosen = _of_adapters(name) if adapters else _of_models(name)
    if json:
        print_json([_method_row(method) | dict(_cost(method, adapters)) for method in chosen])
        return
    if name is None:
        absent = table(
            ("method", "models", "base", "parameters", "what it does", "paper"),
            (
                (
                    method.name,
                    _arity(method.min_operands, method.max_operands),
                    _BASE[method.base],
                    ", ".join(parameter.name for parameter in method.parameters),
                    method.summary,
                    method.paper,
                )
                for method in chosen
            ),
            spare=("paper", "parameters"),
        )
        if absent:
            put(f"{PROGRAM} methods NAME has each one's {' and '.join(reversed(absent))}")
        return
    (method,) = chosen
    put(f"{method.name}: {method.summary}")
    pairs(
        [
            ("models", _arity(method.min_operands, method.max_operands)),
            ("base", _BASE[method.base]),
            *_cost(method, adapters),
            ("paper", method.paper),
        ]
    )
    table(
        ("parameter", "type", "given", "default", "allowed", "meaning"),
        (
            (
                parameter.name,
                parameter.kind.__name__,
                "per model" if parameter.per_model else "once",
                _default(parameter.default),
                parameter.bounds(),
                parameter.doc,
            )
            for parameter in method.parameters
        ),
    )


def _of_models(name: str | None) -> Sequence[Method]:
    from fastmerge.methods import METHODS, find, load
    from fastmerge.methods.adapters import ADAPTER_METHODS

    load()
    if name in ADAPTER_METHODS and name not in METHODS:
        raise RecipeError(
            f"methods: '{name}' merges adapters alone; run: {PROGRAM} methods --adapters {name}"
        )
    return [*METHODS.values()] if name is None else [find(name, "methods")]


def _of_adapters(name: str | None) -> Sequence[Method]:
    from fastmerge.methods.adapters import ADAPTER_METHODS

    if name is None:
        return [*ADAPTER_METHODS.values()]
    if name not in ADAPTER_METHODS:
        hint = nearest(name, ADAPTER_METHODS, limit=20)
        raise RecipeError(f"methods: no method '{name}' of adapters; {hint}")
    return [ADAPTER_METHODS[name]]


_BASE = {
    "required": "required",
    "optional": "optional",
    "none": "none",
    "first": "one of the models",
    "operand": "counts as a model",
}


def _arity(low: int, high: int | None) -> str:
    return str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"


def _cost(method: Method, adapters: bool) -> list[tuple[str, str]]:
    """Of the table's rows alone: what somebody registered may read what it likes."""
    from fastmerge.methods import METHODS
    from fastmerge.methods.cost import cost

    is_ours = not adapters and METHODS.get(method.name) is method and not method.version
    return [("cost", cost(method))] if is_ours else []


def _default(value: object) -> str:
    from fastmerge.methods import REQUIRED

    return "required" if value is REQUIRED else "none" if value is None else str(value).lower()


def _method_row(method: Method) -> dict[str, Any]:
    from fastmerge.methods import REQUIRED

    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "base": method.base,
        "min_models": method.min_operands,
        "max_models": method.max_operands,
        "random": method.random,
        "parameters": [
            {
                "name": parameter.name,
                "type": parameter.kind.__name__,
                "per_model": parameter.per_model,
                "required": parameter.default is REQUIRED,
                "default": None if parameter.default is REQUIRED else parameter.default,
                "allowed": parameter.bounds(),
                "meaning": parameter.doc,
            }
            for parameter in method.parameters
        ],
    }
