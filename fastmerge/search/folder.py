"""The folder of a run: its header, who is at work in it, and whether this run may go on in it."""

from __future__ import annotations

import json
import os
import stat
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastmerge.errors import ModelError, OutputError, argument, is_whole
from fastmerge.evaluation.journal import Journal, check_own, is_half_written, write_own
from fastmerge.evaluation.weights import SCORED
from fastmerge.models.header import read_object
from fastmerge.output.journal import locked
from fastmerge.output.place import explain
from fastmerge.output.working import OTHERS_WRITE, is_loose

JOURNAL_FILE, HEADER_FILE, GRAM_FILE, MODEL_FOLDER = (
    "journal.jsonl",
    "run.json",
    "grams.npz",
    "model",
)
LOCK_FILE = ".at-work"
_held: dict[Path, tuple[int, int]] = {}  # of this process: each lock's descriptor, its users


class Hold:
    """This process's right to write into a run's folder, which is made if need be. Until `close`,
    at the end of its context or when nobody has it any more, or the process's end, however it ends.
    Raises FastmergeError where another process is at work.
    """

    def __init__(self, out: Path) -> None:
        is_new = not os.path.exists(out)
        try:
            check_own(out)
            out.mkdir(parents=True, exist_ok=True)
            if is_new or not entries(out):
                _keep_to_oneself(out)
            path = out.resolve() / LOCK_FILE
            descriptor, users = _held.get(path) or (locked(path), 0)
            if not users:
                _clear(path.parent)
        except BlockingIOError:
            raise OutputError(f"{out}: another run is at work in it now ({LOCK_FILE})") from None
        except OSError as error:
            raise explain(error, out) from error
        _held[path] = descriptor, users + 1
        self.close = weakref.finalize(self, _release, path, os.getpid(), is_new)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _clear(out: Path) -> None:
    """Removes what a run that was killed had half written; nobody else is at work here now."""
    for name in filter(is_half_written, os.listdir(out)):
        with suppress(OSError):
            (out / name).unlink()


def _keep_to_oneself(out: Path) -> None:
    """Nobody but us writes to the folder of a run from here on, whatever the umask: what is in it
    will be believed.
    """
    status = os.stat(out)
    if is_loose(status):
        with suppress(OSError):  # a file system without modes: who resumes is told
            out.chmod(stat.S_IMODE(status.st_mode) & ~OTHERS_WRITE)


def _release(path: Path, process: int, is_new: bool) -> None:
    if os.getpid() != process:  # a child that has its parent's memory
        return
    descriptor, users = _held.pop(path)
    if users > 1:
        _held[path] = descriptor, users - 1
        return
    with suppress(OSError):  # the lock is gone with the descriptor, whatever happens to the file
        path.unlink(missing_ok=True)
        if is_new:
            path.parent.rmdir()  # refused before it wrote anything
    with suppress(OSError):  # nothing was written to it
        os.close(descriptor)


def entries(out: Path) -> set[str]:
    """The names in a run's folder, which need not exist, less a lock and what is half written."""
    names = os.listdir(out) if os.path.exists(out) else []
    return {name for name in names if name != LOCK_FILE and not is_half_written(name)}


def prepare(
    out: Path, said: Mapping[str, Any], asked: int | None, own: int, *, resume: bool
) -> tuple[int, Hold]:
    """Makes the run's folder, or checks that it holds this very run; returns the seed and the
    right to write there.

    ``said``: what decides the run, by name; ``asked``: the seed that the caller wants; ``own``: the
    one of a new run without. Raises FastmergeError.
    """
    from fastmerge.version import __version__

    try:
        check_own(out, HEADER_FILE, JOURNAL_FILE, GRAM_FILE, MODEL_FOLDER)
        if entries(out) and not os.path.isfile(out / HEADER_FILE):
            raise OutputError(f"{out}: is not empty; give a new folder")
        hold = Hold(out)
        try:
            return _prepare(out, {"fastmerge": __version__, **said}, asked, own, resume), hold
        except BaseException:
            hold.close()
            raise
    except OSError as error:
        raise explain(error, out) from error


def _prepare(out: Path, header: dict[str, Any], asked: int | None, own: int, resume: bool) -> int:
    path = out / HEADER_FILE
    _check_kind(out, path, header)
    if not resume and _holds_no_result(out):
        # It failed before its first result: who repeats it, mended or not, wants it to run. With
        # its seed where it is the same run, which may be at work.
        resume = asked is None and _recorded(path) == header
    elif os.path.isfile(path) and not resume:
        raise OutputError(
            f"{out}: holds a run already; use {argument('resume', True)}, or another folder"
        )
    if os.path.isfile(path) and resume:
        try:
            found = read_object(path)
        except ModelError:
            found = {}
        recorded = found.pop("seed", None)
        if not header.keys() >= found.keys() or not (
            is_whole(recorded) and 0 <= recorded < 1 << 64
        ):
            raise OutputError(f"{path}: is damaged; give a new folder")
        if found != header:
            what = next(key for key in header if key not in found or found[key] != header[key])
            raise OutputError(
                f"{out}: was begun with other '{what}'; use the same "
                f"{_named(header)} and models, or another folder"
            )
        if asked is not None and asked != recorded:
            raise OutputError(f"{out}: was begun with seed {recorded}, not {asked}")
        return int(recorded)
    seed = own if asked is None else asked
    write_own(path, json.dumps({**header, "seed": seed}, indent=1) + "\n")
    return seed


# What begins a run's folder, by the key that its header has for its file.
_KINDS = {
    "search": ("a search", "fastmerge search"),
    "schedule": ("a schedule's run", "fastmerge retrograde"),
}


def _check_kind(out: Path, path: Path, header: Mapping[str, Any]) -> None:
    """Raises OutputError where the folder is that of another command's run."""
    found = (_recorded(path) if os.path.isfile(path) else None) or {}
    own = _named(header)
    other = next((kind for kind in _KINDS if kind in found and own not in found), None)
    if other is not None:
        what, command = _KINDS[other]
        raise OutputError(
            f"{out}: holds {what}, not {_KINDS[own][0]}; give another folder, or go on with it "
            f"by `{command}` and its own file"
        )


def _named(header: Mapping[str, Any]) -> str:
    return next(key for key in header if key not in ("fastmerge", "inputs"))


def _holds_no_result(out: Path) -> bool:
    """Whether the folder holds the beginning of a run and nothing that one has measured."""
    if not os.path.isfile(out / HEADER_FILE):
        return False
    journal = out / JOURNAL_FILE
    known = {HEADER_FILE, GRAM_FILE, JOURNAL_FILE, SCORED}
    return entries(out) <= known and not Journal(journal).holds("score:")


def _recorded(path: Path) -> dict[str, Any] | None:
    """A run's header without its seed; None where it is damaged."""
    try:
        return {key: value for key, value in read_object(path).items() if key != "seed"}
    except ModelError:
        return None
