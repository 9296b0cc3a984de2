"""What a call of `fastmerge.ops` keeps for the next: values are those of a first call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fastmerge
from fastmerge import _C, ops
from fastmerge.compute import of_tensors
from fastmerge.compute.reference import round_to
from fastmerge.methods import Function, Parameter, combination

RNG = np.random.default_rng(0)
BASE, A, B = (RNG.standard_normal((96, 40), dtype=np.float32) for _ in range(3))
CALLS = {
    "linear": lambda: ops.linear([A, B], [0.3, 0.7]),
    "slerp": lambda: ops.slerp(A, B, 0.3),
    "nuslerp": lambda: ops.nuslerp(A, B, [0.3, 0.7], base=BASE, flatten=False),
    "model_stock": lambda: ops.model_stock(BASE, [A, B]),
    "ties": lambda: ops.ties(BASE, [A, B], [0.3, 0.7], density=0.5),
    "dare": lambda: ops.dare_linear(BASE, [A, B], [0.3, 0.7], density=0.5, seed=3, name="w"),
    "della": lambda: ops.della(BASE, [A, B], [0.3, 0.7], density=0.5, seed=3, name="w"),
    "sce": lambda: ops.sce(BASE, [A, B], select_topk=0.5),
    "passthrough": lambda: ops.passthrough(A, scale=0.5),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_gives_the_same_bits_as_the_first(name):
    of_tensors._forms.clear()
    first = CALLS[name]()
    kept = len(of_tensors._forms)
    assert CALLS[name]().tobytes() == first.tobytes()
    assert kept == len(of_tensors._forms) == 1


def test_what_is_kept_is_of_its_own_numbers():
    for weights in ([0.3, 0.7], [0.7, 0.3], (1, 2), np.array([0.5, 0.5]), torch.tensor([2.0, 1.0])):
        share = np.asarray(weights, dtype=np.float64) / np.sum(np.asarray(weights))
        wanted = share[0] * A.astype(np.float64) + share[1] * B
        np.testing.assert_allclose(ops.linear([A, B], weights), wanted, rtol=1e-4, atol=1e-6)


def test_what_is_refused_is_refused_after_an_equal_number_was_taken():
    ops.linear([A, B], [1, 1])
    ops.linear([A, B], [1.0, 1.0])
    with pytest.raises(fastmerge.FastmergeError, match="must be a number, not True"):
        ops.linear([A, B], [True, True])


def test_draws_follow_seed_and_name():
    def drawn(seed, name):
        return ops.dare_linear(BASE, [A], [1.0], density=0.5, seed=seed, name=name).tobytes()

    assert len({drawn(1, "v"), drawn(1, "w"), drawn(2, "w")}) == 3
    assert drawn(1, "v") == drawn(1, "v")


def test_a_method_registered_anew_is_the_new_one():
    def register(factor):
        fastmerge.methods.register(
            Function(
                name="kept_times", summary="", paper="-", base="none", version=str(factor),
                parameters=(Parameter("shift", float, 0.0, ""),), min_operands=1, max_operands=1,
                function=lambda base, tensors, values: tensors[0] * factor,
            )
        )  # fmt: skip

    for factor in (2, 3):
        register(factor)
        try:
            np.testing.assert_array_equal(ops.merge("kept_times", [A]), A * np.float32(factor))
        finally:
            fastmerge.methods.unregister("kept_times")


def test_forms_are_bounded():
    for index in range(of_tensors._MOST_FORMS + 8):
        ops.passthrough(A[0], scale=1.0 + index)
    assert len(of_tensors._forms) <= of_tensors._MOST_FORMS


@pytest.mark.parametrize("cosine", [-1.0, -0.99951, -0.5, 0.0, 0.3, 0.99949, 1.0])
@pytest.mark.parametrize("t", [-0.5, 0.25, 0.5, 0.9])
def test_slerp_of_one_matrix_is_slerp_of_a_stack(cosine, t):
    gram = np.array([[4.0, 6.0 * cosine], [6.0 * cosine, 9.0]])
    one = combination.slerp(gram, {"t": t}, [], False).coefficients
    stacked = combination.slerp(gram[None], {"t": t}, [], False).coefficients[0]
    np.testing.assert_array_equal(one.astype(np.float32), stacked.astype(np.float32))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("count", [1, 2048, 40_000, 300_001, (1 << 20) + 5])
def test_pieces_threads_and_checks_change_no_bit(dtype, count):
    x, y = (round_to(RNG.standard_normal(count, dtype=np.float32), dtype) for _ in range(2))
    x[-1] = round_to(np.array([np.inf], np.float32), dtype)[0]
    made, bad = [], []
    for threads in (1, 2, 5):
        for checked in (True, False):
            out = np.zeros_like(x)
            views = [_C.View(t.ctypes.data, count, dtype, t) for t in (x, y, out)]
            sink = _C.MemorySink(views[2], checked=checked)
            coefficients = np.array([0.25, 0.75])
            bad.append(
                (checked, _C.combine(_C.Pool(threads), views[:2], coefficients, sink, divisor=1.0))
            )
            made.append(out.tobytes())
    assert len(set(made)) == 1
    assert set(bad) == {(True, 1), (False, 0)}


def test_a_divisor_of_one_is_none():
    one = ops.linear([A, B], [0.25, 0.75])
    np.testing.assert_array_equal(one, ops.combine([A, B], [0.25, 0.75]))


def test_many_threads_merge_different_tensors():
    """More callers than threads, small and large tensors in any order, all on one pool."""
    sizes = [1000, 70_000, 300_000, 1_200_000]
    inputs = [[RNG.standard_normal(n, dtype=np.float32) for _ in range(2)] for n in sizes]

    def work(index: int) -> bytes:
        a, b = inputs[index % 4]
        if index % 3 == 0:
            return ops.slerp(a, b, 0.3, threads=2).tobytes()
        if index % 3 == 1:
            return ops.linear([a, b], [0.3, 0.7], threads=2).tobytes()
        return ops.ties(None, [a, b], [0.3, 0.7], density=0.3, threads=2).tobytes()

    alone = [work(index) for index in range(12)]
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(work, list(range(12)) * 8))
    assert all(own == alone[index % 12] for index, own in enumerate(found))
