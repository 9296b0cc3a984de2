"""YAML to mappings and lists that know their lines, and back. Loaded where a file is read: the
library's import takes a tenth of a small merge.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fastmerge.errors import RecipeError, brief
from fastmerge.limits import MAX_NUMBER_LETTERS, MAX_RECIPE_VALUES
from fastmerge.recipe.located import LocatedDict, LocatedList

_TAG = "tag:yaml.org,2002:"
_OF_AN_ENTRY = ("model", "source_model", "sources")  # doubled where a list's '-' is forgotten
_NUMBERS = (f"{_TAG}int", f"{_TAG}float")
# What PyYAML lets through beside its own, by what makes it.
_FOREIGN = (
    ValueError,  # "\U00110000"
    OverflowError,  # "\UFFFFFFFF"
    AttributeError,  # !!timestamp x
    IndexError,  # !!int ''
    KeyError,  # !!bool 7
)
FAULTS = (yaml.YAMLError, RecursionError, *_FOREIGN)


class Constructor(SafeConstructor):
    """PyYAML's, with a bound on numbers, and on what '<<' takes over: forty lines that each take
    the one before over twice make 10^12 values.
    """

    taken = 0

    def construct_scalar(self, node: ScalarNode | MappingNode) -> Any:
        text = super().construct_scalar(node)
        if node.tag in _NUMBERS and len(text) > MAX_NUMBER_LETTERS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(text)} letters", node.start_mark
            )
        return text

    def flatten_mapping(self, node: MappingNode) -> None:
        merges = any(key.tag == f"{_TAG}merge" for key, _ in node.value)
        super().flatten_mapping(node)
        self.taken += len(node.value) if merges else 0
        if self.taken > MAX_RECIPE_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"'<<' makes more than {MAX_RECIPE_VALUES} values", node.start_mark
            )


class _Builder:
    """Turns YAML nodes into located containers and plain scalars."""

    def __init__(self, origin: str, *, lenient: bool) -> None:
        self.origin, self.lenient = origin, lenient
        self.constructor = Constructor()
        # By the node's id: an alias shares its anchor's object, so nested aliases stay small.
        self.done: dict[int, Any] = {}
        self.open: set[int] = set()
        # Values in each, every alias written out: whoever walks or prints them meets that many.
        self.values: dict[int, int] = {}
        self.doubled: list[str] = []  # earlier ones of keys that are given twice, where lenient

    def place(self, node: Node) -> str:
        return f"{self.origin}:{node.start_mark.line + 1}"

    def build(self, node: Node) -> Any:
        if id(node) in self.open:
            raise RecipeError(f"{self.place(node)}: this anchor contains itself")
        if id(node) not in self.done:
            self.open.add(id(node))
            self.done[id(node)] = self._build(node)
            self.open.discard(id(node))
            self._count(node)
        return self.done[id(node)]

    def _count(self, node: Node) -> None:
        inner: list[Node] = []
        count = 1 + len(node.value) // 100 if isinstance(node, ScalarNode) else 1
        if isinstance(node, MappingNode):
            inner = [value for _, value in node.value]
        elif isinstance(node, SequenceNode):
            inner = node.value
        count += sum(self.values[id(item)] for item in inner)
        self.values[id(node)] = count
        made = self.done[id(node)]
        if isinstance(made, (LocatedDict, LocatedList)):
            made.size = count

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
            value = self.constructor.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            detail = getattr(error, "problem", None) or str(error)
            if "could not determine a constructor" in detail:
                raise RecipeError(
                    f"{self.place(node)}: the tag '{node.tag}' has no use here; leave it out"
                ) from None
            raise RecipeError(f"{self.place(node)}: not valid YAML: {detail}") from None
        except (AttributeError, IndexError, KeyError):
            kind = node.tag.removeprefix(_TAG)
            raise RecipeError(
                f"{self.place(node)}: {brief(node.value)} is no {kind}; leave out the tag "
                f"'!!{kind}'"
            ) from None
        self._check_text(node)
        return value

    def _check_text(self, node: ScalarNode) -> None:
        try:
            node.value.encode()
        except UnicodeEncodeError:
            raise RecipeError(
                f"{self.place(node)}: {brief(ascii(node.value))} holds half of a surrogate pair, "
                "which is no text"
            ) from None

    def _double(self, key: ScalarNode, earlier: Node) -> None:
        if self.lenient and key.value not in _OF_AN_ENTRY:
            again = key.start_mark.line + 1
            self.doubled.append(
                f"'{key.value}' ({self.place(earlier)}; given again on line {again}, which counts)"
            )
            return
        entry = "; did you mean another entry? Begin it with '- '"
        raise RecipeError(
            f"{self.place(key)}: key '{key.value}' is given twice (first on line "
            f"{earlier.start_mark.line + 1}){entry if key.value in _OF_AN_ENTRY else ''}"
        )

    def _mapping(self, node: MappingNode) -> LocatedDict:
        seen: dict[str, Node] = {}
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            if not isinstance(key, ScalarNode) or key.tag != f"{_TAG}str":
                text = getattr(key, "value", "")
                shown = f" '{text}'" if isinstance(text, str) else ""
                remedy = "quote it"
                # {weight: 0,5}: in a list it cannot be told from two numbers.
                if node.flow_style and key.tag == f"{_TAG}int" and value.tag == f"{_TAG}null":
                    remedy = f"write a number with a point, as in 0.{text}"
                raise RecipeError(f"{self.place(key)}: the key{shown} is not text; {remedy}")
            self._check_text(key)
            if key.value[:1].isspace() and key.style is None:
                raise RecipeError(f"{self.place(key)}: {_indented(key.value[0])}")
            if key.value in seen:
                self._double(key, seen[key.value])
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


def _built(node: Node, builder: _Builder) -> Any:
    document = builder.build(node)
    if isinstance(document, LocatedDict):
        document.doubled = tuple(builder.doubled)
    return document


def parse(text: str, origin: str, what: str) -> list[Any]:
    """The documents of ``text``, None for an empty one; RecipeError names the line of a fault."""
    try:
        # Not libyaml's loader: it takes the process down where this one raises RecursionError.
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        # In a recipe the last of two counts, as in mergekit, which is noted.
        return [_built(node, _Builder(origin, lenient=what == "recipe")) for node in nodes if node]
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"{origin}{_fault(error, text)}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{origin}: nested too deeply for a {what}") from None
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"{origin}: not valid YAML: a letter's number in it: {error}") from None


# What PyYAML says in a parser's words, and what it means for who wrote the file. `{line}`: where
# the section began that the fault is in.
_IN_OUR_WORDS = (
    (
        "found character '`'",
        "a model card's fence is no part of it; keep the lines between the two",
    ),
    ("found character '\\t'", "a tab stands where only spaces may; indent with spaces"),
    (
        "mapping values are not allowed",
        (
            "this line is indented more than its section, or has a second ':' (quote a text with "
            "one), or the line before has no ': '"
        ),
    ),
    (
        "expected <block end>, but found '<block mapping start>'",
        (
            "this line is indented otherwise than the section of line {line}; keys of one section "
            "begin in one column"
        ),
    ),
    (
        "expected <block end>, but found '<block sequence start>'",
        "this item is indented otherwise than those above it; items begin in one column",
    ),
    (
        "expected <block end>, but found '-'",
        "this item is indented otherwise than the section above it; indent lists below their key",
    ),
    (
        "expected <block end>, but found",
        (
            "this does not go on the section of line {line}; look for a quote or a bracket too "
            "many, or for keys beside a list"
        ),
    ),
    ("could not find expected ':'", "the key has no ':' behind it (as in `t: 0.5`)"),
    ("expected ',' or '}'", "a '{{' of line {line} is not closed, or a comma is missing in it"),
    ("expected ',' or ']'", "a '[' of line {line} is not closed, or a comma is missing in it"),
    ("unexpected end of stream", "a quote of line {line} is not closed"),
    ("did not find expected", "look at the indentation here"),
    ("found undefined alias", "no '&' of that name is above it; quote a text that begins with '*'"),
    ("cannot start any token", "a text that begins so must be quoted"),
)


def _indented(letter: str) -> str:
    """With a blank that looks like a space, as U+00A0."""
    return (
        f"not valid YAML: indented with U+{ord(letter):04X}, which is no space to YAML; use plain "
        "spaces"
    )


def _fault(error: yaml.MarkedYAMLError, text: str) -> str:
    """``:line: what is wrong`` of a text that is no YAML."""
    mark, context = error.problem_mark, error.context_mark
    problem = str(error.problem or error.context or "unreadable")
    line = f":{mark.line + 1}" if mark else ""
    first = context or mark
    began = first.line + 1 if first else 1
    for number, above in enumerate(text.splitlines()[: mark.line + 1] if mark else [], 1):
        if not above.isascii() and above[: len(above) - len(above.lstrip())].strip(" \t"):
            odd = next(letter for letter in above if letter not in " \t")
            return f":{number}: {_indented(odd)}"
    for theirs, ours in _IN_OUR_WORDS:
        if theirs in problem:
            shown = text.splitlines()[mark.line : mark.line + 1] if mark else []
            here = f" ({brief(shown[0].strip())})" if shown and shown[0].strip() else ""
            return f"{line}: not valid YAML{here}: {ours.format(line=began)}"
    return f"{line}: not valid YAML: {problem}"


def write(documents: list[Any]) -> str:
    """Plain dicts, lists and scalars as YAML, keys in their order."""
    return str(yaml.safe_dump_all(documents, sort_keys=False))
