"""A model folder to an object store: merged on this machine's disk, then uploaded, index last.
Where the disk has no room for it, its weight files go one by one while it is merged.

A store has no rename. What makes a model load, its index or its one weight file, is written when
everything else is there, so that nothing loads before all does; with ``overwrite`` it is the first
that is removed. An object appears when its last part has arrived, whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import re
import stat
import tempfile
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fastmerge.errors import OutputError, UnsupportedError, argument
from fastmerge.limits import MAX_HEADER_BYTES
from fastmerge.models.folder import INDEX, SINGLE
from fastmerge.models.header import as_value, read_object
from fastmerge.models.side_files import LINEAGE_FILE
from fastmerge.models.store import (
    EmptyError,
    asked,
    check_plain,
    check_stays,
    library,
    open_store,
)
from fastmerge.output.disk import facts_of, remove_tree, write_file
from fastmerge.output.journal import locked
from fastmerge.output.place import explain
from fastmerge.output.shipping import Destination
from fastmerge.output.working import beside, check_ours, is_loose

_URL = re.compile(r"([a-z][a-z0-9]*):/{1,2}(?=[^/])(.+)")  # a Path has made one slash of two
_TAKES = ("s3", "gs", "az", "abfs", "abfss")
# S3 takes 10 000 parts; 8 at a time are 64 MiB of memory, of parts of an object above 75 GB fewer.
_PART_BYTES, _MOST_PARTS, _PARTS_AT_A_TIME, _SENDING_BYTES = 8 << 20, 9000, 8, 64 << 20
_MERGED, _SENT, _LOCK, _GONE = ".merged.json", ".sent.jsonl", ".lock", ".gone"


def store_url(out: str | os.PathLike[str]) -> str | None:
    """The URL that ``out`` is, None for a path; OutputError for one that cannot be written."""
    found = _URL.fullmatch(os.fspath(out))
    if found is None or (found[1] not in _TAKES and found[1] not in ("https", "http", "hf")):
        return None
    url = f"{found[1]}://{found[2]}".rstrip("/")
    check_plain(url, OutputError)
    if found[1] not in _TAKES:
        raise UnsupportedError(
            f"{url}: cannot be written to; give a folder, or a URL of {', '.join(_TAKES[:3])}"
        )
    return url


class _Sent(NamedTuple):
    """An object that was sent: its ETag, "" while it is on its way; by which job; its bytes."""

    tag: str
    job: str
    size: int


_NOT_SENT = _Sent("", "", -1)


class Upload:
    """The prefix of a store that takes a model; ``folder`` is where it is merged before. Use it as
    a context manager.

    A file beside the folder says what was sent, so that the same command goes on where it was, and
    knows its own objects from those of others.
    """

    def __init__(self, url: str, *, overwrite: bool = False) -> None:
        """Raises OutputError where the store cannot be reached or, without ``overwrite``, has
        anything below the prefix that no earlier run of this sent.
        """
        self.url, self._overwrite = url, overwrite
        self._store = open_store(url, OutputError, writing=True)
        check_stays(url, OutputError)
        # By the URL, so that the same command goes on where it was.
        name = f"fastmerge-{os.geteuid()}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        self._place = Path(tempfile.gettempdir(), name)
        self.folder = self._place / url.rpartition("/")[2]
        self._parts = beside(self.folder, "parts")
        self._lock = -1
        self._retired = False  # what was there before is no model any more
        try:
            self._make_place()
        except OSError as error:
            raise explain(error, self._place) from error
        try:
            self._sent, self._stale = self._read_sent()
            self._check()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise explain(error, self._place) from error
            raise

    def _make_place(self) -> None:
        status = os.stat(self._place.parent)
        if is_loose(status) and not status.st_mode & stat.S_ISVTX:
            raise OutputError(
                f"{self._place.parent}: others may write there and rename what is ours (no sticky "
                "bit); set TMPDIR to another folder"
            )
        with suppress(FileExistsError):
            self._place.mkdir(mode=0o700)
        status = os.lstat(self._place)
        check_ours(self._place, status, folder=True)
        if is_loose(status):
            raise OutputError(f"{self._place}: other users could write to it; remove it")

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(error, OSError):
            raise explain(error, self._place) from error

    def close(self) -> None:
        """Keeps what the next run goes on with."""
        if self._lock >= 0:
            os.close(self._lock)
        with suppress(OSError):  # there is something to keep
            self._place.rmdir()

    def lock(self) -> None:
        """Raises OutputError where another process of this machine is merging or sending to it."""
        try:
            self._make_place()  # again: one that had the lock until now removes it at its end
            self._lock = locked(self._place / _LOCK)
            self._sent, self._stale = self._read_sent()
        except BlockingIOError:
            raise OutputError(
                f"{self.url}: another merge or finish here is at work on it; wait for it"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            # Without locks, as parts may be: two that finish send the same bytes.

    def check_inputs(self, places: Iterable[str]) -> None:
        """Raises OutputError where one of these URLs, which are read, is the prefix itself."""
        for place in places:
            if _normal(place) == _normal(self.url):
                raise OutputError(f"{self.url}: the output would replace the input {place}")

    def check_whole(self) -> None:
        """Raises OutputError where it is being merged in parts."""
        if os.path.lexists(self._parts):
            raise OutputError(
                f"{self.url}: is being merged in parts; end that with `fastmerge finish {self.url}`"
                f", or remove {self._parts} if nobody works on it"
            )

    def check_part(self) -> None:
        """Raises OutputError where a model waits to be sent, which parts would replace."""
        if self.folder.is_dir() and not self._overwrite and not os.path.lexists(self._parts):
            raise OutputError(
                f"{self.url}: a whole merge waits in {self.folder} to be sent there; `fastmerge "
                f"finish {self.url}` sends it, {argument('overwrite', True)} replaces it"
            )

    def is_joined(self) -> bool:
        """Whether there is no part to join, but a whole model to send. Raises OutputError where
        there is neither.
        """
        if os.path.lexists(self._parts):
            return False
        if not self.folder.is_dir():
            raise OutputError(
                f"{self.url}: no part of it lies in {self._place}: nothing to finish; parts and "
                "finish need the same TMPDIR"
            )
        return True

    def merged(self, key: str) -> dict[str, Any] | None:
        """What an earlier run of the job ``key`` said of the folder, which it could not upload;
        None, and no folder, where there is none. Raises OutputError where another job has sent some
        of its own.
        """
        note = self._place / _MERGED
        if note.is_file() and self.folder.is_dir():
            try:
                said = as_value(note.read_bytes())
            except ValueError:  # the disk was full: the merge is made again
                said = {}
            if isinstance(said, dict) and said.get("key") == key and "report" in said:
                found: dict[str, Any] = said["report"]
                return found
        self._check(of=key)
        note.unlink(missing_ok=True)
        if self.folder.is_dir():
            self._remove_folder()
        return None

    def note(self, key: str, report: Mapping[str, Any]) -> None:
        """The folder is whole."""
        (self._place / _MERGED).unlink(missing_ok=True)
        write_file(self._place / _MERGED, json.dumps({"key": key, "report": report}).encode())

    def send(self) -> None:
        """Uploads the folder but for the weight files that were sent before, and removes it. Raises
        OutputError; then it is kept.
        """
        try:
            self._send()
        except FileNotFoundError as error:
            raise OutputError(
                f"{self.url}: {error.filename or self.folder} is gone, which was to be sent; run "
                "again"
            ) from error

    def _send(self) -> None:
        here = {
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        }
        last = INDEX if INDEX in here else SINGLE
        gone = self._weights(here) - here
        names = here | gone
        lineage = self.folder / LINEAGE_FILE
        job = facts_of(lineage)["sha256"] if LINEAGE_FILE in names else "unknown"
        before = self._check(of=job, but=gone)
        there = {name: tag for name, tag in before.items() if self._is_sent(name, tag, job)}
        for name in gone:
            there[name] = self._sent.get(name, _NOT_SENT).tag
            if before.get(name, "") != there[name] or not there[name]:
                raise OutputError(
                    f"{self.url}/{name}: was sent, and is not there or is another now; merge again "
                    f"({argument('fresh', True)})"
                )
        if there.keys() != names:
            there.pop(last, None)  # it comes after all others
        self._retire(before, there)
        # Weights first: what is small is only there when they are.
        ordered = sorted(names, key=lambda name: (name == last, not name.endswith(".safetensors")))
        tags: dict[str, str] = {}
        for name in ordered:
            if name == last:
                self._check_sent(tags)
            if name not in there:
                size = (self.folder / name).stat().st_size
                self._say_sent(name, _Sent("", job, size))
                there[name] = self._put(name)
                self._say_sent(name, _Sent(there[name], job, size))
            tags[name] = there[name]
        try:
            self._check_sent(tags)
        except OutputError:
            self._take_back(last, tags[last])
            raise
        for name in self._stale:
            if name in before and name not in names:
                self._delete(name)
        self._remove_folder()
        for kept in (_MERGED, _LOCK, _SENT):  # what was sent last of all: it says whose that is
            (self._place / kept).unlink(missing_ok=True)

    def _remove_folder(self) -> None:
        """At once, by its name: a kill leaves no half of it that would count as whole."""
        gone = self._place / _GONE
        if os.path.lexists(gone):
            remove_tree(gone)
        self.folder.rename(gone)
        remove_tree(gone)

    def destination(self, key: str) -> Destination:
        """Where the weight files of the job ``key`` go before the folder is whole."""
        return _ByFile(self, key)

    def sent_of(self, key: str) -> dict[str, int]:
        """The bytes of the weight files of the job ``key`` that are there, by name."""
        before = self._check(of=key)
        return {
            name: said.size
            for name, said in self._sent.items()
            if said.job == key and said.tag and before.get(name) == said.tag
        }

    def send_file(self, path: Path, key: str) -> None:
        """Uploads one weight file of the job ``key``. Raises OutputError."""
        if not self._retired:
            self._retire(self._check(of=key), {})
        size = path.stat().st_size
        self._say_sent(path.name, _Sent("", key, size))
        self._say_sent(path.name, _Sent(self._put_file(path.name, path), key, size))

    def _weights(self, here: Collection[str]) -> set[str]:
        """The weight files that the index names."""
        if INDEX not in here:
            return set()
        index = read_object(self.folder / INDEX, max_bytes=MAX_HEADER_BYTES)
        return set(index.get("weight_map", {}).values())

    def _retire(self, before: Mapping[str, str], there: Collection[str]) -> None:
        """What is there is no model any more; what of it is not written again goes at last."""
        given_up = [
            n for n, tag in before.items() if tag and self._sent.get(n, _NOT_SENT).tag == tag
        ]
        old = dict.fromkeys([*self._written(before), *given_up])
        self._stale += [name for name in old if name not in there and name not in self._stale]
        self._say([*self._stale])
        for name in (INDEX, SINGLE):
            if name in before and name not in there:
                self._delete(name)
        self._retired = True

    # --- what was sent ---

    def _say(self, said: Any) -> None:
        with (self._place / _SENT).open("a") as file:
            # On a line of its own whatever the last run could write of its last.
            file.write("\n" + json.dumps(said) + "\n")

    def _say_sent(self, name: str, said: _Sent) -> None:
        self._say({"name": name, **said._asdict()})
        self._sent[name] = said

    def _read_sent(self) -> tuple[dict[str, _Sent], list[str]]:
        """What was sent, by name; what is to go at last."""
        sent: dict[str, _Sent] = {}
        stale: list[str] = []
        path = self._place / _SENT
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                said = as_value(line)
                if isinstance(said, list):
                    stale = [name for name in said if isinstance(name, str)]
                else:
                    found = _Sent(str(said["tag"]), str(said["job"]), int(said["size"]))
                    sent[str(said["name"])] = found
            # Empty, or the disk was full: what it would say is not known.
            except (ValueError, LookupError, TypeError):
                continue
        return sent, stale

    def _is_sent(self, name: str, tag: str, job: str) -> bool:
        """Whether the object is the one that this job has sent."""
        return bool(tag) and self._sent.get(name, _NOT_SENT)[:2] == (tag, job)

    def _is_ours(self, name: str, tag: str, size: int, job: str | None) -> bool:
        """Whether an earlier run (of ``job``, if given) wrote the object, or was about to."""
        said = self._sent.get(name, _NOT_SENT)
        if not said.job or (job is not None and said.job != job):
            return False
        return said.tag == tag if said.tag else said.size == size

    # --- requests ---

    def _put(self, name: str) -> str:
        return self._put_file(name, self.folder / name)

    def _put_file(self, name: str, path: Path) -> str:
        size = path.stat().st_size
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))
        at_a_time = max(1, min(_PARTS_AT_A_TIME, _SENDING_BYTES // part))
        put = self._asked(
            name,
            lambda: library().put(
                self._store, name, path, chunk_size=part, max_concurrency=at_a_time
            ),
        )
        return _tag(put)

    def _check_sent(self, tags: Mapping[str, str]) -> None:
        """Raises OutputError where an object is not the one that was written."""
        for name, tag in tags.items():
            size = self._sent[name].size
            try:
                meta = self._asked(name, lambda name=name: library().head(self._store, name))
            except FileNotFoundError:
                meta = {"size": -1}
            if meta["size"] != size or _tag(meta) not in ("", tag):
                raise OutputError(
                    f"{self.url}/{name}: somebody else wrote it meanwhile; nothing there loads "
                    "yet: run again when nobody writes to that prefix"
                )

    def _take_back(self, last: str, tag: str) -> None:
        """Removes what makes a model of the others, if it is still ours: they no longer are."""
        with suppress(FileNotFoundError):
            meta = self._asked(last, lambda: library().head(self._store, last))
            if _tag(meta) == tag:
                self._delete(last)

    def _check(self, of: str | None = None, but: Collection[str] = ()) -> dict[str, str]:
        """What is below the prefix, and its ETags; OutputError where anything is that may not be.
        An earlier run's own may; of the job ``of`` alone, if given, ``but`` those.
        """

        def listed() -> list[Mapping[str, Any]]:
            return [entry for batch in library().list(self._store) for entry in batch]

        try:
            found = asked(self.url, listed, writing=True)
        except FileNotFoundError:
            return {}
        others = [
            entry["path"]
            for entry in found
            if entry["path"] not in but
            and not self._is_ours(entry["path"], _tag(entry), entry["size"], of)
        ]
        if others and not self._overwrite:
            raise OutputError(
                f"{self.url}: holds {len(others)} objects already; choose another prefix or add "
                f"{argument('overwrite', True)}"
            )
        names = {str(entry["path"]) for entry in found}
        if others and not self._sent and not names & {INDEX, SINGLE, "config.json", LINEAGE_FILE}:
            raise OutputError(
                f"{self.url}: not a model, so {argument('overwrite', True)} will not replace it"
            )
        return {str(entry["path"]): _tag(entry) for entry in found}

    def _written(self, before: Mapping[str, str]) -> list[str]:
        """Of what is there, what the merge that made it says that it wrote."""
        if LINEAGE_FILE not in before:
            return []

        def read() -> bytes:
            options = {"range": (0, MAX_HEADER_BYTES)}
            return bytes(library().get(self._store, LINEAGE_FILE, options=options).bytes())

        try:
            got = self._asked(LINEAGE_FILE, read, ranged=True)
            files = as_value(got).get("files")
        # Damaged: then nothing is known of what was written.
        except (EmptyError, ValueError, AttributeError):
            return []
        listed = files if isinstance(files, list) else []
        return [name for name in listed if isinstance(name, str) and name in before]

    def _delete(self, name: str) -> None:
        self._asked(name, lambda: library().delete(self._store, name))

    def _asked(self, name: str, ask: Any, *, ranged: bool = False) -> Any:
        return asked(f"{self.url}/{name}", ask, writing=True, ranged=ranged)


class _ByFile:
    """Takes the weight files of one job."""

    def __init__(self, upload: Upload, key: str) -> None:
        self._upload, self._key = upload, key

    def sent(self) -> Mapping[str, int]:
        return self._upload.sent_of(self._key)

    def send(self, path: Path) -> None:
        self._upload.send_file(path, self._key)


def _normal(url: str) -> str:
    """As the store reads it: of two that differ in slashes and dots alone the same."""
    scheme, _, path = url.partition("://")
    return f"{scheme}://{posixpath.normpath(path)}"


def _tag(meta: Mapping[str, Any]) -> str:
    """An object's ETag, which some stores quote in some answers alone; "" where there is none."""
    return str(meta.get("e_tag") or "").strip('"')
