"""One scope's parameters for any tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.errors import FastmergeError, RecipeError
from fastmerge.methods import REQUIRED, Method, Parameter
from fastmerge.methods.types import Values
from fastmerge.recipe.settings import Rule, Setting, interpolate

# ---------------------------------------------------------------- parameters


class ParameterValues:
    """One scope's parameters for any tensor: the first matching rule of the most specific level,
    else the default.
    """

    def __init__(
        self, parameters: Sequence[Parameter], levels: Sequence[Mapping[str, Setting]], missing: str
    ) -> None:
        self._missing = missing
        self._columns: list[tuple[Parameter, tuple[Rule, ...]]] = []
        for parameter in parameters:
            given = [level[parameter.name] for level in levels if parameter.name in level]
            rules = tuple(rule for setting in given for rule in setting.rules)
            if not rules and parameter.default is REQUIRED:
                raise self._lacks(parameter, "")
            self._columns.append((parameter, rules))
        # Equal values share one mapping: 36 000 tensors need not hold as many.
        self._shared: dict[tuple[Any, ...], Values] = {}
        fixed = all(
            not rules or (rules[0].filter is None and len(rules[0].values) == 1)
            for _, rules in self._columns
        )
        self._fixed = self._resolve("", 0.0) if fixed else None
        self.varies = not fixed

    def gives(self, name: str) -> bool:
        """Whether the recipe says anything of the parameter called ``name``."""
        return any(parameter.name == name and rules for parameter, rules in self._columns)

    def at(self, tensor: str, t: float) -> Values:
        """The values for one tensor at position ``t`` in [0, 1] of its layer stack."""
        return self._resolve(tensor, t) if self._fixed is None else self._fixed

    def _resolve(self, tensor: str, t: float) -> Values:
        key = tuple(self._value(parameter, rules, tensor, t) for parameter, rules in self._columns)
        found = self._shared.get(key)
        if found is None:
            names = (parameter.name for parameter, _ in self._columns)
            found = self._shared[key] = dict(zip(names, key, strict=True))
        return found

    def _value(self, parameter: Parameter, rules: Sequence[Rule], tensor: str, t: float) -> Any:
        for rule in rules:
            if rule.matches(tensor):
                return interpolate(rule.values, t, parameter, rule.where)
        if parameter.default is REQUIRED:
            raise self._lacks(parameter, tensor)
        return parameter.default

    def _lacks(self, parameter: Parameter, tensor: str) -> FastmergeError:
        text = self._missing.replace("{name}", parameter.name)
        if tensor:
            text = (
                f"{text.split(';')[0]}: no filter matches tensor '{tensor}'; "
                "end the list with `- value: ...`"
            )
        return RecipeError(text)


def check_placed(
    method: Method,
    shared: Sequence[Parameter],
    levels: Sequence[Mapping[str, Setting]],
    of_models: Sequence[Mapping[str, Setting]],
) -> None:
    """Raises RecipeError for a parameter of the whole merge that only single models give."""
    for parameter in shared:
        name = parameter.name
        given = [settings[name].rules[0].where for settings in of_models if name in settings]
        if given and parameter.default is REQUIRED and all(name not in level for level in levels):
            raise RecipeError(
                f"{given[0]}: '{name}' is of the whole merge in {method.name}, not of a model; "
                "give it in the recipe's own 'parameters:'"
            )
