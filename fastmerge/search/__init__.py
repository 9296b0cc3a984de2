"""Whole models as expressions, scored: coefficients, geometry, one-shot families, sweeps, searches.

``run(file, out)`` does a whole search: candidates, hold-out, report, the best as a model. For
callers that score themselves, ``open_study(file, out)`` gives a `Study` with ``ask`` and ``tell``,
and ``finish(study, out)`` writes the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmerge.lazily import loading

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
    **dict.fromkeys(("SearchFile", "load"), "fastmerge.search.document"),
    "Found": "fastmerge.search.found",
    **dict.fromkeys(("describe", "finish", "open_study", "run"), "fastmerge.search.runner"),
    **dict.fromkeys(("Study", "Trial"), "fastmerge.search.study"),
}

if not TYPE_CHECKING:  # which would make every misspelt name one that is there
    __getattr__ = loading(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
