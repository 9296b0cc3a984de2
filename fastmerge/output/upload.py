"""A model folder to an object store: merged on this machine's disk, then uploaded, index last.

A store has no rename. What makes a model load, its index or its one weight file, is written when
everything else is there, so that nothing loads before all does; with ``overwrite`` it is the first
that is removed. An object appears when its last part has arrived, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmerge.errors import OutputError, UnsupportedError, argument
from fastmerge.limits import MAX_HEADER_BYTES
from fastmerge.models.folder import INDEX, SINGLE
from fastmerge.models.side_files import LINEAGE_FILE
from fastmerge.models.store import asked, check_plain, check_stays, library, open_store
from fastmerge.output.disk import write_file
from fastmerge.output.working import check_ours, is_loose

_URL = re.compile(r"([a-z][a-z0-9]*):/{1,2}(?=[^/])(.+)")  # a Path has made one slash of two
_TAKES = ("s3", "gs", "az", "abfs", "abfss")
# S3 takes 10 000 parts; 8 at a time are 64 MiB of memory.
_PART_BYTES, _MOST_PARTS, _PARTS_AT_A_TIME = 8 << 20, 9000, 8
_MERGED = "merged.json"


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


class Upload:
    """The prefix of a store that takes a model; ``folder`` is where it is merged before."""

    def __init__(self, url: str, *, overwrite: bool = False) -> None:
        """Raises OutputError where the store cannot be reached or, without ``overwrite``, has
        anything below the prefix.
        """
        self.url, self._overwrite = url, overwrite
        self._store = open_store(url, OutputError)
        check_stays(url, OutputError)
        self._check()
        # By the URL, so that the same command goes on where it was.
        name = f"fastmerge-{os.geteuid()}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        self._place = Path(tempfile.gettempdir(), name)
        self._place.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(self._place)
        check_ours(self._place, status, folder=True)
        if is_loose(status):
            raise OutputError(f"{self._place}: other users could write to it; remove it")
        self.folder = self._place / url.rpartition("/")[2]

    def merged(self, key: str) -> dict[str, Any] | None:
        """What an earlier run of the job ``key`` said of the folder, which it could not upload;
        None, and no folder, where there is none.
        """
        note = self._place / _MERGED
        if note.is_file() and self.folder.is_dir():
            said = json.loads(note.read_bytes())
            if said["key"] == key:
                found: dict[str, Any] = said["report"]
                return found
        note.unlink(missing_ok=True)
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        return None

    def note(self, key: str, report: Mapping[str, Any]) -> None:
        """The folder is whole."""
        (self._place / _MERGED).unlink(missing_ok=True)
        write_file(self._place / _MERGED, json.dumps({"key": key, "report": report}).encode())

    def send(self) -> None:
        """Uploads the folder, and removes it. Raises OutputError; then it is kept."""
        names = sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        )
        last = INDEX if INDEX in names else SINGLE
        before = self._check()
        stale = [name for name in self._written(before) if name not in names]
        for name in (INDEX, SINGLE):
            if name in before:
                self._asked(name, lambda name=name: library().delete(self._store, name))
        # Weights first: what is small is only there when they are.
        ordered = sorted(names, key=lambda name: (name == last, not name.endswith(".safetensors")))
        tags: dict[str, str] = {}
        for name in ordered:
            if name == last:
                self._check_sent(tags)
            tags[name] = self._put(name)
        self._check_sent(tags)
        for name in stale:
            self._asked(name, lambda name=name: library().delete(self._store, name))
        shutil.rmtree(self._place)

    # --- requests ---

    def _put(self, name: str) -> str:
        path = self.folder / name
        size = path.stat().st_size
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))
        put = self._asked(
            name,
            lambda: library().put(
                self._store, name, path, chunk_size=part, max_concurrency=_PARTS_AT_A_TIME
            ),
        )
        return str(put.get("e_tag"))

    def _check_sent(self, tags: Mapping[str, str]) -> None:
        """Raises OutputError where an object is not the one that was written."""
        for name, tag in tags.items():
            size = (self.folder / name).stat().st_size
            try:
                meta = self._asked(name, lambda name=name: library().head(self._store, name))
            except FileNotFoundError:
                meta = {"size": -1, "e_tag": None}
            if meta["size"] != size or (meta.get("e_tag") and str(meta["e_tag"]) != tag):
                raise OutputError(
                    f"{self.url}/{name}: somebody else wrote it meanwhile; nothing there loads "
                    "yet: run again when nobody writes to that prefix"
                )

    def _check(self) -> set[str]:
        """What is below the prefix; OutputError where anything is that may not be."""

        def names() -> set[str]:
            return {str(entry["path"]) for batch in library().list(self._store) for entry in batch}

        try:
            found = asked(self.url, names, writing=True)
        except FileNotFoundError:
            return set()
        if found and not self._overwrite:
            raise OutputError(
                f"{self.url}: holds {len(found)} objects already; choose another prefix or add "
                f"{argument('overwrite', True)}"
            )
        if found and not found & {INDEX, SINGLE, "config.json", LINEAGE_FILE}:
            raise OutputError(
                f"{self.url}: not a model, so {argument('overwrite', True)} will not replace it"
            )
        return found

    def _written(self, before: set[str]) -> list[str]:
        """Of what is there, what the merge that made it says that it wrote."""
        if LINEAGE_FILE not in before:
            return []
        got = self._asked(
            LINEAGE_FILE,
            lambda: (
                library()
                .get(self._store, LINEAGE_FILE, options={"range": (0, MAX_HEADER_BYTES)})
                .bytes()
            ),
        )
        try:
            files = json.loads(bytes(got)).get("files")
        # Damaged: then nothing is known of what was written.
        except (ValueError, AttributeError, RecursionError):
            return []
        listed = files if isinstance(files, list) else []
        return [name for name in listed if isinstance(name, str) and name in before]

    def _asked(self, name: str, ask: Any) -> Any:
        return asked(f"{self.url}/{name}", ask, writing=True)
