"""How an adapter's config says modules: PEFT's rules for names, lists of names and expressions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from fastmerge.errors import UnsupportedError, brief

V = TypeVar("V")

_MAX_LETTERS = 4096  # of one expression; the longest seen, of a layer-wise search's ranks, has 400
_MAX_REPEATS = 3  # matching is of this degree in a name's length: 100 letters are tried in 10 ms
# A repeated group may hold another repetition, which is exponential; a reference is worse.
_COSTLY = re.compile(r"\)\s*[*+?{]|\\\d|\(\?P=|\(\?[#aiLmsux]")
_ESCAPED = re.compile(r"\\.|\[[^\]]*\]")
_PLAIN = re.compile(r"[\w.-]+")


def expression(text: str, where: str) -> re.Pattern[str]:
    """A regular expression from a stranger's file, if matching it cannot take for ever."""
    bare = _ESCAPED.sub("a", text)
    repeats = sum(bare.count(sign) for sign in "*+{")
    if len(text) > _MAX_LETTERS or repeats > _MAX_REPEATS or _COSTLY.search(bare):
        raise UnsupportedError(
            f"{where}: the expression {brief(text)} could take for ever to match; write the "
            "modules' names out"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UnsupportedError(
            f"{where}: {brief(text)} is no regular expression ({error}); write the modules' names "
            "out"
        ) from None


class Patterns:
    """What ``rank_pattern`` and ``alpha_pattern`` say of a module: the value of the first key that
    is its name or its end after a dot, as an expression.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._plain: dict[str, tuple[int, Any]] = {}
        self._others: list[tuple[re.Pattern[str], int, Any]] = []
        for number, (key, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(key):
                self._plain[key] = number, value
            else:
                pattern = expression(rf"(?:{key})$", f"{where}: '{key}'")
                self._others.append((pattern, number, value))

    def of(self, module: str, default: V) -> Any | V:
        """The value for a module of this name."""
        starts = list(_starts(module))
        found = [self._plain[module[at:]] for at in starts if module[at:] in self._plain]
        for pattern, number, value in self._others:
            if any(pattern.match(module, at) for at in starts):
                found.append((number, value))
        return min(found, key=lambda each: each[0])[1] if found else default


def _starts(module: str) -> Iterable[int]:
    """Where its parts begin: at 0, and behind each dot."""
    return (0, *(at + 1 for at, letter in enumerate(module) if letter == "."))


class Targets:
    """Which modules an adapter's config means: ``target_modules`` (names or their ends, or one
    expression for whole names), ``exclude_modules``, ``layers_to_transform`` (of ends alone).
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._wanted = _names(config.get("target_modules"), f"{where}: target_modules")
        self._unwanted = _names(config.get("exclude_modules"), f"{where}: exclude_modules")
        layers = config.get("layers_to_transform")
        numbers = [layers] if isinstance(layers, int) else layers
        self._layers = frozenset(numbers) if isinstance(numbers, list) and numbers else None
        pattern = config.get("layers_pattern")
        self._stacks = [pattern] if isinstance(pattern, str) else list(pattern or ())

    def tell(self, module: str) -> bool | None:
        """Whether it is meant; None where the config does not say (``all-linear``)."""
        if self._wanted is None:
            return None
        if self._unwanted is not None and _is_among(module, self._unwanted):
            return False
        if not _is_among(module, self._wanted):
            return False
        in_full = isinstance(self._wanted, re.Pattern) or module in self._wanted
        if self._layers is None or in_full:
            return True
        number = self._number(module)
        return number is not None and number in self._layers

    def _number(self, module: str) -> int | None:
        if not self._stacks:
            # PEFT asks for a part before the layers': "model.layers.3.", not "layers.3.".
            found = re.search(r"(?<=\.)[^.]*\.(\d+)\.", module)
            return int(found[1]) if found else None
        for stack in self._stacks:
            found = re.search(rf"(?:^|\.){re.escape(stack)}\.(\d+)\.", module)
            if found:
                return int(found[1])
        return None


def _names(value: Any, where: str) -> frozenset[str] | re.Pattern[str] | None:
    if value is None or value == "all-linear":
        return None
    if isinstance(value, str):
        return expression(value, where)
    return frozenset(value)


def _is_among(module: str, names: Collection[str] | re.Pattern[str]) -> bool:
    if isinstance(names, re.Pattern):
        return names.fullmatch(module) is not None
    return any(module[at:] in names for at in _starts(module))
