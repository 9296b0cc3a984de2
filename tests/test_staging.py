"""Staged output: any order, any number of threads and buffers, every byte in its place."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from fastmerge import _C

CHUNK = 16 << 10


def content(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def cuts(size: int, seed: int, largest: int) -> list[tuple[int, int]]:
    """Consecutive ranges of random lengths, three in four far below a chunk."""
    rng, ends = random.Random(seed), [0]
    while ends[-1] < size:
        step = rng.randint(1, rng.choice((64, 64, 64, largest)))
        ends.append(min(size, ends[-1] + step))
    return list(pairwise(ends))


def in_window(items: list, window: int, rng: random.Random) -> list[list]:
    """The items in shuffled groups: nothing of a group starts before the group before it ended."""
    groups = [items[at : at + window] for at in range(0, len(items), window)]
    for group in groups:
        rng.shuffle(group)
    return groups


def run_all(work: object, groups: list[list], threads: int) -> None:
    """Calls work(item) on ``threads`` threads; fails instead of waiting for ever."""
    with ThreadPoolExecutor(threads) as pool:
        for group in groups:
            for future in [pool.submit(work, item) for item in group]:  # type: ignore[arg-type]
                future.result(timeout=60)


@pytest.mark.parametrize("io", ["auto", "buffered"])
@pytest.mark.parametrize(
    ("buffers", "window", "spilling"), [(18, 8, False), (3, 8, None), (1, 10**9, True)]
)
def test_stress(tmp_path: Path, io: str, buffers: int, window: int, spilling: bool | None) -> None:
    sizes = [CHUNK * 40 + 17, 5000, CHUNK * 25]
    staging = _C.Staging(CHUNK, buffers, 2)
    data = [content(size, seed) for seed, size in enumerate(sizes)]
    paths = [tmp_path / str(number) for number in range(len(sizes))]
    files = [
        _C.StagedFile(staging, str(path), size, io=io)
        for path, size in zip(paths, sizes, strict=True)
    ]
    tensors = [
        (number, begin, end)
        for number, size in enumerate(sizes)
        for begin, end in cuts(size, number, 3 * CHUNK)
    ]
    assert len(tensors) > 150

    def fill(item: tuple[int, int, int]) -> None:
        number, begin, end = item
        files[number].write(begin, data[number][begin:end])

    run_all(fill, in_window(tensors, window, random.Random(7)), threads=7)
    for file in files:
        file.finish()
    for path, expected in zip(paths, data, strict=True):
        assert path.read_bytes() == expected
    # 2 W + 2 buffers hold all that W tensors in flight leave unfinished: nothing is read back.
    # (Three may do when the threads happen to go in order.)
    assert spilling is None or (staging.spills > 0) == spilling
    assert all(file.done(0, size) for file, size in zip(files, sizes, strict=True))


def test_kernels_fill_a_window(tmp_path: Path) -> None:
    """Eight callers and seven workers, as in a merge: 2 W + 2 buffers, and nothing is read back."""
    window, size = 8, CHUNK * 60 + 2
    data = content(size, 4)
    (tmp_path / "in").write_bytes(data)
    mapping = _C.Mapping(str(tmp_path / "in"))
    staging, pool = _C.Staging(CHUNK, 2 * window + 2, 2), _C.Pool(7)
    file = _C.StagedFile(staging, str(tmp_path / "out"), size)

    def fill(item: tuple[int, int]) -> None:
        begin, end = item
        _C.copy(pool, mapping.view(begin, end - begin, "RAW"), file.sink(begin, end - begin, "RAW"))

    run_all(fill, in_window(cuts(size, 4, 5 * CHUNK), window, random.Random(4)), threads=window)
    file.finish()
    assert (tmp_path / "out").read_bytes() == data
    assert staging.spills == 0


def test_bytes_written(tmp_path: Path) -> None:
    staging = _C.Staging(4096, 4, 1)
    file = _C.StagedFile(staging, str(tmp_path / "f"), 10_001)
    file.write(0, b"x" * 10_001)
    file.finish()
    assert staging.bytes_written == 10_001


def test_done_follows_whole_chunks(tmp_path: Path) -> None:
    staging = _C.Staging(4096, 4, 1)
    file = _C.StagedFile(staging, str(tmp_path / "f"), 8192)
    file.write(0, b"a" * 5000)
    while not file.done(0, 4096):
        pass
    assert not file.done(0, 5000)
    assert not file.done(4096, 1)
    file.write(5000, b"b" * 3192)
    file.finish()
    assert file.done(0, 8192)


def test_zero_bytes(tmp_path: Path) -> None:
    staging = _C.Staging(4096, 1, 1)
    file = _C.StagedFile(staging, str(tmp_path / "f"), 0)
    file.finish()
    assert (tmp_path / "f").read_bytes() == b""


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_resume_keeps_finished_bytes(tmp_path: Path, io: str) -> None:
    size = CHUNK * 6 + 100
    data, path = content(size, 1), tmp_path / "f"
    ranges = cuts(size, 2, CHUNK)
    staging = _C.Staging(CHUNK, 32, 2)
    first = _C.StagedFile(staging, str(path), size, io=io)
    for begin, end in ranges[::2]:
        first.write(begin, data[begin:end])
    for begin, end in ranges[1::2][: len(ranges) // 4]:
        first.write(begin, data[begin:end])
    while not first.done(0, CHUNK):
        pass
    kept = [(begin, end) for begin, end in ranges if first.done(begin, end - begin)]
    first.abandon()
    assert 0 < len(kept) < len(ranges)

    second = _C.StagedFile(staging, str(path), size, io=io, resume=True)
    for begin, end in kept:
        second.keep(begin, end - begin)
    for begin, end in ranges:
        if (begin, end) not in kept:
            second.write(begin, data[begin:end])
    second.finish()
    assert path.read_bytes() == data


def test_memory_is_buffered() -> None:
    """A file system in memory takes the flag for direct I/O and copies all the same."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or os.statvfs(shm).f_bavail == 0:
        pytest.skip("no /dev/shm here")
    path = shm / f"fastmerge-test-{os.getpid()}"
    staging = _C.Staging(4096, 4, 1)
    try:
        file = _C.StagedFile(staging, str(path), 5000)
        assert not file.direct
        file.write(0, b"z" * 5000)
        file.finish()
        assert path.read_bytes() == b"z" * 5000
        with pytest.raises(OSError, match="Invalid argument") as caught:
            _C.StagedFile(staging, str(path), 5000, io="direct")
        assert caught.value.filename == str(path)
    finally:
        path.unlink(missing_ok=True)


def test_missing_bytes_are_noticed(tmp_path: Path) -> None:
    staging = _C.Staging(4096, 4, 1)
    file = _C.StagedFile(staging, str(tmp_path / "f"), 5000)
    file.write(0, b"x" * 4999)
    with pytest.raises(RuntimeError, match="never written"):
        file.finish()


def test_abandon_wakes_waiters(tmp_path: Path) -> None:
    """A thread that waits for a buffer gets an error, not a hang, when the file is given up."""
    staging = _C.Staging(4096, 1, 1)
    file = _C.StagedFile(staging, str(tmp_path / "f"), 1 << 20)
    failures: list[OSError] = []
    started = threading.Event()

    def fill(offset: int) -> None:
        try:
            for at in range(offset, 1 << 20, 8192):
                file.write(at, b"x" * 2048)
                started.set()
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=fill, args=(at,), daemon=True) for at in (0, 4096)]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    file.abandon()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert {failure.errno for failure in failures} <= {errno.ECANCELED}
    with pytest.raises(OSError, match="Operation canceled"):
        file.write(0, b"x")


def test_refusals(tmp_path: Path) -> None:
    for arguments in [(4095, 1, 1), (5000, 1, 1), (4096, 0, 1), (4096, 1, 0)]:
        with pytest.raises(ValueError, match="buffer"):
            _C.Staging(*arguments)
    staging = _C.Staging(4096, 4, 1)
    file = _C.StagedFile(staging, str(tmp_path / "f"), 100)
    for offset, count, dtype in [(-1, 1, "RAW"), (0, 101, "RAW"), (0, 26, "F32"), (2, 4, "F32")]:
        with pytest.raises(ValueError, match=r"range|multiple"):
            file.sink(offset, count, dtype)
    with pytest.raises(ValueError, match="io must be"):
        _C.StagedFile(staging, str(tmp_path / "g"), 1, io="quick")
    with pytest.raises(FileNotFoundError) as caught:
        _C.StagedFile(staging, str(tmp_path / "no" / "f"), 1)
    assert caught.value.filename == str(tmp_path / "no" / "f")
    file.write(0, b"x" * 100)
    file.finish()
    with pytest.raises(RuntimeError, match="twice"):
        file.write(0, b"x")


# The write fails in an I/O thread, long after the space was reserved.
_FAILING_DISK = """
import resource, sys
from fastmerge import _C
staging = _C.Staging(4096, 2, 2)
file = _C.StagedFile(staging, sys.argv[1], 1 << 20, io=sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
try:
    for at in range(0, 1 << 20, 4096):
        file.write(at, bytes(4096))
except OSError as error:
    print("write", error.errno, error.filename)
try:
    file.finish()
except OSError as error:
    print("finish", error.errno, error.filename)
try:
    _C.StagedFile(staging, sys.argv[1], 1 << 20, io=sys.argv[2])
except OSError as error:
    print("open", error.errno, error.filename)
"""


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_write_errors_surface(tmp_path: Path, io: str) -> None:
    path = str(tmp_path / "f")
    answer = subprocess.run(
        [sys.executable, "-c", _FAILING_DISK, path, io],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told = [f"{where} {errno.EFBIG} {path}" for where in ("write", "finish", "open")]
    assert answer.stdout.splitlines() == told


def test_space_is_reserved_up_front(tmp_path: Path) -> None:
    staging = _C.Staging(4096, 2, 1)
    with pytest.raises(OSError, match=r"No space|too large") as caught:
        _C.StagedFile(staging, str(tmp_path / "f"), 1 << 46)  # 64 TiB
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert caught.value.filename == str(tmp_path / "f")


# --- reading ---


def stored(mapping: _C.Mapping, offset: int, nbytes: int) -> bytes:
    view = mapping.view(offset, nbytes, "RAW")
    return ctypes.string_at(view.address, view.nbytes)


def test_mapping(tmp_path: Path) -> None:
    path, data = tmp_path / "f", content(300_001, 3)
    path.write_bytes(data)
    mapping = _C.Mapping(str(path))
    assert mapping.size == len(data)
    for offset, nbytes in [
        (0, len(data)),
        (0, 0),
        (len(data), 0),
        (4097, 9999),
        (len(data) - 1, 1),
    ]:
        mapping.prefetch(offset, nbytes)
        assert stored(mapping, offset, nbytes) == data[offset : offset + nbytes]
        mapping.drop(offset, nbytes)
        assert stored(mapping, offset, nbytes) == data[offset : offset + nbytes]
    view = mapping.view(1, 100, "F32")
    assert (view.count, view.dtype, view.nbytes) == (100, "F32", 400)
    for offset, nbytes in [
        (-1, 1),
        (0, len(data) + 1),
        (len(data) + 1, 0),
        (1, len(data)),
        (0, -1),
    ]:
        with pytest.raises(ValueError, match="outside"):
            stored(mapping, offset, nbytes)
        with pytest.raises(ValueError, match="outside"):
            mapping.drop(offset, nbytes)
    with pytest.raises(ValueError, match="outside"):
        mapping.view(0, 2**62, "F32")


def test_mapping_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    mapping = _C.Mapping(str(tmp_path / "empty"))
    mapping.prefetch(0, 0)
    assert stored(mapping, 0, 0) == b""
    with pytest.raises(FileNotFoundError):
        _C.Mapping(str(tmp_path / "absent"))
    with pytest.raises(OSError, match="Invalid argument"):
        _C.Mapping(str(tmp_path))


def test_view_outlives_its_mapping(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcdefgh")
    view = _C.Mapping(str(tmp_path / "f")).view(0, 8, "RAW").slice(2, 5)
    assert ctypes.string_at(view.address, view.nbytes) == b"cde"


def test_a_forked_child_leaves_them_alone(tmp_path: Path) -> None:
    """Their threads are not in it: freeing them there crashed, or waited for ever."""
    staging = _C.Staging(4096, 4, 2)
    file = _C.StagedFile(staging, str(tmp_path / "f"), 10_000)
    file.write(0, bytes(5000))
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        del file, staging
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    file.write(5000, bytes(5000))
    file.finish()
