"""Checksums of written tensors: the same from any pieces, threads and instruction set; blind to no
change of one word.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fastmerge import _C
from fastmerge.compute import reference
from fastmerge.output.checksum import checksum_of, checksum_of_view, checksums_in_file


def view_of(data: bytes | np.ndarray) -> _C.View:
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    return _C.View(array.ctypes.data, array.nbytes, "RAW", array)


@pytest.mark.parametrize("nbytes", [0, 1, 3, 4, 4095, 4096, 4097, 3 << 20 | 5])
def test_reference(nbytes: int) -> None:
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    for threads in (1, 3):
        found = checksum_of_view(_C.Pool(threads), view_of(data))
        assert found == reference.checksum(data.tobytes())


def test_instruction_sets() -> None:
    data = np.random.default_rng(1).integers(0, 256, 100_003, np.uint8)
    pool, best = _C.Pool(1), _C.isa()
    try:
        for isa in _C.isas():
            _C.set_isa(isa)
            assert checksum_of_view(pool, view_of(data)) == reference.checksum(data.tobytes())
    finally:
        _C.set_isa(best)


@pytest.mark.parametrize("code", ["BF16", "F32", "RAW"])
@pytest.mark.parametrize("offset", [0, 8, 1 << 19, (1 << 19) - 4, 4096 + 12])
def test_a_sink_adds_its_pieces(tmp_path: Path, code: str, offset: int) -> None:
    """Wherever the tensor lies in the file, whose pieces end at multiples of 512 KiB."""
    data = np.random.default_rng(2).integers(0, 256, 2_000_004, np.uint8)
    item = {"BF16": 2, "F32": 4, "RAW": 1}[code]
    size = offset + data.nbytes
    staging = _C.Staging(1 << 20, 8, 1)
    file = _C.StagedFile(staging, str(tmp_path / "f"), size)
    file.write(0, bytes(offset))
    sums = _C.Checksum(data.nbytes)
    source = _C.View(data.ctypes.data, data.nbytes // item, code, data)
    _C.copy(_C.Pool(3), source, file.sink(offset, source.count, code, checksum=sums))
    file.finish()
    assert checksum_of(sums) == reference.checksum(data.tobytes())
    places = {"t": (offset, data.nbytes)}
    found = checksums_in_file(_C.Pool(2), tmp_path / "f", places)
    assert dict(found) == {"t": reference.checksum(data.tobytes())}


def test_parts_in_any_order(tmp_path: Path) -> None:
    data = np.random.default_rng(3).integers(0, 256, 1_000_001, np.uint8)
    staging = _C.Staging(1 << 16, 8, 1)
    file = _C.StagedFile(staging, str(tmp_path / "f"), data.nbytes)
    sums, pool = _C.Checksum(data.nbytes), _C.Pool(2)
    cuts = [0, 1, 4097, 300_002, 999_999, data.nbytes]
    for begin, end in reversed(list(pairwise(cuts))):
        part = np.ascontiguousarray(data[begin:end])
        if begin == 0:
            with pytest.raises(RuntimeError, match="not complete"):
                sums.sums()
        sink = file.sink(begin, part.nbytes, "RAW", checksum=sums, first=begin)
        _C.copy(pool, view_of(part), sink)
    assert checksum_of(sums) == reference.checksum(data.tobytes())


def test_bad_ranges(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="negative"):
        _C.Checksum(-1)
    file = _C.StagedFile(_C.Staging(4096, 4, 1), str(tmp_path / "f"), 100)
    for first in (-1, 1):
        with pytest.raises(ValueError, match="outside the checksum"):
            file.sink(0, 100, "RAW", checksum=_C.Checksum(100), first=first)


def test_every_change_of_a_word_is_seen() -> None:
    """No key is 0 in its low 33 bits: word * key mod 2^64 tells any two words apart."""
    words = np.zeros(1024, "<u4")
    pool = _C.Pool(1)
    for at in range(1024):
        words[:] = 0
        words[at] = 1
        keys = _C.Checksum(4096)
        keys.add_all(pool, view_of(words.view(np.uint8)))
        assert int(keys.sums()[0]) % (1 << 33)


def test_changes_that_disks_make_are_seen() -> None:
    """Flipped bits, a sector of zeros, two sectors exchanged, one written twice, a byte less."""
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, 64 << 10, np.uint8)
    changed = []
    for bit in rng.integers(0, 8 * data.size, 200):
        flipped = data.copy()
        flipped[bit // 8] ^= 1 << (bit % 8)
        changed.append(flipped.tobytes())
    sectors = data.reshape(-1, 512)
    for a, b in ((3, 4), (0, 8), (7, 100)):
        zeroed, swapped, twice = sectors.copy(), sectors.copy(), sectors.copy()
        zeroed[a] = 0
        swapped[[a, b]] = swapped[[b, a]]
        twice[b] = twice[a]
        changed += [zeroed.tobytes(), swapped.tobytes(), twice.tobytes()]
    changed += [data.tobytes()[:-1], data.tobytes() + b"\0", bytes(data.size)]
    found = {reference.checksum(each) for each in (data.tobytes(), *changed)}
    assert len(found) == len(set(changed)) + 1
