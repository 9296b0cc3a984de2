"""The Triton kernels of `pointwise` and `divergences` against the CPU's, bit for bit, as
triton_cases.py does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmerge import _C
from fastmerge.kernels.backend import TritonBackend
from fastmerge.kernels.divergence import divergences
from fastmerge.kernels.pointwise import FORMULAS, PointwiseBatch
from fastmerge.selection import INDEX, MAGNITUDE, MIXED, Selection, Sparsify
from tests.triton_cases import BF16, DEVICE, F16, F32, POOL, like, normal, same, strange, view

NUMBERS = {
    "near_swap": lambda k: [0.05],
    "active": lambda k: [0.02, 1],
    "reinforced": lambda k: [0.02, *np.linspace(0.9, 1.1, k)],
    "varied_delta": lambda k: [k - 1],
    "select_and_erase": lambda k: np.linspace(0.2, 0.5, k).tolist(),
    "fuse": lambda k: [0.02],
    "largest": lambda k: [0.7],
    "agreed": lambda k: [2, 0.8, *np.linspace(0.3, 1.2, 2 * k)],
}
TYPES = (BF16, F32, F16)
BACKEND = TritonBackend(DEVICE)


def tensors(size, k):
    base = strange(normal([size, 9], size, dtype=BF16))
    xs = [like(base, [size, i], TYPES[i % 3]) for i in range(k)]
    for x in xs:
        x[1::5] = base[1::5]  # what no model, or not all of them, moved
    return base, [*(strange(x) for x in xs[:1]), *xs[1:]]


def cpu_pointwise(formula, xs, base, numbers, dtype, **more):
    on = [view(x.cpu()) for x in xs], view(base.cpu())
    out = torch.full_like(base.cpu(), 7, dtype=dtype)
    made = _C.pointwise(formula, *on, numbers, **more)
    bad = _C.combine(POOL, [made], np.ones(1), _C.MemorySink(view(out)))
    return out, bad, made


@pytest.mark.parametrize("size", [1, 1029, 32768 + 2051])
@pytest.mark.parametrize("formula", FORMULAS)
def test_pointwise_equals_cpu(formula, size):
    shape = FORMULAS[formula]
    for k in (1,) if shape.inputs else (1, 3, 9) if size == 1029 else (2,):
        base, xs = tensors(size, k)
        numbers = NUMBERS.get(formula, lambda k: [])(k)
        factors = np.float64([0.3, 0.8, 1.5])[: 3 if size % 3 == 0 else 1]
        more = {"factors": factors} if shape.by_row else {}
        for dtype in TYPES if size < 2000 else TYPES[:1]:
            made = BACKEND.pointwise(formula, xs, base, numbers, **more)
            out = torch.full_like(base, 7, dtype=dtype)
            given = {"factors": factors.astype(np.float32)} if shape.by_row else {}
            expected, bad, _ = cpu_pointwise(formula, xs, base, numbers, dtype, **given)
            assert BACKEND.combine([made], np.ones(1), out) == bad
            same(out, expected)


@pytest.mark.parametrize("formula", ["varied", "varied_delta", "select_and_erase"])
@pytest.mark.parametrize("rule", [MIXED, INDEX])
def test_what_a_selection_keeps_equals_cpu(formula, rule):
    size = 1700
    base, xs = tensors(size, 3)
    numbers = NUMBERS.get(formula, lambda k: [])(3)
    zeros, variance = torch.zeros(size), cpu_pointwise("variance", xs, base, [], F32)[2]
    specs = [Sparsify(MAGNITUDE, keep, rule) for keep in (size // 3, size - 200, 0)]
    found = _C.select(POOL, [variance] * 3, view(zeros), specs)
    on_gpu = BACKEND.select(
        [BACKEND.pointwise("variance", xs, base)] * 3, BACKEND.pointwise("zero", xs, base), specs
    )
    for ours, theirs in zip(on_gpu, found, strict=True):
        expected, bad, _ = cpu_pointwise(
            formula, xs, base, numbers, BF16, selection=Selection(*theirs)
        )
        out = torch.full_like(base, 7)
        made = BACKEND.pointwise(formula, xs, base, numbers, selection=ours)
        assert BACKEND.combine([made], np.ones(1), out) == bad
        same(out, expected)


def test_pieces_and_batches_are_the_whole():
    base, xs = tensors(32768 + 4100, 2)
    size, cols = base.numel(), base.numel() // 4
    factors = np.float64([0.5, 2.0, 0.1, 1.0])
    whole = BACKEND.pointwise("fuse", xs[:1], base, [0.02], factors=factors).tensor()
    for begin, end in ((0, 32768), (32768, size)):
        part = BACKEND.pointwise(
            "fuse", [xs[0][begin:end]], base[begin:end], [0.02], factors=factors, origin=begin,
            cols=cols,
        )  # fmt: skip
        same(part.tensor(), whole[begin:end])
    cuts = [(0, 5), (5, 5), (5, 3000), (3000, size)]  # unaligned and empty ones, too
    outs = [torch.empty(end - begin, device=DEVICE) for begin, end in cuts]
    batch = PointwiseBatch(
        "largest", [[x[a:b] for x in xs] for a, b in cuts], [base[a:b] for a, b in cuts], outs
    )
    counts = batch.run([[0.5 * i] for i in range(4)])
    for i, (begin, end) in enumerate(cuts):
        own = [x[begin:end] for x in xs], base[begin:end]
        made = BACKEND.pointwise("largest", *own, [0.5 * i])
        same(outs[i], made.tensor())
        assert int(counts[i]) == made.into(outs[i])


@pytest.mark.parametrize(
    "formula, inputs, given, said",
    [
        ("square", 1, [], "no formula 'square'"),
        ("near_swap", 2, [1], "number of inputs"),
        ("near_swap", 1, [], "other numbers"),
        ("fuse", 1, [1], "one factor for each row"),
    ],
)
def test_pointwise_refuses_what_does_not_fit(formula, inputs, given, said):
    x = torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match=said):
        BACKEND.pointwise(formula, [x] * inputs, x, given).into(x)


@pytest.mark.parametrize(
    "kind, rows, cols",
    [("normal", 5, 1), ("near", 70, 3), ("strange", 12, 70), ("wide", 3, 100), ("near", 2, 1101),
     ("normal", 0, 4)],
)  # fmt: skip
def test_divergences_equal_cpu(kind, rows, cols):
    """To the last bit, whatever a row's place among the tiles."""
    base = normal([rows, cols], rows * cols, scale=30 if kind == "wide" else 1).to(BF16)
    x = like(base, 3, F32, 1e-4 if kind == "near" else 1.0)
    if kind == "strange":
        strange(x)
        if base.numel() > 300:
            base[250:280] = float("nan")
    found = divergences(x, base, cols)
    expected = _C.divergences(POOL, view(x.cpu()), view(base.cpu()), cols)
    np.testing.assert_array_equal(found.view(np.int64)[~np.isnan(expected)],
                                  expected.view(np.int64)[~np.isnan(expected)])  # fmt: skip
    assert (np.isnan(found) == np.isnan(expected)).all()
