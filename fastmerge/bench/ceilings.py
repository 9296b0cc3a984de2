"""What the machine can do at best: the ceilings that figures are shares of."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.bench import floor
from fastmerge.bench.machine import gpus
from fastmerge.bench.pagecache import HOW_COLD, evict, residency
from fastmerge.bench.process import measure
from fastmerge.bench.rows import Row, spread
from fastmerge.errors import FastmergeError
from fastmerge.units import format_bytes

Bytes = NDArray[np.uint8]
_BUFFER = 1 << 28  # of memory: more than caches hold
_PIECE = 1 << 18
ONE_THREAD = 1 << 20  # bytes that one thread copies before another has begun


def _row(name: str, how: str, nbytes: int, seconds: Sequence[float]) -> Row:
    rates = [nbytes / each / 1e9 for each in seconds]
    return {
        "name": name,
        "how": how,
        "bytes": nbytes,
        "gigabytes_per_second": spread(rates) | {"best": max(rates)},
        "runs": list(seconds),
    }


def absent(name: str, why: str) -> Row:
    """A ceiling that is not there to be measured."""
    return {"name": name, "absent": why}


def _by(threads: int) -> str:
    return f"{threads} thread{'s'[: threads != 1]}"


def copy_whole(source: Bytes, to: Bytes) -> None:
    """By one memcpy, which writes past the caches where that is much."""
    np.copyto(to, source)


def copy_in_pieces(source: Bytes, to: Bytes) -> None:
    """By memcpys of 256 KiB, which writes to the caches."""
    for begin in range(0, source.size, _PIECE):
        np.copyto(to[begin : begin + _PIECE], source[begin : begin + _PIECE])


def read(source: Bytes) -> None:
    """By BLAS's inner product of a vector of fp32 with itself: one load a vector."""
    numbers = source.view(np.float32)
    np.dot(numbers, numbers)


# The faster of them, by medians, is the ceiling.
COPIES: dict[str, Callable[[Bytes, Bytes], None]] = {
    "one memcpy": copy_whole,
    "memcpys of 256 KiB": copy_in_pieces,
}


def fastest(found: dict[str, list[float]]) -> tuple[str, list[float]]:
    """Of seconds by the way they were taken."""
    return min(found.items(), key=lambda item: spread(item[1])["median"])


def seconds_of(work: Callable[[], object], repeat: int) -> list[float]:
    """Wall seconds of each of some runs, after one for warming up."""
    work()
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found


def of_memory(threads: int, repeat: int, nbytes: int = _BUFFER) -> list[Row]:
    """Copy (bytes read and bytes written) and read."""
    source, to = (np.zeros(nbytes, np.uint8) for _ in range(2))
    source[:] = to[:] = 0  # pages of their own, not the one of zeros
    sources, tos = (np.array_split(array, threads) for array in (source, to))
    how = f"{_by(threads)}, {format_bytes(nbytes)}"
    with ThreadPoolExecutor(threads) as pool:

        def together(work: Callable[..., None], *pieces: list[Bytes]) -> Callable[[], object]:
            return lambda: list(pool.map(work, *pieces))

        way, copied = fastest(
            {
                name: seconds_of(together(work, sources, tos), repeat)
                for name, work in COPIES.items()
            }
        )
        done = seconds_of(together(read, sources), repeat)
    return [
        _row("memory copy", f"{how}, {way}; bytes read and written", 2 * nbytes, copied),
        _row("memory read", how, nbytes, done),
    ]


def of_disk(folder: Path, threads: int, repeat: int, nbytes: int) -> list[Row]:
    """Page-cache read, cold read and direct write, with a file in ``folder``."""
    path = folder / "ceiling.bin"
    how = f"a file of {format_bytes(nbytes)}"
    written, direct = [], True
    for _ in range(repeat):
        path.unlink(missing_ok=True)
        began = time.perf_counter()
        direct = floor.write(path, nbytes) and direct
        written.append(time.perf_counter() - began)
    said = "O_DIRECT" if direct else "buffered: no direct I/O on this file system"
    write = _row("direct write", f"{how}, {said}, with fsync", nbytes, written)

    def read_file() -> None:
        floor.read_by_threads([path], threads)

    read_file()
    state = residency([path])
    warm = f"{how}, {_by(threads)}, {state.share:.0%} in memory"
    if state.is_warm:
        cached = _row("page-cache read", warm, nbytes, seconds_of(read_file, repeat))
    else:
        cached = absent("page-cache read", f"the file does not stay in memory ({warm})")
    cold = _cold_read(path, threads, repeat, nbytes)
    path.unlink()
    return [cached, cold, write]


def _cold_read(path: Path, threads: int, repeat: int, nbytes: int) -> Row:
    """The fastest of the ways to read, by medians; evicted, and seen to be, before each."""
    ways: dict[str, Callable[[], None]] = {
        _by(1): lambda: floor.read_by_pread([path]),
        _by(threads): lambda: floor.read_by_threads([path], threads),
    }
    try:
        floor.read_by_threads([path], 4, os.O_DIRECT)
        ways["O_DIRECT, 4 threads"] = lambda: floor.read_by_threads([path], 4, os.O_DIRECT)
    except OSError:  # not on this file system
        pass
    found: dict[str, list[float]] = {}
    for name, way in ways.items():
        for _ in range(repeat):
            state = evict([path])
            if not state.is_cold:
                return absent("cold read", f"cannot be made cold: {state.why_not_cold}")
            began = time.perf_counter()
            way()
            found.setdefault(name, []).append(time.perf_counter() - began)
    best, seconds = fastest(found)
    return _row("cold read", f"{best}; cold by {HOW_COLD}", nbytes, seconds)


def of_devices(repeat: int) -> list[Row]:
    """Copies on the first CUDA device, and to and from it, in a process of its own."""
    names = ("device copy", "pinned copy to the device", "pinned copy from the device")
    if not gpus():
        return [absent(name, "no NVIDIA GPU") for name in names]
    if find_spec("torch") is None:
        return [absent(name, "torch is not installed") for name in names]
    try:
        usage = measure([sys.executable, "-m", "fastmerge.bench.device", str(repeat)])
    except FastmergeError as error:
        return [absent(name, str(error)) for name in names]
    found: dict[str, Any] = json.loads(usage.stdout)
    if "absent" in found:
        return [absent(name, found["absent"]) for name in names]
    return [_row(name, found["device"], found["bytes"][name], found[name]) for name in names]
