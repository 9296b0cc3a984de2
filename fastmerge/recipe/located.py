"""YAML that remembers where it stands, and pydantic sections whose errors are one line with that
place.

Shared by recipes and retrograde schedules. A place ('recipe.yml:12', or 'recipe: models[1].weight'
for a Python dict, which has no lines) is attached to every mapping, key and list item.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fastmerge.errors import RecipeError, UnsupportedError, nearest

_TAG = "tag:yaml.org,2002:"


class LocatedDict(dict[str, Any]):
    """A mapping with its own place and each key's."""

    where: str = ""
    at: dict[str, str]


class LocatedList(list[Any]):
    """A list with its own place and each item's."""

    where: str = ""
    at: list[str]


class _Builder:
    """Turns YAML nodes into located containers and plain scalars."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.constructor = SafeConstructor()
        # By the node's id: an alias shares its anchor's object, so nested aliases stay small.
        self.done: dict[int, Any] = {}
        self.open: set[int] = set()

    def place(self, node: Node) -> str:
        return f"{self.origin}:{node.start_mark.line + 1}"

    def build(self, node: Node) -> Any:
        if id(node) in self.open:
            raise RecipeError(f"{self.place(node)}: this anchor contains itself")
        if id(node) not in self.done:
            self.open.add(id(node))
            self.done[id(node)] = self._build(node)
            self.open.discard(id(node))
        return self.done[id(node)]

    def _build(self, node: Node) -> Any:
        if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node)
        if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
            items = LocatedList(self.build(item) for item in node.value)
            items.where, items.at = self.place(node), [self.place(item) for item in node.value]
            return items
        if not isinstance(node, ScalarNode):
            raise RecipeError(f"{self.place(node)}: the tag '{node.tag}' has no use here")
        try:
            return self.constructor.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            detail = getattr(error, "problem", None) or str(error)
            raise RecipeError(f"{self.place(node)}: not valid YAML: {detail}") from None

    def _mapping(self, node: MappingNode) -> LocatedDict:
        seen: dict[str, Node] = {}
        for key, _ in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            if not isinstance(key, ScalarNode) or key.tag != f"{_TAG}str":
                text = getattr(key, "value", "")
                shown = f" '{text}'" if isinstance(text, str) else ""
                raise RecipeError(f"{self.place(key)}: the key{shown} is not text; quote it")
            if key.value in seen:
                first = seen[key.value].start_mark.line + 1
                raise RecipeError(
                    f"{self.place(key)}: key '{key.value}' is given twice (first on line {first})"
                )
            seen[key.value] = key
        try:
            # '<<' puts the merged keys first, so that the mapping's own win below.
            self.constructor.flatten_mapping(node)
        except yaml.YAMLError as error:
            detail = getattr(error, "problem", error)
            raise RecipeError(f"{self.place(node)}: not valid YAML: {detail}") from None
        result = LocatedDict({key.value: self.build(value) for key, value in node.value})
        result.where = self.place(node)
        result.at = {key.value: self.place(key) for key, _ in node.value}
        return result


def _located(value: Any, place: str) -> Any:
    """A Python value (dict, list, scalar) as located containers; the place is its key path."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(f"{place}: key {key!r} is not text")
        result = LocatedDict({k: _located(v, f"{place}.{k}") for k, v in value.items()})
        result.where, result.at = place, {key: f"{place}.{key}" for key in value}
        return result
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        items = LocatedList(_located(item, f"{place}[{i}]") for i, item in enumerate(value))
        items.where, items.at = place, [f"{place}[{i}]" for i in range(len(value))]
        return items
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is not None and type(plain) not in (bool, int, float, str):
        raise RecipeError(f"{place}: {plain!r:.60} has no meaning here")
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def read(source: Any, what: str) -> tuple[list[LocatedDict], str, str]:
    """The documents of a YAML file, YAML text (a str with a line break), a dict, or a list of
    dicts.

    Returns the documents, the text to record, and the origin's name for messages. ``what`` names
    the kind of file ('recipe', 'schedule'). Raises FastmergeError with the place of the first
    fault.
    """
    if isinstance(source, Mapping):
        source = [source]
    if isinstance(source, list):
        # One document: its keys are the path ('recipe.models[1]'); several: counted from 1.
        names = (
            [what]
            if len(source) == 1
            else [f"{what}, document {i + 1}" for i in range(len(source))]
        )
        located = [_located(item, name) for item, name in zip(source, names, strict=True)]
        text = yaml.safe_dump_all([_plain(item) for item in located], sort_keys=False)
        if not located:
            raise RecipeError(f"{what}: the {what} is empty")
        return [_document(item, what) for item in located], text, what
    if isinstance(source, str) and "\n" in source:
        text, origin = source, what
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        origin = path.name
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
        except (FileNotFoundError, ValueError):  # ValueError: a NUL in the name
            raise RecipeError(f"{path}: no such {what} file") from None
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    else:
        raise RecipeError(f"a {what} is a path, YAML text or a dict, not {type(source).__name__}")
    return _parse(text, origin, what), text, origin


def _parse(text: str, origin: str, what: str) -> list[LocatedDict]:
    try:
        # Not libyaml's loader: it takes the process down where this one raises RecursionError.
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        built = [_Builder(origin).build(node) for node in nodes if node is not None]
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or error.context or "unreadable"
        raise RecipeError(f"{origin}{line}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{origin}: nested too deeply for a {what}") from None
    documents = [item for item in built if item is not None]
    if not documents:
        raise RecipeError(f"{origin}: the {what} is empty")
    return [_document(item, origin) for item in documents]


def _document(item: Any, origin: str) -> LocatedDict:
    if not isinstance(item, LocatedDict):
        kind = "a list" if isinstance(item, list) else f"{item!r:.40}"
        where = getattr(item, "where", "") or origin
        raise RecipeError(f"{where}: a document must be a mapping of keys, not {kind}")
    return item


class Section(BaseModel):
    """A mapping in a recipe or schedule: unknown keys are refused with the nearest known one.

    ``refused`` maps keys that other tools know to why they cannot be used here; ``hints`` maps keys
    that belong elsewhere to where. A null value counts as absent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    refused: ClassVar[Mapping[str, str]] = {}
    hints: ClassVar[Mapping[str, str]] = {}
    _where: str = PrivateAttr("")
    _at: dict[str, str] = PrivateAttr(default_factory=dict)

    def at(self, key: str) -> str:
        """The place of ``key``, or of the section when the key is absent."""
        return self._at.get(key, self._where)

    @property
    def where(self) -> str:
        return self._where

    @model_validator(mode="wrap")
    @classmethod
    def _validate_keys(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            wanted = ", ".join(f"'{k}:'" for k, f in cls.model_fields.items() if f.is_required())
            raise ValueError(f"must be a mapping with {wanted}" if wanted else "must be a mapping")
        if not isinstance(data, LocatedDict):
            data = _located(data, cls.__name__.lower())
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for key in data:
            if key in cls.refused and data[key] is not None:
                raise UnsupportedError(
                    f"{data.at[key]}: '{key}' is not supported: {cls.refused[key]}"
                )
            if key not in known and key not in cls.refused:
                hint = cls.hints.get(key) or nearest(key, known)
                raise RecipeError(f"{data.at[key]}: unknown key '{key}'; {hint}")
        try:
            section = handler({k: v for k, v in data.items() if v is not None and k in known})
        except ValidationError as error:
            raise RecipeError(_one_line(error, data)) from None
        section.locate(data)
        section.check()
        return section

    def locate(self, data: LocatedDict) -> None:
        """Takes over the places of the mapping that the section was made from."""
        self._where, self._at = data.where, data.at

    def check(self) -> None:
        """What pydantic's types do not say; raises FastmergeError. The section knows its places by
        now.
        """


def _one_line(error: ValidationError, data: LocatedDict) -> str:
    """pydantic's first error about this section's own keys, with its place."""
    first = error.errors()[0]
    place, path, inner = data.where, "", cast(Any, data)
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        try:
            place, inner = inner.at[part], inner[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    if first["type"] == "missing":
        return f"{place}: '{path}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be a valid string", "must be text; quote it")
    message = message.replace("Input should be", "must be")
    return f"{place}: '{path}' {message}"


def expand(data: Any, short: Mapping[str, str]) -> Any:
    """Writes out shorthand: ``accept: improve`` means ``accept: {rule: improve}``; lists by item.

    ``short`` maps a key to the one a bare value stands for; "" for keys that hold a list of texts.
    """
    if not isinstance(data, LocatedDict):
        return data
    full = LocatedDict(data)
    full.where, full.at = data.where, data.at

    def section(value: Any, key: str, place: str) -> Any:
        if isinstance(value, Mapping) or value is None:
            return value
        inner = LocatedDict({key: value})
        inner.where, inner.at = place, {key: place}
        return inner

    for name, key in short.items():
        value = data.get(name)
        if key == "":
            full[name] = [value] if isinstance(value, str) else value

        elif isinstance(value, LocatedList) and key != "methods":
            items = LocatedList(
                section(item, key, place) for item, place in zip(value, value.at, strict=True)
            )
            items.where, items.at = value.where, value.at
            full[name] = items
        elif name in data:
            full[name] = section(value, key, data.at[name])
    return full
