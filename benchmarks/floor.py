"""The floor: one thread reads every input byte once, then writes as many bytes as the output has
with direct I/O.

Run as a child process: floor.py OUT BYTES_OUT INPUT... prints one JSON object. Both ways of reading
are timed (pread into a small buffer, and touching a mapping) and the faster one is the floor's.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

READ_BYTES = 1 << 20  # stays in the second-level cache
WRITE_BYTES = 8 << 20


def read_by_pread(path: Path) -> None:
    buffer = mmap.mmap(-1, READ_BYTES)
    file = os.open(path, os.O_RDONLY)
    offset = 0
    while got := os.preadv(file, [buffer], offset):
        offset += got
    os.close(file)


def read_by_mapping(path: Path) -> None:
    with open(path, "rb") as stream:
        pages = mmap.mmap(stream.fileno(), 0, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
    words = np.frombuffer(pages, np.uint64, len(pages) // 8)
    for begin in range(0, words.size, READ_BYTES):
        np.bitwise_or.reduce(words[begin : begin + READ_BYTES])


def write(path: Path, size: int) -> bool:
    """Writes ``size`` bytes to a new file and fsyncs; returns whether direct I/O was possible."""
    buffer = mmap.mmap(-1, WRITE_BYTES)  # a mapping is page-aligned, as direct I/O wants it
    buffer.write(os.urandom(4096) * (WRITE_BYTES // 4096))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        file = os.open(path, flags | os.O_DIRECT)
        direct = True
    except OSError:  # tmpfs and some network file systems have no direct I/O
        file = os.open(path, flags)
        direct = False
    os.posix_fallocate(file, 0, size)
    for offset in range(0, size, WRITE_BYTES):
        os.pwrite(file, buffer, offset)
    os.fsync(file)
    os.close(file)
    return direct


def main() -> None:
    out, bytes_out, *inputs = sys.argv[1:]

    def timed(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    read = {
        reader.__name__: timed(lambda reader=reader: [reader(Path(path)) for path in inputs])
        for reader in (read_by_pread, read_by_mapping)
    }
    began = time.perf_counter()
    direct = write(Path(out), int(bytes_out))
    seconds = time.perf_counter() - began
    report = {
        "read": read,
        "write": seconds,
        "direct": direct,
        "seconds": min(read.values()) + seconds,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
