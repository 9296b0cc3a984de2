"""Runs one child process and says how long it took and how much memory it held."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastmerge.errors import ResourceError, first_sentences

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Run:
    """One process. ``seconds`` from start to exit, or what it says of itself; ``peak_rss_bytes``
    counts mapped file pages, ``peak_anonymous_bytes`` does not.
    """

    seconds: float
    cpu_seconds: float  # user and system, all threads: what a busy machine does not stretch
    peak_rss_bytes: int = 0
    peak_anonymous_bytes: int = 0
    detail: Any = None  # what it printed, as JSON

    def with_seconds(self, seconds: float, detail: Any = None) -> Run:
        return replace(self, seconds=seconds, detail=detail)


@dataclass(frozen=True)
class Usage(Run):
    """A run with its whole output."""

    stdout: str = ""

    @property
    def run(self) -> Run:
        return Run(self.seconds, self.cpu_seconds, self.peak_rss_bytes, self.peak_anonymous_bytes)


def measure(
    command: Sequence[str | Path],
    environment: Mapping[str, str] | None = None,
    *,
    folder: Path | None = None,
) -> Usage:
    """Runs ``command`` (in ``folder``, with more ``environment``) to its end; ResourceError with
    its last line when it fails. However this ends, the process is gone then.

    Memory is sampled every 20 ms: RssAnon, and the kernel's high-water mark of all that is
    resident (VmHWM). What wait4 says of the latter begins with this process's own: a child is a
    copy of it at first.
    """
    words = [str(word) for word in command]
    # With bytecode, as after an installation: to compile every module takes as long as to run it.
    own = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    child = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=own | dict(environment or {}), cwd=folder,
    )  # fmt: skip
    peaks = {"RssAnon": 0, "VmHWM": 0}
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            for key, nbytes in _status_bytes(child.pid).items():
                peaks[key] = max(peaks[key], nbytes)

    streams: dict[str, str] = {}

    def drain(name: str) -> None:
        with getattr(child, name) as stream:
            streams[name] = stream.read()

    # Of daemons: an interrupt between the lines below must not leave one that the exit waits for.
    threads = [
        threading.Thread(target=drain, args=(name,), daemon=True) for name in ("stdout", "stderr")
    ]
    threads.append(threading.Thread(target=sample, daemon=True))
    try:
        for thread in threads:
            thread.start()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()
        over.set()
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()
    if child.returncode:
        raise ResourceError(_fault(words, child.returncode, streams))
    return Usage(
        seconds, usage.ru_utime + usage.ru_stime, peaks["VmHWM"], peaks["RssAnon"],
        stdout=streams["stdout"],
    )  # fmt: skip


def _fault(words: Sequence[str], code: int, streams: dict[str, str]) -> str:
    said = (streams["stderr"].strip() or streams["stdout"].strip()).splitlines()
    last = first_sentences(said[-1], 300) if said else "it said nothing"
    what = " ".join(Path(word).name for word in words[:4])
    if code == -9:
        return f"{what} ...: was killed; is there enough memory? ({last})"
    return f"{what} ...: ended with {code}: {last}"


def _status_bytes(pid: int) -> dict[str, int]:
    """Of the process's memory; nothing of one that is about to be reaped."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if key in ("RssAnon", "VmHWM"):
            found[key] = int(rest.split()[0]) * 1024
    return found
