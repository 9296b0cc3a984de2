"""The documents of a recipe, a schedule or a part of one, from whatever a user has them in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmerge.arguments import expanded
from fastmerge.errors import RecipeError, brief
from fastmerge.limits import MAX_RECIPE_BYTES
from fastmerge.recipe.located import LocatedDict, located

_TOO_LONG = f"over {MAX_RECIPE_BYTES >> 20} MiB"


def read(source: Any, what: str) -> tuple[list[LocatedDict], str, str]:
    """The documents of a YAML file, YAML text (a str with a line break), a dict, or a list of
    dicts.

    Returns the documents, the text to record, and the origin's name for messages. ``what`` names
    the kind of file ('recipe', 'schedule'). Raises FastmergeError with the place of the first
    fault.
    """
    from fastmerge.recipe import yaml_text

    if isinstance(source, Mapping):
        source = [source]
    if isinstance(source, list):
        # One document: its keys are the path ('recipe.models[1]'); several: counted from 1.
        names = (
            [what]
            if len(source) == 1
            else [f"{what}, document {i + 1}" for i in range(len(source))]
        )
        try:
            items = [located(item, name) for item, name in zip(source, names, strict=True)]
        except RecursionError:
            raise RecipeError(f"{what}: nested too deeply for a {what}") from None
        if not items:
            raise RecipeError(f"{what}: the {what} is empty")
        text = yaml_text.write([_plain(item) for item in items])
        return [_document(item, what) for item in items], text, what
    if isinstance(source, str) and "\n" in source:
        text, origin = source, what
        if len(text) > MAX_RECIPE_BYTES:
            raise RecipeError(f"{what}: {_TOO_LONG}; not a {what}")
    elif isinstance(source, (str, os.PathLike)):
        path = expanded(Path(source), what)
        origin = path.name
        try:
            with path.open("rb") as file:  # a pipe will do: `fastmerge merge <(...)`
                data = file.read(MAX_RECIPE_BYTES + 1)
            if len(data) > MAX_RECIPE_BYTES:
                raise RecipeError(f"{path}: {_TOO_LONG}; not a {what}")
            # Line ends as in any text.
            text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
        except (FileNotFoundError, ValueError):  # ValueError: a NUL in the name
            raise RecipeError(f"{path}: no such {what} file") from None
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    else:
        raise RecipeError(f"a {what} is a path, YAML text or a dict, not {type(source).__name__}")
    documents = [item for item in yaml_text.parse(text, origin, what) if item is not None]
    if not documents:
        raise RecipeError(f"{origin}: the {what} is empty")
    return [_document(item, origin) for item in documents], text, origin


def _document(item: Any, origin: str) -> LocatedDict:
    if not isinstance(item, LocatedDict):
        kind = "a list" if isinstance(item, list) else brief(item)
        where = getattr(item, "where", "") or origin
        raise RecipeError(f"{where}: a document must be a mapping of keys, not {kind}")
    return item


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
