"""Sums that move more than 32 MiB are written past the caches: the values are those of parts that
are not, on every instruction set, wherever the output begins. So are those of smaller ones,
wherever their tensors do."""

from __future__ import annotations

import numpy as np
import pytest

from fastmerge import _C
from fastmerge.compute.reference import round_to

COUNT = (3 << 20) + 5  # entries: two inputs and an output of fp32 are 38 MB


@pytest.fixture
def each_isa():
    before = _C.isa()
    yield _C.isas()
    _C.set_isa(before)


def summed(views, out, factors):
    pool = _C.Pool(2)
    _C.combine(pool, views, np.array(factors), _C.MemorySink(out, checked=False))


@pytest.mark.parametrize(("dtype", "inputs"), [("F32", 2), ("BF16", 3), ("F16", 3), ("F32", 4)])
@pytest.mark.parametrize("offset", [0, 1, 7])  # entries
def test_the_values_are_those_of_parts(each_isa, dtype, inputs, offset):
    rng = np.random.default_rng(offset)
    count = COUNT if dtype == "F32" else 2 * COUNT  # of three inputs 50 MB
    arrays = [round_to(rng.standard_normal(count, np.float32), dtype) for _ in range(inputs)]
    item = arrays[0].itemsize
    found, parts = (np.full(count + 64, 7, arrays[0].dtype) for _ in range(2))

    def view(array, begin, length):
        return _C.View(array.ctypes.data + begin * item, length, dtype, array)

    factors = [0.3, 0.7, -0.1, 0.2][:inputs]
    for isa in each_isa:
        _C.set_isa(isa)
        found[:] = parts[:] = 7
        summed([view(x, 0, count) for x in arrays], view(found, offset, count), factors)
        step = 1 << 20
        for begin in range(0, count, step):
            length = min(step, count - begin)
            own = [view(x, begin, length) for x in arrays]
            summed(own, view(parts, offset + begin, length), factors)
        assert np.array_equal(found.view(np.uint8), parts.view(np.uint8)), isa
        assert (found[:offset] == 7).all()
        assert (found[offset + count :] == 7).all()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("inputs", [2, 3])
def test_within_the_caches_they_are_the_same_wherever_tensors_begin(each_isa, dtype, inputs):
    rng = np.random.default_rng(inputs)
    count, factors = 1003, [0.3, 0.7, -0.1][:inputs]
    arrays = [round_to(rng.standard_normal(count, np.float32), dtype) for _ in range(inputs)]
    item = arrays[0].itemsize

    def at(offset):  # bytes after a line's beginning
        room = np.full(count * item + 256, 7, np.uint8)
        begin = -room.ctypes.data % 64 + offset
        return room, room[begin : begin + count * item]

    def view(place):
        return _C.View(place.ctypes.data, count, dtype, place)

    expected = None
    for isa in ["scalar", *each_isa]:
        _C.set_isa(isa)
        for offsets in [
            (0, 0),
            (16, 16),
            (16, 0),
            (0, 16),
            (4, 60),
            (63, 0),
            (0, 1),
            (1, 1),
            (2, 3),
        ]:
            places = [at(offsets[0])[1] for _ in arrays]
            for place, array in zip(places, arrays, strict=True):
                place[:] = array.view(np.uint8)
            room, out = at(offsets[1])
            summed([view(place) for place in places], view(out), factors)
            expected = out.tobytes() if expected is None else expected
            assert out.tobytes() == expected, (isa, offsets)
            out[:] = 7
            assert (room == 7).all()


def test_in_place(each_isa):
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(COUNT, np.float32) for _ in range(2))
    for isa in each_isa:
        _C.set_isa(isa)
        own = a.copy()
        apart = np.empty_like(a)
        views = [_C.View(x.ctypes.data, x.size, "F32", x) for x in (own, b)]
        summed(
            [_C.View(a.ctypes.data, a.size, "F32", a), views[1]],
            _C.View(apart.ctypes.data, apart.size, "F32", apart),
            [0.3, 0.7],
        )
        summed(views, views[0], [0.3, 0.7])
        assert np.array_equal(own, apart), isa
