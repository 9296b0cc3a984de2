"""Runs one child process and says how long it took and how much memory it held; describes the
machine."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Usage:
    """``seconds`` from start to exit; ``peak_rss_bytes`` counts mapped file pages,
    ``peak_anonymous_bytes`` does not."""

    seconds: float
    cpu_seconds: float  # user and system, all threads: what a busy machine does not stretch
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    stdout: str


def measure(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Usage:
    """Runs ``command`` to its end; raises RuntimeError with its output when it fails.

    Anonymous memory is sampled every 20 ms (RssAnon; the kernel keeps no high-water mark of it);
    the resident peak is the kernel's.
    """
    began = time.perf_counter()
    child = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    anonymous = 0
    over = threading.Event()

    def sample() -> None:
        nonlocal anonymous
        while not over.wait(_SAMPLE_SECONDS):
            anonymous = max(anonymous, _status_bytes(child.pid, "RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    streams: dict[str, str] = {}

    def drain(name: str) -> None:
        streams[name] = getattr(child, name).read()

    drains = [threading.Thread(target=drain, args=(name,)) for name in ("stdout", "stderr")]
    for thread in drains:
        thread.start()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    over.set()
    for thread in (sampler, *drains):
        thread.join()
    if child.returncode:
        said = streams["stdout"] + streams["stderr"]
        raise RuntimeError(f"{' '.join(map(str, command))} exited with {child.returncode}:\n{said}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Usage(seconds, cpu_seconds, usage.ru_maxrss * 1024, anonymous, streams["stdout"])


def _status_bytes(pid: int, key: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0  # a process about to be reaped has no memory lines


def machine(folder: Path) -> dict[str, str]:
    """What a reader needs to judge the numbers: processor, memory, file system, versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("fastmerge", "mergekit", "torch", "numpy", "safetensors")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.0f} GiB",
        "file system": _file_system(folder),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _file_system(folder: Path) -> str:
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind = line.split()[:3]
        if (f"{folder.resolve()}/").startswith(point.rstrip("/") + "/") and len(point) >= len(
            best[0]
        ):
            best = (point, kind)
    return best[1]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
