"""Sums in float64 by the Triton kernels against the CPU's, bit for bit, as triton_cases.py does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmerge.errors import FastmergeError
from fastmerge.kernels.combine import combine
from tests.triton_cases import CODE, DEVICE, F32, MIXES, cpu_combine, normal, same, strange


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_wide_combine_equals_cpu(axis, mix):
    rows, cols = 5, 1030
    xs = [strange(normal([rows, i], rows, cols, dtype=dtype)) for i, dtype in enumerate(mix)]
    vectors = {None: 1, 0: cols, 1: rows}[axis]
    c = np.random.default_rng(3).choice([0.0, 1e9, -1.25, 1 / 3], (vectors, len(mix)))
    c = c[0] if axis is None else c
    shape = {"axis": axis, "rows": rows, "cols": cols, "wide": True}
    for dtype in CODE:
        out = torch.full((rows, cols), 7, dtype=dtype, device=DEVICE)
        expected, bad = cpu_combine(xs, c, dtype, **shape)
        assert combine(xs, c, out, **shape) == bad
        same(out, expected)


def test_a_wide_sum_has_no_divisor():
    x = normal(1, 10, dtype=F32)
    with pytest.raises(FastmergeError, match="no divisor"):
        combine([x], np.ones(1), x, divisor=2.0, wide=True)
