"""Who works on a part: a file that one process alone can have made, and what it has finished.

Parts run on several machines in a folder that they share, where locks may be missing or each
machine's own. So a claim is a file made with O_EXCL, which one process wins wherever it runs. The
runs of one part are numbered, and the last one counts: to take over is to make the next file, which
again one process wins. A run that is over says so in its file; of one that was killed, this machine
knows by its process's id and start; of one elsewhere, only that its file no longer grows. Each
machine measures that with its own clock, and no two clocks are ever compared.

A run that was taken for dead and is not finds the next file, and stops. It may be in the middle of
a write then, which is why no two runs write into the same folder (`fastmerge.output.part`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmerge.errors import OutputError, ResourceError
from fastmerge.limits import MAX_JOURNAL_BYTES
from fastmerge.models.header import as_value
from fastmerge.output.journal import boot_id, is_entry
from fastmerge.output.names import take_name
from fastmerge.output.working import WorkingFolder

BEAT_SECONDS = 5.0  # between the signs of life of a run
WATCH_SECONDS = 60.0  # without one, a run on another machine counts as dead
_LOOK_SECONDS = 0.5
_SUFFIX = ".run"
_RUN = re.compile(r"([^.]+)\.(\d{4,9})\.run", re.ASCII)


class AtWorkError(OutputError):
    """Another run of the same is at work."""


@dataclass
class Record:
    """What the file of one run says."""

    number: int
    head: Mapping[str, Any] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)  # finished tensors
    facts: dict[str, Any] = field(default_factory=dict)  # the last word on anything else

    @property
    def over(self) -> bool:
        """Whether the run itself said that it writes no more."""
        return "done" in self.facts or "ended" in self.facts

    @property
    def who(self) -> str:
        return f"process {self.head.get('pid', '?')} on {self.head.get('host', '?')}"


def records(folder: WorkingFolder, name: str, files: Iterable[str] | None = None) -> list[Record]:
    """The runs of ``name``, the first one first; ``files``: of the folder, if they are known.
    Raises OutputError, OSError.
    """
    there = os.listdir(folder.inside) if files is None else files
    found = map(_RUN.fullmatch, there)
    numbers = sorted(int(run[2]) for run in found if run and run[1] == name)
    return [_read(folder, name, number) for number in numbers]


def file_of(name: str, number: int) -> str:
    return f"{name}.{number:04d}{_SUFFIX}"


def _read(folder: WorkingFolder, name: str, number: int) -> Record:
    """What can be read of a file to which another machine may be writing: whole lines."""
    file = file_of(name, number)
    folder.check(file)
    found = Record(number)
    size = size_of(folder.inside / file)
    if size > MAX_JOURNAL_BYTES:
        raise OutputError(
            f"{folder.path / file}: {size} bytes, over {MAX_JOURNAL_BYTES}; no part's: remove it "
            "and run that part again"
        )
    for line in (folder.inside / file).read_bytes().split(b"\n")[:-1]:
        try:
            said = as_value(line)
        except ValueError:  # blocks that were never written, after a power cut
            break
        if is_entry(said):
            found.entries[said[0]] = said[1]
        elif isinstance(said, dict):
            if not found.head:
                found.head = said
            else:
                found.facts |= said
    return found


def is_dead_here(record: Record) -> bool | None:
    """Whether a run is over, if that can be known at once: it said so, or was on this machine."""
    if record.over:
        return True
    here = _identity()
    if any(record.head.get(key) != here[key] for key in ("boot", "pids")):
        return None
    return _start_of(record.head.get("pid")) != record.head.get("since")


def is_dead(folder: WorkingFolder, name: str, record: Record) -> bool | None:
    """Whether a run is over for certain; None where it only has shown no sign of life, for
    `WATCH_SECONDS`. False: it is at work.
    """
    known = is_dead_here(record)
    if known is not None:
        return known
    path = folder.inside / file_of(name, record.number)
    size, until = size_of(path), time.monotonic() + WATCH_SECONDS
    while time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
        if size_of(path) != size:
            return _read(folder, name, record.number).over
    return None


def size_of(path: Path) -> int:
    # An open asks the server of a network file system, where a stat may give what is remembered.
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


def _identity() -> dict[str, Any]:
    return {
        "host": os.uname().nodename,
        "boot": boot_id(),
        "pids": os.readlink("/proc/self/ns/pid"),  # a container's ids are its own
        "pid": os.getpid(),
        "since": _start_of(os.getpid()),
    }


def _start_of(pid: Any) -> str | None:
    """When the process began, in ticks of this boot; None where there is none, or a zombie."""
    try:
        text = Path(f"/proc/{int(pid)}/stat").read_text()
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    words = text.rpartition(")")[2].split()  # its name may hold spaces: from the state on
    return None if words[0] in "ZX" else words[19]


class Claim:
    """A run of ``name`` in ``folder``, this process's. Raises OutputError where another is at work;
    ``what`` it is, for messages. ``previous``: the runs before it.
    """

    def __init__(self, folder: WorkingFolder, name: str, what: str) -> None:
        self._folder, self._name, self._what = folder, name, what
        self.previous = records(folder, name)
        self._descriptor = -1
        self._lock = threading.Lock()
        self._fault: OSError | OutputError | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="fastmerge-beat", daemon=True)
        try:
            self._make()
            self._next = folder.inside / file_of(name, self.number + 1)
            self._thread.start()
        except RuntimeError as error:
            self.end()
            raise ResourceError(
                f"{what}: the system refuses another thread ({error}); raise ulimit -u"
            ) from error
        except BaseException:
            self.end()
            raise

    def _make(self) -> None:
        """Makes this run's file, and numbers it."""
        while True:
            number = 1
            if self.previous:
                last = self.previous[-1]
                if is_dead(self._folder, self._name, last) is False:
                    raise AtWorkError(f"{self._what}: is at work already ({last.who})")
                number = last.number + 1
            try:
                return self._begin(number)
            except FileExistsError:  # made since: look at it
                self._close_file()
                self.previous.append(_read(self._folder, self._name, number))

    def _begin(self, number: int) -> None:
        """The file has its name from the moment on when it says whose it is: for one that is empty,
        after a kill in between, the next run would have to wait, as it could be anybody's.
        """
        path = self._folder.inside / file_of(self._name, number)
        unnamed = path.with_suffix(f".{secrets.token_hex(8)}.new")
        head = json.dumps({"run": number, **_identity()})
        self.number = number
        self._open(unnamed)
        try:
            self._append([head], sync=True)
            if take_name(unnamed, path):
                return
        finally:
            unnamed.unlink(missing_ok=True)
        self._close_file()  # where no name can be taken so: the name first, then the words
        self._open(path)
        self._append([head], sync=True)

    def _open(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o600)

    def add(self, results: Mapping[str, dict[str, Any]]) -> None:
        """Notes tensors that are in their files. Raises OutputError where another run took over."""
        if self._fault is not None:
            raise self._fault
        self._append([json.dumps(item) for item in results.items()])

    def say(self, **facts: Any) -> None:
        """Notes what else is to be known, on the disk (fsync) before it returns."""
        self._append([json.dumps(facts)], sync=True)

    def check(self) -> None:
        """Raises OutputError where another run took over: this one is to stop."""
        if os.path.lexists(self._next):
            self._fault = OutputError(
                f"{self._what}: another run took over, as this one gave no sign of life"
            )
        if self._fault is not None:
            raise self._fault

    def end(self) -> None:
        """This run writes no more."""
        with suppress(OSError):  # then the next one finds out by itself
            self.say(ended=True)
        self.close()

    def close(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._close_file()

    def _close_file(self) -> None:
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):  # what has to be there was synced by `say`
                os.close(descriptor)

    def _beat(self) -> None:
        while not self._stopping.wait(BEAT_SECONDS):
            try:
                self.say(beat=time.monotonic_ns())
                self.check()
            except (OSError, OutputError) as error:
                self._fault = error
                return

    def _append(self, lines: Iterable[str], *, sync: bool = False) -> None:
        data = "".join(line + "\n" for line in lines).encode()
        try:
            with self._lock:
                descriptor = self._descriptor
                while data and descriptor >= 0:
                    data = data[os.write(descriptor, data) :]
                if sync and descriptor >= 0:
                    os.fsync(descriptor)
        except OSError as error:
            name = str(self._folder.path / file_of(self._name, self.number))
            raise OSError(error.errno, error.strerror, name) from error
