"""How configs say modules: PEFT's rules for names, lists of names and expressions; and quantisers'
lists of those that they treat in another way.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from fastmerge.errors import UnsupportedError, brief
from fastmerge.limits import (
    MAX_PATTERN_LETTERS,
    MAX_PATTERN_REPEATS,
    MAX_PATTERN_STEPS,
    MAX_PATTERNS_LETTERS,
)
from fastmerge.models.architecture import LAYER_NUMBER, layer_of

V = TypeVar("V")

# A repeated group may hold another repetition, which is exponential; a reference is worse.
_COSTLY = re.compile(r"\)\s*[*+?{]|\\\d|\(\?P=|\(\?[#aiLmsux]")
_ESCAPED = re.compile(r"\\.|\[[^\]]*\]")
_OPTION = re.compile(r"(?<![(*+?}])\?")
_PLAIN = re.compile(r"[\w.-]+")


class _Effort:
    """What one setting's expressions, from a stranger's file, may cost on a stranger's names."""

    def __init__(self, where: str) -> None:
        self.where, self._letters, self._steps = where, 0, 0

    def expression(self, text: str) -> _Expression:
        """Raises UnsupportedError where matching it could take for ever, or it is none."""
        bare = _ESCAPED.sub("a", text)
        repeats = sum(bare.count(sign) for sign in "*+{")
        self._letters += len(text)
        dear = len(text) > MAX_PATTERN_LETTERS or self._letters > MAX_PATTERNS_LETTERS
        if dear or repeats > MAX_PATTERN_REPEATS or _COSTLY.search(bare):
            raise self.too_dear(text)
        try:
            with warnings.catch_warnings():  # of what a later Python may read in another way
                warnings.simplefilter("ignore", FutureWarning)
                return _Expression(re.compile(text), repeats, _ways(bare), self)
        except (re.error, OverflowError, RecursionError) as error:
            raise UnsupportedError(
                f"{self.where}: {brief(text)} is no regular expression ({error}); write the "
                "modules' names out"
            ) from None

    def spend(self, steps: int, text: str) -> None:
        self._steps += steps
        if self._steps > MAX_PATTERN_STEPS:
            raise self.too_dear(text)

    def too_dear(self, text: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.where}: the expression {brief(text)} could take for ever to match; write the "
            "modules' names out"
        )


class _Expression(NamedTuple):
    pattern: re.Pattern[str]
    repeats: int
    ways: int
    effort: _Effort

    def fits(self, name: str, start: int = 0) -> bool:
        """Whether the name from ``start`` on is what the expression says, to its end."""
        letters = len(name) - start
        steps = self.ways * (1 + letters**self.repeats // math.factorial(self.repeats))
        self.effort.spend(steps, self.pattern.pattern)
        return self.pattern.fullmatch(name, start) is not None


def _ways(bare: str) -> int:
    """Through the alternatives and options of an expression without classes and escapes, at most:
    each may be tried for each of those before it ("a?a?a?aaa").
    """
    found, groups = 1 << len(_OPTION.findall(bare)), [1]
    for letter in bare:
        if letter == "(":
            groups.append(1)
        elif letter == "|":
            groups[-1] += 1
        elif letter == ")" and len(groups) > 1:
            found *= groups.pop()
    return found * math.prod(groups)


class Patterns:
    """What ``rank_pattern`` and ``alpha_pattern`` say of a module: the value of the first key that
    is its name or its end after a dot, as an expression.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._plain: dict[str, tuple[int, Any]] = {}
        self._others: list[tuple[_Expression, int, Any]] = []
        effort = _Effort(where)
        for number, (key, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(key):
                self._plain[key] = number, value
            else:
                self._others.append((effort.expression(key), number, value))

    def of(self, module: str, default: V) -> Any | V:
        """The value for a module of this name."""
        begins = list(starts(module))
        found = [self._plain[module[at:]] for at in begins if module[at:] in self._plain]
        for pattern, number, value in self._others:
            if any(pattern.fits(module, at) for at in begins):
                found.append((number, value))
        return min(found, key=lambda each: each[0])[1] if found else default


def starts(module: str) -> Iterable[int]:
    """Where its parts begin: at 0, and behind each dot."""
    return (0, *(at + 1 for at, letter in enumerate(module) if letter == "."))


class Targets:
    """Which modules an adapter's config means: ``target_modules`` (names or their ends, or one
    expression for whole names), ``exclude_modules``, ``layers_to_transform`` (of ends alone).
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        wanted = config.get("target_modules")
        if wanted is None and config.get("target_parameters"):
            wanted = []
        self._wanted = _names(wanted, f"{where}: target_modules")
        self._unwanted = _names(config.get("exclude_modules"), f"{where}: exclude_modules")
        layers = config.get("layers_to_transform")
        numbers = [layers] if isinstance(layers, int) else layers
        self._layers = frozenset(numbers) if isinstance(numbers, list) and numbers else None
        pattern = config.get("layers_pattern")
        stacks = [pattern] if isinstance(pattern, str) else list(pattern or ())
        self._stacks = {stack: order for order, stack in reversed(list(enumerate(stacks)))}

    def tell(self, module: str) -> bool | None:
        """Whether it is meant; None where the config does not say (``all-linear``)."""
        if self._wanted is None:
            return None
        if self._unwanted is not None and _is_among(module, self._unwanted):
            return False
        if not _is_among(module, self._wanted):
            return False
        in_full = isinstance(self._wanted, _Expression) or module in self._wanted
        if self._layers is None or in_full:
            return True
        number = self._number(module)
        return number is not None and number in self._layers

    def _number(self, module: str) -> int | None:
        if not self._stacks:
            # PEFT asks for a part before the layers': "model.layers.3.", not "layers.3.".
            found = re.search(rf"(?<=\.)[^.]*\.{LAYER_NUMBER}\.", module)
            return int(found[1]) if found else None
        places = []  # the first stack's first number counts, however many stacks are named
        for number in re.finditer(rf"(?<=\.){LAYER_NUMBER}(?=\.)", module):
            before = module[: number.start() - 1]
            orders = [self._stacks.get(before[at:]) for at in starts(before)]
            places += [
                (order, number.start(), int(number[1])) for order in orders if order is not None
            ]
        return min(places)[2] if places else None


def _names(value: Any, where: str) -> frozenset[str] | _Expression | None:
    if value is None or value == "all-linear":
        return None
    if isinstance(value, str):
        return _Effort(where).expression(value)
    return frozenset(value)


def _is_among(module: str, names: frozenset[str] | _Expression) -> bool:
    if isinstance(names, _Expression):
        return names.fits(module)
    return any(module[at:] in names for at in starts(module))


def followed(section: Any, moves: Mapping[str, Iterable[str]], where: str) -> Any:
    """A quantiser's section with the names in its lists (modules_to_not_convert, ignore, targets)
    as they are after layers were moved, repeated or left out. moves: each module's names then.

    A name is a module's, or the parts of it from any to any. An expression (re:...) that does not
    tell the moved ones apart stays. Raises UnsupportedError for one that could take for ever.
    """
    effort = _Effort(where)

    def follow(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: follow(own) for key, own in value.items()}
        if not isinstance(value, list):
            return value
        if not all(isinstance(item, str) for item in value):
            return [follow(item) for item in value]
        found = (new for item in value for new in _moved(item, moves, effort))
        return list(dict.fromkeys(found))

    return follow(section)


def _moved(name: str, moves: Mapping[str, Iterable[str]], effort: _Effort) -> list[str]:
    if not any(letter.isdigit() for letter in name):
        return [name]
    if not _PLAIN.fullmatch(name):
        # From the beginning, to any end.
        expression = effort.expression(f"{name.removeprefix('re:')}.*")
        meant = {old: expression.fits(old) for old in moves}
        if all(expression.fits(new) == meant[old] for old, each in moves.items() for new in each):
            return [name]
        return [new for old, each in moves.items() if meant[old] for new in each]
    found = []
    for old, each in moves.items():
        at = f".{old}.".find(f".{name}.")
        if at < 0:
            continue
        after = len(old) - at - len(name)
        for new in each:
            within = f".{name}." in f".{new}."
            found.append(name if within else new[at : len(new) - after])
    return found if found or layer_of(f"{name}.weight") is not None else [name]
