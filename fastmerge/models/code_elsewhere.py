"""Code on the Hub that a model's configs name, which transformers would fetch and run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmerge.errors import ModelError
from fastmerge.models.header import as_object, read_object, show

_CODE = ("attn_implementation", "attn_implementation_internal", "experts_implementation")
_CLASSES = "auto_map"
_REPOSITORY = "--"  # what lies between it and the class: owner/name--modeling_x.Model


def code_on_the_hub(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a config that name code on the Hub that runs unasked, and which."""
    for key, value in config.items():
        inner: list[Any] = [value]
        if isinstance(value, Mapping):
            yield from code_on_the_hub(value)
            inner = list(value.values())  # one for each part of a model
        for one in inner if key.endswith(_CODE) else ():
            if isinstance(one, str) and "/" in one:
                yield key, one


def told_of_code(
    config: Mapping[str, Any], files: Mapping[str, bytes | Path] | None = None
) -> Iterator[str]:
    """A sentence for each piece of code on the Hub that a config.json names, or another config
    among the ``files`` beside it (a tokenizer's, a processor's). Raises ModelError where a disk
    does not give one.
    """
    yield from _told(config, "config.json")
    for name, file in (files or {}).items():
        if "/" in name or name == "config.json" or not name.endswith("config.json"):
            continue
        try:
            found = as_object(file) if isinstance(file, bytes) else read_object(file)
        except (ModelError, ValueError) as error:
            if isinstance(error.__cause__, OSError):  # it could not be copied, either
                raise
            yield f"{name}: was not looked through for code on the Hub: {error}"
            continue
        yield from _told(found, name)


def _told(config: Mapping[str, Any], where: str) -> Iterator[str]:
    for key, named in code_on_the_hub(config):
        yield (
            f"{where}: {show(key)} names code on the Hub, {show(named)}, which "
            "transformers would fetch and run; remove that line if you do not trust it"
        )
    for named in dict.fromkeys(_repositories(config)):
        yield (
            f"{where}: {show(_CLASSES)} names code on the Hub, {show(named)}, which transformers "
            "would fetch and run with trust_remote_code=True; do not give that, or remove those "
            "lines, if you do not trust it"
        )


def _repositories(value: Any, *, named: bool = False) -> Iterator[str]:
    """Whose code the classes of every auto_map in ``value`` are, where that is another's."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _repositories(inner, named=named or key == _CLASSES)
    elif isinstance(value, list):
        for inner in value:
            yield from _repositories(inner, named=named)
    elif named and isinstance(value, str) and _REPOSITORY in value:
        yield value.partition(_REPOSITORY)[0]
