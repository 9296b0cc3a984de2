"""What a recipe gives a parameter: a value, a gradient over the layers, filters by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastmerge.errors import RecipeError, brief, near_miss
from fastmerge.methods import Parameter
from fastmerge.recipe.located import LocatedDict, LocatedList

Scalar = bool | int | float | str


# ---------------------------------------------------------------- parameter settings


class Rule(NamedTuple):
    """One value or gradient for the tensors whose name contains ``filter`` (None: every tensor)."""

    filter: str | None
    values: tuple[Scalar, ...]  # one: a constant; several: a gradient over the layers
    where: str

    def matches(self, tensor: str) -> bool:
        return self.filter is None or self.filter in tensor

    def within(self, other: Rule) -> bool:
        """Whether ``other`` matches every tensor that this does."""
        return other.filter is None or (self.filter is not None and other.filter in self.filter)


@dataclass(frozen=True)
class Setting:
    """What one level of a recipe gives one parameter: rules, of which the first that matches
    counts.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()  # keys beside 'filter' and 'value', with their places

    @property
    def unreached(self) -> list[Rule]:
        """Those that no tensor gets to: an earlier one matches all that they do."""
        return [
            rule
            for number, rule in enumerate(self.rules)
            if any(rule.within(earlier) for earlier in self.rules[:number])
        ]

    def checked(self, parameter: Parameter) -> Setting:
        """The same with every value of ``parameter``'s kind and in its bounds; raises
        FastmergeError.
        """
        for rule in self.rules:
            if parameter.kind is str and len(rule.values) > 1:
                raise RecipeError(f"{rule.where}: '{parameter.name}' takes no gradient")
        return Setting(
            tuple(
                rule._replace(values=tuple(parameter.check(v, rule.where) for v in rule.values))
                for rule in self.rules
            )
        )


def interpolate(values: tuple[Scalar, ...], t: float, parameter: Parameter, where: str) -> Any:
    """The value of a gradient of checked ``values`` at ``t`` in [0, 1].

    Numbers: piecewise linear over equal intervals, in double precision; booleans: the entry at
    int(t * (len - 1)). As mergekit 0.1.5 (config.py, evaluate_setting).
    """
    if len(values) == 1:
        return values[0]
    scaled = t * (len(values) - 1)
    low = int(scaled)
    if parameter.kind is bool:
        return values[low]
    high = min(len(values) - 1, low + 1)
    fraction = scaled - low
    value = (1 - fraction) * float(values[low]) + fraction * float(values[high])
    return parameter.check(value, where) if parameter.kind is int else value


def _scalar(value: Any, where: str) -> Scalar:
    if isinstance(value, str):
        # YAML 1.1 reads 1e-5 (no dot) as text; people mean the number.
        word = value.strip().lower()
        if word in ("true", "false"):
            return word == "true"
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, int) and abs(value) > 1 << 53:
        raise RecipeError(f"{where}: the number is out of range")
    if isinstance(value, (bool, int, float)):
        return value
    raise RecipeError(f"{where}: a value must be a number, true or false, not {shown(value)}")


def shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else "nothing" if value is None else repr(value)


def _gradient(value: Any, where: str) -> tuple[Scalar, ...]:
    if not isinstance(value, LocatedList):
        return (_scalar(value, where),)
    if not value:
        raise RecipeError(f"{where}: the list of values is empty")
    return tuple(_scalar(item, at) for item, at in zip(value, value.at, strict=True))


_OF_A_RULE = ("filter", "value")


def _ignored(value: LocatedDict) -> tuple[str, ...]:
    return tuple(f"'{key}' ({value.at[key]})" for key in value if key not in _OF_A_RULE)


def _rule(value: LocatedDict, where: str) -> Rule:
    for key in value:
        # A text in place of the filter's is hardly meant to hold for every tensor.
        meant = "filter" if "filter" not in value and isinstance(value[key], str) else None
        meant = near_miss(key, _OF_A_RULE) or meant
        if key not in _OF_A_RULE and meant is not None:
            raise RecipeError(f"{value.at[key]}: unknown key '{key}'; did you mean '{meant}'?")
    if value and not any(key in value for key in _OF_A_RULE):
        first = brief(next(iter(value)))
        raise RecipeError(
            f"{where}: a mapping with {first} is no value; write a number, a list of them, or "
            f"filters: [{{filter: {first[1:-1]}, value: 0.5}}, {{value: 0.3}}]"
        )
    if value.get("value") is None:
        raise RecipeError(f"{where}: a filter needs a 'value:', as {{filter: mlp, value: 0.5}}")
    name = value.get("filter")
    if name is not None and not isinstance(name, str):
        raise RecipeError(f"{value.at['filter']}: 'filter' must be text, not {shown(name)}")
    at = value.at["value"]
    return Rule(None if name == "*" else name, _gradient(value["value"], at), at)


def _setting(value: Any, where: str) -> Setting:
    if isinstance(value, LocatedDict):
        return Setting((_rule(value, where),), _ignored(value))
    if isinstance(value, LocatedList) and any(isinstance(item, LocatedDict) for item in value):
        rules = []
        for item, at in zip(value, value.at, strict=True):
            if not isinstance(item, LocatedDict):
                raise RecipeError(
                    f"{at}: a list holds either values or filters; write {shown(item)} as "
                    "`value: ...`"
                )
            rules.append(_rule(item, at))
        return Setting(tuple(rules), tuple(line for item in value for line in _ignored(item)))
    return Setting((Rule(None, _gradient(value, where), where),))


def settings(value: Any) -> Mapping[str, Setting]:
    """The kind of ``parameters:``: a setting for each name."""
    if not isinstance(value, LocatedDict):
        glued = isinstance(value, str) and ":" in value
        hint = "; a plain space belongs behind the ':'" if glued else ""
        raise ValueError(f"must be a mapping of parameters, not {shown(value)}{hint}")
    return {k: _setting(v, value.at[k]) for k, v in value.items() if v is not None}


NO_SETTINGS: Mapping[str, Setting] = {}


def extrapolations(setting: Setting, parameter: Parameter) -> list[str]:
    """One line for each value of a ``fraction`` that lies beyond the models it goes between."""
    if not parameter.fraction:
        return []
    values = [(float(value), rule.where) for rule in setting.rules for value in rule.values]
    return [
        f"{where}: {parameter.name} = {value:g} lies outside [0, 1]: it extrapolates beyond the "
        f"{'first' if value < 0 else 'second'} of the two models"
        for value, where in dict.fromkeys(values)
        if not 0 <= value <= 1
    ]


def affine(setting: Setting, scale: float, offset: float) -> Setting:
    """``offset + scale * x`` for every value x of a setting; gradients and filters stay."""
    return Setting(
        tuple(
            rule._replace(values=tuple(offset + scale * float(value) for value in rule.values))
            for rule in setting.rules
        )
    )


def constant(value: Any) -> Setting:
    """The setting that gives every tensor the same value."""
    return Setting((Rule(None, (value,), ""),))


def value_of(setting: Setting | None, default: float) -> float | None:
    """The number that every tensor gets, ``default`` for no setting; None where they differ."""
    if setting is None:
        return default
    rule = setting.rules[0]
    return float(rule.values[0]) if rule.filter is None and len(rule.values) == 1 else None
