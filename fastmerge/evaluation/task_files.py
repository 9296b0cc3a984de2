"""Task files of lm-evaluation-harness that a schedule brings along, read without running them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from fastmerge.errors import RecipeError
from fastmerge.evaluation.texts import text_of
from fastmerge.limits import MAX_TASK_ENTRIES, MAX_TASKS_BYTES
from fastmerge.recipe.yaml_text import FAULTS, Constructor


def task_texts(folder: Path, where: str) -> dict[str, str]:
    """The task files in a folder and those below, by name; one of a name that was there before, by
    its path in the folder. Raises RecipeError, also for a folder of everything: the harness, too,
    looks for tasks in all of it.
    """
    seen, left = 0, MAX_TASKS_BYTES
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > MAX_TASK_ENTRIES:
            raise RecipeError(
                f"{where}: {folder}: over {MAX_TASK_ENTRIES} files; name the folder of the tasks"
            )
        names = (name for name in (*folders, *files) if name.endswith((".yaml", ".yml")))
        found += (Path(place, name) for name in names)
    texts: dict[str, str] = {}
    for file in sorted(found):
        text = text_of(file, where, left)
        left -= len(text)
        texts[str(file.relative_to(folder)) if file.name in texts else file.name] = text
    return texts


def task_name(text: str) -> str | None:
    found = re.search(r"^(?:task|group):[ \t]*['\"]?([\w./-]+)", text, re.MULTILINE)
    return found[1] if found else None


class _AnyTag(Constructor, yaml.SafeLoader):
    """Reads task files without running their !function tags."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


def data_files(name: str, text: str) -> list[Path]:
    """A task's local data files; FastmergeError for one that is not there.

    The harness takes relative ones from the working directory, not from the task file.
    """
    try:
        document = yaml.load(text, Loader=_AnyTag)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except FAULTS:
        raise RecipeError(f"{name}: not valid YAML: too deep, or a value not as its tag") from None
    if not isinstance(document, Mapping) or document.get("dataset_path") not in (
        "json",
        "csv",
        "text",
    ):
        return []
    options = document.get("dataset_kwargs")
    files = options.get("data_files") if isinstance(options, Mapping) else None
    listed = files.values() if isinstance(files, Mapping) else [files]
    found = []
    for item in listed:
        for file in item if isinstance(item, list) else [item]:
            if not isinstance(file, str) or "*" in file:
                continue
            if not os.path.isfile(file):
                raise RecipeError(
                    f"{name}: data file '{file}' not found (relative paths start at the working "
                    "directory); write an absolute path"
                )
            found.append(Path(file))
    return found
