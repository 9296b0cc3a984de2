"""The floor: every input byte is read once, and as many bytes written as the output has, with
direct I/O.

A child process: ``python -m fastmerge.bench.floor OUT BYTES_OUT THREADS warm|cold INPUT...`` prints
one JSON object. `seconds` is the serial floor: one thread reads (by pread into a small buffer and,
where nothing waits for a disk, by touching a mapping; the faster one counts), then writes.
`overlapped` is the slower of reading, by any number of threads, and writing: what a program would
take that does both at once.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastmerge.bench.pagecache import evict
from fastmerge.bench.process import Run, measure

READ_BYTES = 1 << 20  # stays in the second-level cache
DIRECT_BYTES = 8 << 20


def read_by_pread(paths: Sequence[Path]) -> None:
    for path in paths:
        _read(path, 0, path.stat().st_size, READ_BYTES, 0)


def read_by_mapping(paths: Sequence[Path]) -> None:
    for path in paths:
        size = path.stat().st_size
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        with open(path, "rb") as stream:
            pages = mmap.mmap(stream.fileno(), size, flags, mmap.PROT_READ)
        words = np.frombuffer(pages, np.uint64, size // 8)
        for begin in range(0, words.size, READ_BYTES):
            np.bitwise_or.reduce(words[begin : begin + READ_BYTES])


def read_by_threads(paths: Sequence[Path], threads: int, flags: int = 0) -> None:
    """Each its share of every file; with O_DIRECT past the page cache."""
    step = DIRECT_BYTES if flags else READ_BYTES
    spans = []
    for path in paths:
        size = path.stat().st_size
        share = -(-size // (threads * step)) * step  # direct I/O begins at whole blocks
        spans += [
            (path, begin, min(begin + share, size), step, flags) for begin in range(0, size, share)
        ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda span: _read(*span), spans))


def _read(path: Path, begin: int, end: int, step: int, flags: int) -> None:
    buffer = mmap.mmap(-1, step)  # page-aligned, as direct I/O wants it
    file = os.open(path, os.O_RDONLY | flags)
    try:
        while begin < end and (got := os.preadv(file, [buffer], begin)):
            begin += got
    finally:
        os.close(file)


def write(path: Path, size: int) -> bool:
    """Writes ``size`` bytes to a new file and fsyncs; returns whether direct I/O was possible."""
    buffer = mmap.mmap(-1, DIRECT_BYTES)
    buffer.write(os.urandom(4096) * (DIRECT_BYTES // 4096))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        file = os.open(path, flags | os.O_DIRECT)
        direct = True
    except OSError:  # tmpfs and some network file systems have no direct I/O
        file = os.open(path, flags)
        direct = False
    try:
        os.posix_fallocate(file, 0, size)
        for offset in range(0, size, DIRECT_BYTES):
            os.pwrite(file, buffer, offset)
        os.fsync(file)
    finally:
        os.close(file)
    return direct


def run_floor(
    files: Sequence[Path], out: Path, bytes_out: int, *, threads: int = 1, cold: bool = False
) -> Run:
    """The floor of weight files that are warm, or are made cold before each reading, in a process
    of its own.
    """
    command = [sys.executable, "-m", "fastmerge.bench.floor", out, bytes_out, threads]
    words = [str(word) for word in (*command, "cold" if cold else "warm", *files)]
    usage = measure(words, folder=out.parent)
    detail = json.loads(usage.stdout)
    return usage.run.with_seconds(detail["seconds"], detail)


def main() -> None:
    out, size, count, state, *names = sys.argv[1:]
    paths, threads = [Path(name) for name in names], int(count)

    def timed(work: Callable[[], object]) -> float:
        if state == "cold":
            evict(paths)
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    alone = {"read_by_pread": timed(lambda: read_by_pread(paths))}
    if state != "cold":
        alone["read_by_mapping"] = timed(lambda: read_by_mapping(paths))
    together = {}
    if threads > 1:
        together["read_by_threads"] = timed(lambda: read_by_threads(paths, threads))
    began = time.perf_counter()
    direct = write(Path(out), int(size))
    seconds = time.perf_counter() - began
    every = {**alone, **together}
    found = {
        "read": every,
        "write": seconds,
        "direct": direct,
        "seconds": min(alone.values()) + seconds,
        "overlapped": max(min(every.values()), seconds),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
