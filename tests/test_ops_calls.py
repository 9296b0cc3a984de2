"""What a call of `fastmerge.ops` keeps for the next: values are those of a first call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import fastmerge
from fastmerge import _C, ops
from fastmerge.compute import arrays, of_tensors
from fastmerge.compute.reference import round_to
from fastmerge.methods import Function, Parameter, combination
from tests.test_ops import NO_MEMORY

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
    "deltas that weigh nothing": lambda: ops.ties(None, [A, B], [0.0, 0.0], density=0.5),
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


# ---------------------------------------------------------------- tensors like those of before


def _taken(*tensors):
    """After a good call, so that the next compares."""
    for _ in range(2):
        ops.linear(list(tensors), [1.0] * len(tensors))


@pytest.mark.parametrize("make, message", NO_MEMORY.values(), ids=NO_MEMORY)
def test_what_is_not_its_memory_is_refused_after_what_is(make, message):
    tensor = make()
    for shape in ((5, 7), (5, 5), (1,)):
        _taken(torch.ones(shape))
    with pytest.raises(fastmerge.FastmergeError, match=message):
        ops.linear([tensor], [1.0])


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize, torch.func.grad])
def test_inside_torchs_transforms_is_refused_after_outside(transform):
    for shape in ((3, 4), (4,)):
        _taken(torch.ones(shape))
    with pytest.raises(fastmerge.FastmergeError, match="has no memory of its own"):
        transform(lambda x: ops.linear([x], [1.0]).sum())(torch.ones(3, 4))


@pytest.mark.parametrize("weights", [lambda w: w, lambda w: [w[0], w[1]]])
def test_torch_compile_tells_what_is_refused(weights):
    torch.compiler.reset()
    given = torch.ones(4), torch.ones(4), torch.tensor([0.5, 0.5])
    call = torch.compile(
        lambda a, b, w: ops.linear([a, b], weights(w)), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="'weights': numbers beside the tensors are Python's"):
        call(*given)


STRIDED = {
    "torch": (torch.ones(6, 6).T.contiguous(), torch.ones(6, 12)[:, ::2]),
    "numpy": (np.ones((6, 6), np.float32), np.ones((6, 12), np.float32)[:, ::2]),
}


@pytest.mark.parametrize("plain, strided", STRIDED.values(), ids=STRIDED)
def test_what_is_not_contiguous_is_refused_after_what_is(plain, strided):
    _taken(plain, plain)
    with pytest.raises(fastmerge.FastmergeError, match="not contiguous"):
        ops.linear([plain, strided], [0.5, 0.5])
    with pytest.raises(fastmerge.FastmergeError, match="not contiguous"):
        ops.linear([plain, plain], [0.5, 0.5], out=strided)


def test_other_types_and_shapes_after_one():
    x = torch.ones(4, 6)
    _taken(x, x)
    assert ops.linear([x, x.bfloat16()], [0.5, 0.5]).dtype == torch.float32
    assert ops.linear([x.bfloat16()] * 2, [0.5, 0.5]).dtype == torch.bfloat16
    assert ops.linear([torch.nn.Parameter(x), x], [0.5, 0.5]).dtype == torch.float32
    with pytest.raises(fastmerge.FastmergeError, match="shapes differ"):
        ops.linear([x, torch.ones(6, 4)], [0.5, 0.5])
    with pytest.raises(fastmerge.FastmergeError, match="do not mix"):
        ops.linear([x, x.numpy()], [0.5, 0.5])
    with pytest.raises(fastmerge.FastmergeError, match="different devices"):
        ops.linear([x, x.to("meta")], [0.5, 0.5])


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_outputs_after_a_call_like_it(kind):
    whole = np.arange(60, dtype=np.float32)
    if kind == "torch":
        whole = torch.from_numpy(whole)
    x, y, part = whole[:20], whole[20:40], whole[10:30]
    exact = np.asarray(x) * 0.25 + np.asarray(y) * 0.75
    _taken(x, y)
    assert ops.linear([x, y], [0.25, 0.75], out=whole[40:]) is not None
    np.testing.assert_array_equal(np.asarray(whole[40:]), exact)
    with pytest.raises(fastmerge.FastmergeError, match="overlaps an input in part"):
        ops.linear([x, y], [0.25, 0.75], out=part)
    with pytest.raises(fastmerge.FastmergeError, match="shape"):
        ops.linear([x, y], [0.25, 0.75], out=whole)
    np.testing.assert_array_equal(np.asarray(ops.linear([x, y], [0.25, 0.75], out=x)), exact)


def test_a_read_only_output_is_refused_after_a_call_like_it():
    _taken(A, B)
    out = np.zeros_like(A)
    out.flags.writeable = False
    with pytest.raises(fastmerge.FastmergeError, match="read-only"):
        ops.linear([A, B], [0.5, 0.5], out=out)
    assert not out.any()


def test_autograd_sees_a_second_write_too():
    out = torch.zeros(4)
    _taken(torch.ones(4))
    before = out._version
    ops.linear([torch.ones(4)], [1.0], out=out)
    assert out._version > before


def test_kinds_are_bounded(monkeypatch):
    monkeypatch.setattr(arrays, "_MOST_KINDS", 3)
    for count in range(1, 9):
        _taken(np.ones(count, np.float32))
    assert len(arrays._known) <= 3


def test_threads_follow_the_environment(monkeypatch):
    _taken(A, B)
    monkeypatch.setenv("FASTMERGE_NUM_THREADS", "many")
    with pytest.raises(fastmerge.FastmergeError, match="not a whole number of threads"):
        ops.linear([A, B], [0.5, 0.5])


# ---------------------------------------------------------------- programs of C++ alone


PROGRAMS = {
    "linear": lambda x, y, z, o: ops.linear([x, y], [0.3, 0.7], out=o),
    "linear of three": lambda x, y, z, o: ops.linear([x, y, z], [1, 2, 4], out=o),
    "linear of equals": lambda x, y, z, o: ops.linear([x, x.clone()], [0.3, 0.7], out=o),
    "sum of equals": lambda x, y, z, o: ops.linear(
        [x, x.clone()], [0.3, 0.9], normalize=False, out=o
    ),
    "one of weight 0": lambda x, y, z, o: ops.linear([x, y, z], [0.3, 0, 0.7], out=o),
    "slerp": lambda x, y, z, o: ops.slerp(x, y, 0.3, out=o),
    "slerp of opposites": lambda x, y, z, o: ops.slerp(x, -x, 0.5, out=o),
    "nuslerp": lambda x, y, z, o: ops.nuslerp(x, y, [1, 2], base=z, out=o),
    "model_stock": lambda x, y, z, o: ops.model_stock(z, [x, y], out=o),
    "task_arithmetic": lambda x, y, z, o: ops.task_arithmetic(z, [x, y], [0.3, 0.7], out=o),
    "ties": lambda x, y, z, o: ops.ties(z, [x, y], [0.3, 0.7], density=[0.5, 0.2], out=o),
    "ties of deltas": lambda x, y, z, o: ops.ties(
        None, [x, y, z], [1, 2, 3], density=0.4, votes="plain", divisor="count", out=o
    ),
    "ties with one of weight 0": lambda x, y, z, o: ops.ties(z, [x, y], [0, 1], density=0.5, out=o),
    "ties of equals": lambda x, y, z, o: ops.ties(
        z, [z.clone(), z.clone()], [1, 2], density=0.5, out=o
    ),
    "ties that keep all ties": lambda x, y, z, o: ops.ties(
        z, [x.round(), y.round()], [1, 2], density=0.5, ties="all", out=o
    ),
    "breadcrumbs": lambda x, y, z, o: ops.breadcrumbs(
        z, [x, y], [1, 2], density=0.5, gamma=0.1, out=o
    ),
    "dare": lambda x, y, z, o: ops.dare_linear(z, [x, y], [1, 2], density=0.5, seed=3, out=o),
    "dare by density": lambda x, y, z, o: ops.dare_ties(
        z, [x, y], [1, 2], density=0.5, seed=3, rescale="density", out=o
    ),
    "della": lambda x, y, z, o: ops.della(z, [x, y], [1, 2], density=0.5, seed=3, out=o),
    "combine": lambda x, y, z, o: ops.combine([x, y, z], [0.25, -0.0, 2], out=o),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_gives_the_bits_of_the_computation(call, dtype, monkeypatch):
    x, y, z = (torch.from_numpy(array).to(dtype) for array in (A, B, BASE))

    def bits(out=None):
        return call(x, y, z, out).view(torch.uint8).numpy().tobytes()

    of_tensors._forms.clear()
    arrays._known.clear()
    first, programs = bits(), bits()  # the first call checks, the second may be a program
    assert programs == bits(torch.empty_like(x)) == first
    of_tensors._forms.clear()
    monkeypatch.setattr(of_tensors, "program_of", lambda *_, **__: None)
    assert bits() == first


def test_errors_of_a_rule_name_the_tensor_at_every_call():
    for _ in range(3):
        with pytest.raises(fastmerge.FastmergeError, match=r"^w: linear: .*sum to 0") as caught:
            ops.merge("linear", [A, B], {"weight": [1.0, -1.0]}, name="w")
        assert "\n" not in str(caught.value)


def test_programs_of_many_names_are_bounded():
    def drawn(index):
        return ops.dare_linear(BASE, [A], [1.0], density=0.5, seed=1, name=f"w{index}").tobytes()

    made = [drawn(index) for index in range(2 * of_tensors._MOST_NAMES)]
    assert len(set(made)) == len(made)
    assert made == [drawn(index) for index in range(2 * of_tensors._MOST_NAMES)]
    for form in of_tensors._forms.values():
        assert len(form.programs) <= of_tensors._MOST_NAMES


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("count", [1, 31, 33, 2048, 2049, 65_599, 140_001])
def test_a_draw_that_is_kept_is_the_one_that_is_drawn_again(count, isa):
    x, y, base = RNG.standard_normal((3, count), dtype=np.float32)
    before = _C.isa()
    _C.set_isa(isa)
    try:
        for call in (
            lambda: ops.dare_linear(base, [x, y], [0.3, 0.7], density=[0.5, 0.3], seed=3),
            lambda: ops.dare_ties(None, [x, y], [0.3, 0.7], density=[1.0, 0.3], seed=3, threads=2),
        ):
            of_tensors._forms.clear()
            arrays._known.clear()
            first = call()  # draws to measure, and again to merge
            assert call().tobytes() == call().tobytes() == first.tobytes()
    finally:
        _C.set_isa(before)


def test_what_is_named_otherwise_is_refused_after_a_call_that_was_taken():
    def drawn(**how):
        return ops.dare_linear(BASE, [A], [1.0], density=0.5, **{"seed": 1} | how)

    taken = [drawn() for _ in range(3)]
    assert drawn(seed=np.int64(1)).tobytes() == taken[0].tobytes()
    for how, wrong in (
        ({"seed": True}, "'seed' must be a whole number"),
        ({"seed": 1.0}, "'seed' must be a whole number"),
        ({"name": 3}, "name: must be text, not 3"),
        ({"name": []}, "name: must be text"),
    ):
        with pytest.raises(fastmerge.FastmergeError, match=wrong):
            drawn(**how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.5])
def test_slerp_in_numbers_gives_the_bits_of_slerp_in_arrays(t, dtype, monkeypatch):
    x, y = (torch.from_numpy(array).to(dtype) for array in (A, B))
    for other in (y, -x, x.clone(), x * 0, torch.full_like(x, float("nan"))):
        of_tensors._forms.clear()
        made = [ops.slerp(x, other, t).view(torch.uint8).numpy().tobytes() for _ in range(3)]
        of_tensors._forms.clear()
        with monkeypatch.context() as patched:
            patched.setattr(of_tensors, "program_of", lambda *_, **__: None)
            wanted = ops.slerp(x, other, t).view(torch.uint8).numpy().tobytes()
        assert made == [wanted] * 3


@pytest.mark.parametrize("count", [1, 2, 63, 2048, 2049, 8192, 8193])
def test_small_trims_keep_exactly_as_many(count):
    x = np.round(RNG.standard_normal(count, dtype=np.float32) * 4)  # with many ties
    for density in (0.01, 0.5, 0.99):
        keep = max(1, int(density * count))
        made = ops.ties(None, [x], [1.0], density=density)
        threshold = np.sort(np.abs(x))[::-1][keep - 1]
        assert (np.abs(made) > threshold).sum() == (np.abs(x) > threshold).sum()
        assert (made != 0).sum() == min(keep, (x != 0).sum())


def test_an_out_whose_computation_torch_recorded_is_refused():
    """Its gradient would go on to what it was computed from, whose values it no longer has."""
    a, b = torch.from_numpy(A), torch.from_numpy(B)
    leaf = a.clone().requires_grad_()
    before = (leaf * 2).detach()
    for _ in range(3):  # checked, and known
        out = leaf * 2
        for call in (ops.linear, ops.combine):
            with pytest.raises(fastmerge.FastmergeError, match=r"out: .*out\.detach\(\)"):
                call([a, b], [0.3, 0.7], out=out)
        with pytest.raises(fastmerge.FastmergeError, match=r"out\.detach"):
            ops.sce(a, [b, a], out=out)
        assert torch.equal(out.detach(), before)
        with torch.no_grad():
            assert torch.equal(
                ops.linear([a, b], [0.3, 0.7], out=out), ops.linear([a, b], [0.3, 0.7])
            )
        assert ops.linear([a, b], [0.3, 0.7], out=leaf) is leaf
        leaf = a.clone().requires_grad_()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"density": 1.5}, "prune: 'density' must be in"),
        ({"density": 0.5, "how": "random"}, "prune: 'seed' must be"),
        ({"density": 0.5, "rescale": "x"}, "prune: 'rescale' must be"),
    ],
)
def test_prune_speaks_of_itself(arguments: dict[str, Any], said: str) -> None:
    """And not of the methods that it is made of."""
    with pytest.raises(fastmerge.FastmergeError, match=f"^{said}"):
        ops.prune(np.ones(8, np.float32), **arguments)
