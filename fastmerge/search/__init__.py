"""Whole models as expressions, scored: coefficients, geometry, one-shot families, sweeps, searches.

``run(file, out)`` does a whole search: candidates, hold-out, report, the best as a model. For
callers that score themselves, ``open_study(file, out)`` gives a `Study` with ``ask`` and ``tell``,
and ``finish(study, out)`` writes the same.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.search.document import SearchFile, load
    from fastmerge.search.found import Found
    from fastmerge.search.runner import describe, finish, open_study, run
    from fastmerge.search.study import Study, Trial

__all__ = [
    "Found",
    "SearchFile",
    "Study",
    "Trial",
    "describe",
    "finish",
    "load",
    "open_study",
    "run",
]

_HOMES = {
    **dict.fromkeys(("SearchFile", "load"), "document"),
    "Found": "found",
    **dict.fromkeys(("describe", "finish", "open_study", "run"), "runner"),
    **dict.fromkeys(("Study", "Trial"), "study"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fastmerge.search.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastmerge.search' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
