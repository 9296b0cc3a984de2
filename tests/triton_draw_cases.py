"""Draws by rank (della) by the Triton kernels against the CPU's, bit for bit, as triton_cases.py
does.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastmerge import _C
from fastmerge.errors import FastmergeError
from fastmerge.kernels import common, draw
from fastmerge.kernels.consensus import consensus, consensus_many
from fastmerge.kernels.select import select, select_many
from fastmerge.methods.shapes import Keep
from fastmerge.selection import MAGNITUDE, RANDOM, RANKED, Selection, Sparsify
from tests.triton_cases import BF16, DEVICE, F16, F32, POOL, cpu, like, normal, same, strange, view


def drawn(shape, density=0.5, epsilon=0.15, key=77, rescale=True):
    """A request for a tensor of this shape."""
    spec = Keep(RANKED, density, rescale=rescale, epsilon=epsilon).of(shape, key)
    assert spec.kind == RANKED
    return spec


def on_cpu(inputs, base, specs):
    """The CPU's selections, and the memory of its masks, which they do not keep."""
    xs, b = cpu(inputs), base.cpu()
    words = np.full((len(specs), -(-b.numel() // 32)), -1, np.int32)
    masks = [
        _C.View(row.ctypes.data, row.size, "F32", row) if spec.kind == RANKED else None
        for row, spec in zip(words, specs, strict=True)
    ]
    found = _C.select(POOL, [view(x) for x in xs], view(b), specs, masks)
    return [Selection(*s)._replace(mask=mask) for s, mask in zip(found, masks, strict=True)], words


def check(inputs, base, specs):
    """The same bits of every mask, as many kept, the same factors."""
    got = select(inputs, base, specs)
    wanted, words = on_cpu(inputs, base, specs)
    for own, want, row in zip(got, wanted, words, strict=True):
        if want.kind == RANKED:
            np.testing.assert_array_equal(own.mask.cpu().numpy(), row)
            assert own._replace(rescale=0, mask=None) == want._replace(rescale=0, mask=None)
            if np.isfinite(want.rescale):
                np.testing.assert_allclose(own.rescale, want.rescale, rtol=1e-7)
    return got


def deltas(kind, shape, dtype):
    base = normal([1, *shape], *shape, dtype=dtype, scale=0.02)
    if kind == "normal":  # most of bf16's tie
        return base, like(base, 2, dtype, 0.0005)
    if kind == "zero":  # all tie
        return base, base.clone()
    if kind == "strange":
        return base, strange(like(base, 2, F32, 0.002))
    x = normal(3, *shape)  # beside one outlier all others would share a part of a range
    x.view(-1)[::41] = 2.0**40
    return torch.zeros_like(x), x


SHAPES = [(1,), (517,), (5, 1), (33, 31), (2, 1003), (3, 5, 7), (2, 40, 9), (6, 3, 1)]
KINDS = [("normal", shape, BF16) for shape in SHAPES]
KINDS += [("normal", (33, 31), F16), ("normal", (2, 403), F32)]
KINDS += [(kind, (3, 403), BF16) for kind in ("zero", "strange", "outlier")]


@pytest.mark.parametrize("kind, shape, dtype", KINDS, ids=str)
def test_a_draw_by_rank_equals_the_cpu_s(kind, shape, dtype):
    base, x = deltas(kind, shape, dtype)
    check([x, base], base, [drawn(shape), drawn(shape, 0.4, 0.39, (1 << 64) - 1)])


BOUNDS = [(0, 1 << 32), (1 << 31, 1 << 31), (0, 0), (1 << 32, 1 << 32), (5, 6), (0, 1)]
BOUNDS += [(7, 1 << 32)]


def test_every_entry_and_none_left_to_its_rank():
    shape = (3, 203)
    base, x = deltas("normal", shape, BF16)
    specs = [drawn(shape)._replace(keep_below=low, keep_below_top=top) for low, top in BOUNDS]
    check([x] * len(specs), base, specs)


def test_vectors_in_several_chunks_and_programs(monkeypatch):
    for module in (common, draw):
        monkeypatch.setattr(module, "CHUNK", 1024)
    for shape in ((2500,), (2, 1100), (2, 300, 3)):
        base, x = deltas("normal", shape, BF16)
        check([x], base, [drawn(shape)])


@pytest.mark.parametrize("splitters", [1, 2, 64])
def test_the_sample_decides_nothing(splitters, monkeypatch):
    """However few values are looked at, or misleading ones: the first of a rising vector."""
    monkeypatch.setattr(draw, "SPLITTERS", splitters)
    shape = (2, 900)
    x = torch.arange(1800, device=DEVICE).float().view(shape)
    check([x], torch.zeros_like(x), [drawn(shape)])


def test_draws_of_many_tensors_share_launches(monkeypatch):
    """Of several dtypes, shapes and alignments, beside other rules, in a few batches."""
    monkeypatch.setattr(draw, "BUFFER_BYTES", 20_000)
    pad = normal(9, 700, dtype=BF16)
    bases = [normal(n, *shape, dtype=BF16) for n, shape in enumerate([(300,), (20, 60), (0, 4)])]
    bases.append(pad[1:601].view(3, 200))  # 2-byte aligned
    tunes = [[like(b, 1, BF16, 0.01), like(b, 2, F32, 0.01), like(b, 3, BF16)] for b in bases]
    specs = [
        [
            drawn(tuple(b.shape), key=n), Sparsify(MAGNITUDE, b.numel() // 3),
            drawn(tuple(b.shape), 0.3, 0.2, n + 1),
        ]
        for n, b in enumerate(bases)
    ]  # fmt: skip
    found = select_many(tunes, bases, specs)
    for base, xs, given, got in zip(bases, tunes, specs, found, strict=True):
        alone = check(xs, base, given)
        for own, want in zip(got, alone, strict=True):
            assert own._replace(mask=None) == want._replace(mask=None)
            assert want.mask is None or torch.equal(own.mask, want.mask)


@pytest.mark.parametrize("elect", [False, True])
def test_consensus_of_drawn_deltas_equals_the_cpu_s(elect):
    shape = (30, 70)
    base = strange(normal(0, *shape, dtype=BF16))
    xs = [strange(like(base, 1, F32, 0.3)), like(base, 2, BF16, 0.3), like(base, 3, BF16, 0.3)]
    specs = [drawn(shape), drawn(shape, rescale=False), Sparsify(RANDOM, keep_below=1 << 31)]
    chosen = select(xs, base, specs)
    wanted, words = on_cpu(xs, base, specs)
    assert words.size
    options = {"elect": elect, "normalize": True, "scale": 0.7}
    weights = [0.4, 0.8, -0.3]
    # Which factor is whose: a sum over NaN is none.
    chosen = [c._replace(rescale=w.rescale) for c, w in zip(chosen, wanted, strict=True)]
    b, own = base.cpu(), cpu(xs)
    expected = torch.full_like(b, 7)
    bad = _C.consensus(
        POOL, [view(x) for x in own], view(b), weights, wanted,
        _C.MemorySink(view(expected)), [s.mask for s in wanted], **options,
    )  # fmt: skip
    out = torch.full_like(base, 7)
    assert consensus(xs, base, weights, chosen, out, **options) == bad
    same(out, expected)
    # In pieces of whole words.
    cuts = [0, 32, 1056, base.numel()]
    pieces = list(itertools.pairwise(cuts))
    again = torch.full_like(out, 7).view(-1)

    def part(selection, begin, end):
        if selection.mask is None:
            return selection
        return selection._replace(mask=selection.mask[begin // 32 : -(-end // 32)])

    consensus_many(
        [[x.view(-1)[a:b] for x in xs] for a, b in pieces],
        [base.view(-1)[a:b] for a, b in pieces],
        [weights] * len(pieces),
        [[part(s, a, b) for s in chosen] for a, b in pieces],
        [again[a:b] for a, b in pieces],
        elect=elect, normalize=True, scales=[0.7] * len(pieces), origins=cuts[:-1],
    )  # fmt: skip
    same(again.view(shape), expected)


def test_draws_that_do_not_fit_are_refused():
    x = torch.ones(12, device=DEVICE)
    spec = drawn((3, 4))
    for change, message in (
        ({"length": 5}, "length 5, stride 1"), ({"stride": 2}, "length 4, stride 2"),
        ({"length": 0}, "length 0"), ({"keep_below": 1 << 33}, "rising"),
        ({"keep_below_top": 0}, "rising"),
    ):  # fmt: skip
        with pytest.raises(FastmergeError, match=message):
            select([x], x, [spec._replace(**change)])
    (found,) = select([x], x, [spec])
    with pytest.raises(FastmergeError, match="multiple of 32"):
        consensus([x], x, [1], [found], x, elect=False, normalize=False, origin=4)
