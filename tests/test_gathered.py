"""Matrices whose rows lie anywhere: every primitive reads them like one in one place."""

from __future__ import annotations

import numpy as np
import pytest

from fastmerge import _C
from fastmerge.primitives import Agreement
from fastmerge.selection import MAGNITUDE, Sparsify

ROWS = 301


@pytest.fixture(scope="module")
def pool():
    return _C.Pool(3)


def pair(memory, rng, dtype, cols, kind):
    """A matrix in one place, and the same with its rows elsewhere: shuffled, mostly in order, or
    some of them stored as F32."""
    dense = memory.put(rng.normal(size=ROWS * cols), dtype)
    order = rng.permutation(ROWS) if kind == "shuffled" else np.arange(ROWS)
    item = dense.nbytes // dense.count
    moved = memory.blank(dense.count, dtype)
    raw = np.frombuffer(dense.owner, np.uint8).reshape(ROWS, cols * item)
    moved.owner.reshape(ROWS, cols * item)[order] = raw
    rows = (moved.address + order.astype(np.uint64) * np.uint64(cols * item)).astype(np.uint64)
    kinds = np.zeros(ROWS, np.uint8)
    presented, keep = dtype, [moved]
    if kind == "mixed":
        wide = memory.blank(dense.count, "F32")
        _C.combine(_C.Pool(1), [dense], np.ones(1), _C.MemorySink(wide))
        odd = rng.random(ROWS) < 0.3
        rows[odd] = wide.address + np.flatnonzero(odd).astype(np.uint64) * np.uint64(cols * 4)
        kinds[odd] = 1
        presented, dense = "F32", wide
        keep.append(wide)
    elif kind == "holes":  # in order but for a few
        rows[5], rows[200] = dense.address + 5 * cols * item, dense.address + 200 * cols * item
        keep.append(dense)
    return dense, _C.gathered(rows, [dtype, "F32"], kinds, cols, presented, keep)


@pytest.mark.parametrize("kind", ["shuffled", "holes", "mixed"])
@pytest.mark.parametrize("cols", [1, 7, 96, 5000])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_primitive_reads_gathered_rows(pool, memory, dtype, cols, kind):
    if cols == 5000 and dtype != "BF16":
        pytest.skip("one type says it for long rows")
    rng = np.random.default_rng([cols, len(kind)])
    made = [pair(memory, rng, dtype, cols, kind) for _ in range(3)]
    dense, rows = [d for d, _ in made], [r for _, r in made]
    count = dense[0].count
    for base in (None, 0):
        one, two = (_C.gram(pool, v[1:], None if base is None else v[0]) for v in (dense, rows))
        assert one.tobytes() == two.tobytes()
    for axis in (0, 1):
        one, two = (_C.gram(pool, v, axis=axis, rows=ROWS, cols=cols) for v in (dense, rows))
        assert one.tobytes() == two.tobytes()
    specs = [Sparsify(MAGNITUDE, keep=count // 3, rescale=True), Sparsify(MAGNITUDE, keep=1)]
    chosen = [_C.select(pool, v[1:], v[0], specs) for v in (dense, rows)]
    assert chosen[0] == chosen[1]
    for out_type in ("BF16", "F32"):
        results = []
        for v, selections in zip((dense, rows), chosen, strict=True):
            out = memory.blank(count, out_type)
            _C.combine(pool, v, np.array([0.3, 0.5, -0.2]), _C.MemorySink(out))
            agreed = memory.blank(count, out_type)
            _C.consensus(
                pool, v[1:], v[0], [0.7, 0.2], selections, _C.MemorySink(agreed),
                **vars(Agreement(elect=True, normalize=True)),
            )  # fmt: skip
            results.append((out.owner.tobytes(), agreed.owner.tobytes()))
        assert results[0] == results[1]


def test_gathered_rows_are_copied_and_sliced(pool, memory):
    dense, rows = pair(memory, np.random.default_rng(5), "BF16", 33, "shuffled")
    out = memory.blank(dense.count, "BF16")
    _C.copy(pool, rows, _C.MemorySink(out))
    assert (out.owner == dense.owner).all()
    part = memory.blank(1000, "BF16")
    _C.copy(pool, rows.slice(77, 1077), _C.MemorySink(part))
    assert (part.owner == dense.owner[154:2154]).all()


def test_gathered_rows_that_cannot_be_are_refused(memory):
    address = np.array([memory.blank(8, "F32").address], np.uint64)
    zero = np.zeros(1, np.uint8)
    for rows, types, kinds, cols, dtype in (
        (address, ["F32"], zero, 8, "BF16"),  # would have to be rounded
        (address, ["RAW"], zero, 8, "F32"),
        (address, ["F32"], zero + 1, 8, "F32"),
        (address, ["F32"], np.zeros(2, np.uint8), 8, "F32"),
        (address, ["F32"], zero, 0, "F32"),
    ):
        with pytest.raises(ValueError, match=r"kind|row|type"):
            _C.gathered(rows, types, kinds, cols, dtype, None)
    view = _C.gathered(address, ["F32"], zero, 8, "F32", None)
    assert view.is_gathered
    with pytest.raises(RuntimeError, match="no one address"):
        _ = view.address
