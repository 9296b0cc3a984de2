"""The folder of a run: its header, and whether this run may go on in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmerge.errors import OutputError, argument
from fastmerge.evaluation.journal import Journal, check_own, write_atomically
from fastmerge.evaluation.weights import SCORED
from fastmerge.output.place import explain

JOURNAL_FILE, HEADER_FILE, GRAM_FILE, MODEL_FOLDER = (
    "journal.jsonl",
    "run.json",
    "grams.npz",
    "model",
)


def prepare(
    out: Path, said: Mapping[str, Any], asked: int | None, own: int, *, resume: bool
) -> int:
    """Makes the run's folder, or checks that it holds this very run; returns the seed.

    ``said``: what decides the run, by name; ``asked``: the seed that the caller wants; ``own``: the
    one of a new run without. Raises FastmergeError.
    """
    from fastmerge.version import __version__

    try:
        return _prepare(out, {"fastmerge": __version__, **said}, asked, own, resume)
    except OSError as error:
        raise explain(error, out) from error


def _prepare(out: Path, header: dict[str, Any], asked: int | None, own: int, resume: bool) -> int:
    path = out / HEADER_FILE
    check_own(out, HEADER_FILE)
    if not resume and _holds_no_result(out):
        # It failed before its first result: who repeats it, mended or not, wants it to run. With
        # its seed where it is the same run, which may be at work.
        resume = asked is None and _recorded(path) == header
    elif os.path.isfile(path) and not resume:
        raise OutputError(
            f"{out}: holds a run already; use {argument('resume', True)}, or another folder"
        )
    elif os.path.exists(out) and any(out.iterdir()) and not os.path.isfile(path):
        raise OutputError(f"{out}: is not empty; give a new folder")
    if os.path.isfile(path) and resume:
        try:
            found = json.loads(path.read_text())
            recorded = int(found.pop("seed"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise OutputError(f"{path}: is damaged; give a new folder") from None
        if found != header:
            what = next(key for key in header if found.get(key) != header[key])
            raise OutputError(
                f"{out}: was begun with other '{what}'; use the same "
                f"{_named(header)} and models, or another folder"
            )
        if asked is not None and asked != recorded:
            raise OutputError(f"{out}: was begun with seed {recorded}, not {asked}")
        return recorded
    seed = own if asked is None else asked
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**header, "seed": seed}, indent=1) + "\n")
    return seed


def _named(header: Mapping[str, Any]) -> str:
    return next(key for key in header if key not in ("fastmerge", "inputs"))


def _holds_no_result(out: Path) -> bool:
    """Whether the folder holds the beginning of a run and nothing that one has measured."""
    if not os.path.isfile(out / HEADER_FILE):
        return False
    journal = out / JOURNAL_FILE
    known = {HEADER_FILE, GRAM_FILE, JOURNAL_FILE, SCORED}
    return {entry.name for entry in out.iterdir()} <= known and not Journal(journal).holds("score:")


def _recorded(path: Path) -> dict[str, Any] | None:
    """A run's header without its seed; None where it is damaged."""
    try:
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "seed"}
    except (ValueError, AttributeError, RecursionError):
        return None
