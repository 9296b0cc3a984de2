"""What an output says of its inputs: names without a path of somebody's disk, Hub ids, their own
cards.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from fastmerge.errors import FastmergeError
from fastmerge.limits import MAX_CARD_BYTES, MAX_FRONT_LETTERS
from fastmerge.models.header import open_regular, unreadable
from fastmerge.models.links import Home, hub_repository
from fastmerge.models.model import Model
from fastmerge.models.side_files import CARD_FILE, check_card
from fastmerge.planning.any_plan import AnyPlan

_FRONT_KEYS = (
    "base_model", "language", "library_name", "license", "license_link", "license_name",
    "pipeline_tag", "tags",
)  # fmt: skip
_FRONT_KEY = re.compile(r"^['\"]?([\w-]+)['\"]?[ \t]*:(?=\s|$)", re.MULTILINE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REMOTE = re.compile(r".*\b(?:huggingface\.co|hf\.co)[/:]([\w.-]+/[\w.-]+?)(?:\.git)?")
_MAX_URL_LETTERS = 400
# An absolute path of two parts or more, and its last one; URLs and fractions are none.
_ABSOLUTE = re.compile(
    r"(?<![\w./:~\\])~?/(?:[^\s/'\"`,;:|()\[\]{}<>]+/)+([^\s/'\"`,;:|()\[\]{}<>]*)"
)


@dataclass(frozen=True)
class Provenance:
    """names: of the models, parallel to the plan's, each another. hub_ids: where each is from, or
    what it says that it was made of. cards: the front matter of their own cards. recipe_text: as
    the author wrote it, with ``./NAME`` for the path to a model.
    """

    names: tuple[str, ...]
    hub_ids: tuple[tuple[str, ...], ...]
    cards: tuple[Mapping[str, Any], ...]
    recipe_text: str
    keep_paths: bool
    _hidden: tuple[tuple[str, str], ...]

    def told(self, text: str) -> str:
        """``text`` with no absolute path in it, unless they are to be kept."""
        if self.keep_paths:
            return text
        for path, name in self._hidden:
            text = text.replace(path, name)
        return _ABSOLUTE.sub(r"./\1", text)


def names(plan: AnyPlan) -> tuple[str, ...]:
    """What the output calls its inputs: as the recipe does with ``keep_paths``, else without the
    path to a folder; the second of one name is ``NAME (2)``.
    """
    if plan.keep_paths:
        return plan.references
    found: list[str] = []
    for reference, model in zip(plan.references, plan.models, strict=True):
        name = display_name(reference, PurePath(model.label))
        others = sum(display == name for display in map(_without_number, found))
        found.append(f"{name} ({others + 1})" if others else name)
    return tuple(found)


def provenance(plan: AnyPlan) -> Provenance:
    called = names(plan)
    hidden: dict[str, str] = {}
    for reference, model, name in zip(plan.references, plan.models, called, strict=True):
        for path in (reference, model.label, *map(str, model.places)):
            if path.startswith(("/", "~")) and len(path) > 1:
                hidden[path] = f"./{name}"
                hidden[json.dumps(path)[1:-1]] = json.dumps(f"./{name}")[1:-1]
    longest_first = sorted(hidden.items(), key=lambda item: -len(item[0]))
    cards = tuple(_front_matter(model) for model in plan.models)
    found = Provenance(
        names=called,
        hub_ids=tuple(map(_hub_ids, plan.models, cards)),
        cards=cards,
        recipe_text=plan.recipe_text,
        keep_paths=plan.keep_paths,
        _hidden=tuple(longest_first),
    )
    return replace(found, recipe_text=found.told(plan.recipe_text))


def display_name(reference: str, found: PurePath) -> str:
    """A model's name on a card: a Hub id as it is, a folder without the path to it. ``found`` is
    where it was read: a folder is found under its own name, a Hub id in a cache.

    A path on somebody's disk means nothing to the card's reader, and the Hub refuses it as a
    base_model.
    """
    path = PurePath(reference)
    is_path = path.is_absolute() or reference.startswith((".", "~")) or len(path.parts) > 2
    if not is_path and found.parts[-len(path.parts) :] != path.parts:
        return reference
    cached = hub_repository(Path(found))
    if cached is not None:
        return _id_of(cached)  # and not the hash of its snapshot
    name = path.parent.name if path.suffix == ".safetensors" else path.name
    return name or reference


def _without_number(name: str) -> str:
    return re.sub(r" \(\d+\)$", "", name)


def _id_of(repository: Path) -> str:
    return "/".join(repository.name.removeprefix("models--").split("--", 1))


def _hub_ids(model: Model, card: Mapping[str, Any]) -> tuple[str, ...]:
    """From its place in the Hub's cache, its git remote, or else the ids that its own card names as
    what it was made of.
    """
    if model.folder is not None:
        cached = hub_repository(Path(os.path.realpath(model.folder)))
        if cached is not None:
            return (_id_of(cached),)
        remote = _git_remote(model.folder)
        if remote is not None:
            return (remote,)
    return tuple(name for name in as_list(card.get("base_model")) if _HUB_ID.fullmatch(name))


def _git_remote(folder: Path) -> str | None:
    """The first repository on the Hub that the folder's git configuration names."""
    for line in _text(folder, ".git/config").splitlines():
        key, equals, url = line[:_MAX_URL_LETTERS].partition("=")
        found = _REMOTE.fullmatch(url.strip()) if equals and key.strip() == "url" else None
        if found is not None:
            return found[1]
    return None


def is_hub_id(name: str) -> bool:
    """Whether it has the form of a model's name on the Hub, with its owner's."""
    return _HUB_ID.fullmatch(name) is not None


def as_list(value: Any) -> list[str]:
    """The strings in a value of front matter, which may be one or a list."""
    return [item for item in (value if isinstance(value, list) else [value]) if is_plain(item)]


def is_plain(value: Any) -> bool:
    """Whether it is a short line of text."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 100


def _front_matter(model: Model) -> Mapping[str, Any]:
    """Of the model's own card; {} where it has none. ModelError where it may not be read: the
    output's licence would be said without it.
    """
    text = ""
    if model.folder is not None:
        check_card(model.folder)
        text = _text(model.folder, CARD_FILE)
    parts = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    front = _wanted(parts[1])
    if len(front) > MAX_FRONT_LETTERS:
        return {}
    import yaml

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(front)):
            return {}  # a few lines of them unfold to gigabytes
        found = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    # !!bool 7, !!int '', !!timestamp x, 1:1:...:1.0: PyYAML's
    except (LookupError, AttributeError, TypeError, ArithmeticError):
        return {}
    return found if isinstance(found, dict) else {}


def _wanted(front: str) -> str:
    """Of front matter the lines of the keys that are read: a leaderboard's results beside them are
    a hundred times as long. Of one in braces, all.
    """
    if front.lstrip().startswith("{"):
        return front
    keys = list(_FRONT_KEY.finditer(front))
    ends = [*(key.start() for key in keys), len(front)][1:]
    parts = zip(keys, ends, strict=False)
    return "".join(front[key.start() : end] for key, end in parts if key[1] in _FRONT_KEYS)


_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP)


def _text(folder: Path, name: str) -> str:
    """The beginning of a file in the folder; "" where there is none that may be read, or it is a
    link out. Raises ModelError where a disk fails: a licence would be lost.
    """
    try:
        with open_regular(Home(folder).inside(folder / name)) as file:
            return (file.read(MAX_CARD_BYTES) or b"").decode(errors="replace")
    except OSError as error:
        if error.errno in _NOT_THERE:
            return ""
        unreadable(folder / name, error)
    except FastmergeError:
        return ""


# --- licences ---

# From the one that asks least of who passes the work on.
_PERMISSIVE = (
    "unlicense", "cc0-1.0", "wtfpl", "mit", "isc", "zlib", "bsd", "bsd-2-clause", "bsd-3-clause",
    "ms-pl", "apache-2.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0",
)  # fmt: skip
_KEYS = ("license", "license_name", "license_link")


def licence(cards: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The front matter's keys for the strictest licence of the inputs: the one that is left beside
    permissive ones, or ``other``, ``differing``, where several are.
    """
    said: dict[str, dict[str, str]] = {}
    for card in cards:
        if is_plain(card.get("license")):
            keys = {key: card[key] for key in _KEYS if is_plain(card.get(key))}
            said[licence_name(card)] = keys
    strict = [name for name in said if name not in _PERMISSIVE]
    if len(strict) > 1:
        return {"license": "other", "license_name": "differing"}
    if strict:
        return said[strict[0]]
    return said[max(said, key=_PERMISSIVE.index)] if said else {}


def licence_name(card: Mapping[str, Any]) -> str:
    name, own = card.get("license"), card.get("license_name")
    return str(own if name == "other" and is_plain(own) else name).lower() if is_plain(name) else ""
