"""The in-memory API: NumPy and torch, every dtype, out=, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmerge
from fastmerge import ops
from fastmerge.errors import FastmergeError

RNG = np.random.default_rng(3)
A, B, BASE = (RNG.normal(size=(37, 53)).astype(np.float32) for _ in range(3))
X, Y = BASE + 0.1 * A, BASE + 0.1 * B


def slerp64(a, b, t):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    angle = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def test_numpy_slerp():
    out = ops.slerp(A, B, 0.3)
    assert isinstance(out, np.ndarray) and out.dtype == np.float32
    np.testing.assert_allclose(out, slerp64(A, B, 0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_dtypes(dtype):
    a, b = torch.tensor(A).to(dtype), torch.tensor(B).to(dtype)
    out = ops.slerp(a, b, 0.3)
    assert out.dtype == dtype and out.shape == a.shape
    exact = torch.tensor(slerp64(a.double(), b.double(), 0.3))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ends_give_the_inputs_back_bit_for_bit(dtype, t):
    a, b = torch.tensor(A).to(dtype), torch.tensor(B).to(dtype)
    a[0, 0], b[0, 0] = -0.0, -0.0
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(ops.slerp(a, b, t).view(bits), (a, b)[int(t)].view(bits))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.77])
def test_slerp_is_symmetric(t):
    a, b = torch.tensor(A), torch.tensor(B)
    torch.testing.assert_close(ops.slerp(a, b, t), ops.slerp(b, a, 1 - t), rtol=1e-5, atol=1e-6)


def test_linear_does_not_mind_the_order():
    got = ops.linear([X, Y, BASE], [0.2, 0.5, 0.3])
    again = ops.linear([BASE, X, Y], [0.3, 0.2, 0.5])
    np.testing.assert_allclose(got, again, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got, 0.2 * X + 0.5 * Y + 0.3 * BASE, rtol=1e-5, atol=1e-6)


def test_uint16_holds_bfloat16_bits():
    a, b = torch.tensor(A).bfloat16(), torch.tensor(B).bfloat16()
    bits = ops.slerp(a.view(torch.uint16).numpy(), b.view(torch.uint16).numpy(), 0.4)
    assert bits.dtype == np.uint16
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), ops.slerp(a, b, 0.4))


def test_ml_dtypes_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    out = ops.linear([A.astype(ml_dtypes.bfloat16), B.astype(ml_dtypes.bfloat16)], [1, 1])
    assert out.dtype == ml_dtypes.bfloat16


def test_mixed_dtypes_give_float32():
    out = ops.linear([torch.tensor(A).bfloat16(), torch.tensor(B).half()], [1, 1])
    assert out.dtype == torch.float32


def test_out_is_filled_and_returned():
    out = np.full_like(A, np.nan)
    assert ops.slerp(A, B, 0.5, out=out) is out
    np.testing.assert_array_equal(out, ops.slerp(A, B, 0.5))


def test_in_place():
    expected = ops.ties(BASE, [X, Y], [1, 1], density=0.5)
    x = X.copy()
    ops.ties(BASE, [x, Y], [1, 1], density=0.5, out=x)
    np.testing.assert_array_equal(x, expected)


def test_out_of_another_dtype():
    a, b = torch.tensor(A).bfloat16(), torch.tensor(B).bfloat16()
    out = torch.empty(a.shape, dtype=torch.float32)
    ops.slerp(a, b, 0.5, out=out)
    assert torch.equal(out.bfloat16(), ops.slerp(a, b, 0.5))


def test_ties_by_hand():
    base = np.zeros(6, np.float32)
    x = np.array([1, -2, 3, 0.1, -0.2, 5], np.float32)
    y = np.array([-3, -1, 0.2, 4, 0.3, 6], np.float32)
    # Density 1/2 keeps {-2, 3, 5} and {-3, 4, 6}; the last entry agrees and is averaged.
    got = ops.ties(base, [x, y], [1, 1], density=0.5)
    np.testing.assert_allclose(got, [-3, -2, 3, 4, 0, 5.5])
    # Untrimmed: -2, -1 and 3, .2 agree; 1 against -3 elects minus; -.2 against .3 elects plus.
    got = ops.ties(base, [x, y], [1, 1])
    np.testing.assert_allclose(got, [-3, -1.5, 1.6, 2.05, 0.3, 5.5])


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1, 1), (2, -1), (0.25, 0.75), (0.3, 0.4), (0, 1)])
def test_the_divisor_is_exact_whatever_the_weights(weights):
    """Bit for bit the fp32 quotient, also where a sum of weights is 0."""
    base, x, y = (np.float32(v) for v in (BASE, X, Y))
    w = np.float32(weights)
    d = [(v - base) * wi for v, wi in zip((x, y), w, strict=True)]
    plus = np.float32(0) + d[0] + d[1] >= 0
    agree = [np.where(plus, v > 0, v < 0) for v in d]
    top = np.float32(0) + d[0] * agree[0] + d[1] * agree[1]
    bottom = agree[0] * w[0] + agree[1] * w[1]
    bottom[bottom == 0] = 1
    np.testing.assert_array_equal(ops.ties(base, [x, y], weights), base + top / bottom)


def test_density_per_model_and_lambda():
    one = ops.ties(BASE, [X, Y], [1, 1], density=[0.3, 1.0])
    both = ops.ties(BASE, [X, Y], [1, 1], density=0.3)
    assert not np.array_equal(one, both)
    half = ops.ties(BASE, [X, Y], [1, 1], density=0.3, lambda_=0.5)
    np.testing.assert_allclose(half - BASE, (both - BASE) / 2, atol=1e-6)


def test_task_arithmetic():
    got = ops.task_arithmetic(BASE, [X, Y], [0.5, 2.0], lambda_=0.5)
    expected = BASE + 0.5 * (0.5 * (X - BASE) + 2.0 * (Y - BASE))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_dare_is_a_function_of_seed_and_name():
    def run(seed, name):
        return ops.dare_ties(BASE, [X, Y], [1, 1], density=0.5, seed=seed, name=name)

    np.testing.assert_array_equal(run(1, "w"), run(1, "w"))
    assert not np.array_equal(run(1, "w"), run(2, "w"))
    assert not np.array_equal(run(1, "w"), run(1, "v"))


def test_dare_linear_keeps_the_l1_norm_and_drops_half():
    big = np.zeros(100_000, np.float32)
    x = np.abs(RNG.normal(size=big.size)).astype(np.float32)
    got = ops.dare_linear(big, [x], [1], density=0.5, seed=1)
    assert abs((got != 0).mean() - 0.5) < 0.01
    assert got.sum(dtype=np.float64) == pytest.approx(x.sum(dtype=np.float64), rel=1e-6)


def test_other_methods_match_their_recipes_in_float64():
    d = [np.float64(v) - BASE for v in (X, Y)]
    cosine = np.sum(d[0] * d[1]) / np.linalg.norm(d[0]) / np.linalg.norm(d[1])
    t = 2 * cosine / (1 + cosine)
    expected = t * (X + Y) / 2 + (1 - t) * BASE
    np.testing.assert_allclose(ops.model_stock(BASE, [X, Y]), expected, atol=1e-5)
    np.testing.assert_allclose(
        ops.nuslerp(X, Y, [0.7, 0.3], base=BASE), BASE + slerp64(d[0], d[1], 0.3), atol=1e-5
    )
    np.testing.assert_allclose(ops.nuslerp(A, B, [0.7, 0.3]), slerp64(A, B, 0.3), atol=1e-5)
    np.testing.assert_allclose(ops.karcher([A, B]), 0.5 * ops.karcher([2 * A, 2 * B]), atol=1e-5)
    halfway = slerp64(A, B, 0.5)
    mean_norm = (np.linalg.norm(A) + np.linalg.norm(B)) / 2
    unit = A / np.linalg.norm(A) + B / np.linalg.norm(B)
    unit /= np.linalg.norm(unit)
    np.testing.assert_allclose(ops.karcher([A, B]), mean_norm * unit, atol=1e-5)
    np.testing.assert_allclose(ops.multislerp([A, B], [1, 1]), mean_norm * unit, atol=1e-5)
    assert np.linalg.norm(halfway) <= max(np.linalg.norm(A), np.linalg.norm(B))
    np.testing.assert_array_equal(ops.passthrough(A, scale=0.5), A / 2)


@pytest.mark.parametrize("axis", [0, 1])
def test_nuslerp_by_vector(axis):
    got = ops.nuslerp(A, B, [0.4, 0.6], flatten=False, row_wise=axis == 0)
    a, b = (A, B) if axis == 1 else (A.T, B.T)
    expected = np.stack([slerp64(u, v, 0.6) for u, v in zip(a, b, strict=True)])
    np.testing.assert_allclose(got, expected if axis == 1 else expected.T, atol=1e-5)


def test_model_stock_filter_wise():
    got = ops.model_stock(BASE, [X, Y], filter_wise=True)
    rows = [ops.model_stock(BASE[r], [X[r], Y[r]]) for r in range(len(BASE))]
    np.testing.assert_allclose(got, rows, atol=1e-6)


def test_gram_and_combine():
    flat = np.float64([A.ravel(), B.ravel()])
    np.testing.assert_allclose(ops.gram([A, B]), flat @ flat.T, rtol=1e-12)
    shifted = np.float64([BASE.ravel(), (A - BASE).ravel(), (B - BASE).ravel()])
    np.testing.assert_allclose(ops.gram([A, B], base=BASE), shifted @ shifted.T, rtol=1e-12)
    np.testing.assert_allclose(ops.combine([A, B], [2, -1]), 2 * A - B, atol=1e-5)


def test_empty_and_single():
    empty = np.zeros((0, 4), np.float32)
    assert ops.slerp(empty, empty, 0.5).shape == (0, 4)
    assert ops.ties(empty, [empty], [1], density=0.5).shape == (0, 4)
    one = np.float32([2.0])
    np.testing.assert_allclose(ops.ties(one * 0, [one], [1], density=0.1), [2.0])


def test_scalar_shape():
    a, b = torch.tensor(2.0), torch.tensor(4.0)
    assert ops.linear([a, b], [1, 1]).item() == 3.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.slerp(A, B[:5], 0.5), "shapes differ"),
        (lambda: ops.slerp(A, torch.tensor(B), 0.5), "do not mix"),
        (lambda: ops.slerp(A.astype(np.int32), B.astype(np.int32), 0.5), "cannot merge int32"),
        (lambda: ops.slerp(A.T, B.T, 0.5), "not contiguous"),
        (lambda: ops.slerp(torch.tensor(A).T, torch.tensor(B).T, 0.5), "not contiguous"),
        (lambda: ops.slerp(A, B, "half"), "'t' must be a number"),
        (lambda: ops.linear([], []), "got 0 tensors"),
        (lambda: ops.linear([A, B], [1]), "2 tensors but 1 values for 'weights'"),
        (lambda: ops.linear([A, B], [1, -1]), "sum to 0"),
        (lambda: ops.model_stock(None, [A, B]), "needs a base"),
        (lambda: ops.ties(BASE, [X], [1], density=-0.1), r"in \[0, 1\]"),
        (lambda: ops.slerp(A, B, 0.5, out=np.zeros(3, np.float32)), "shape"),
        (lambda: ops.slerp(A, B, 0.5, out=[1]), "must be of the inputs' kind"),
        (lambda: ops.combine([A, B], [1]), "2 tensors but 1 coefficients"),
        (lambda: ops.combine([A, B], [1, np.nan]), "'coefficients' must be finite"),
        (lambda: ops.combine([A, B], [1, 10**5000]), "'coefficients' must be finite"),
        (lambda: ops.combine([A, B], np.eye(2)), "'coefficients' must be a number"),
        (lambda: ops.combine([A, B], [1, "2"]), "'coefficients' must be a number"),
        (lambda: ops.slerp(A, B, np.array([0.1, 0.2])), "'t' must be a number"),
        (lambda: ops.linear([A, B], [torch.tensor([0.5, 0.5]), 1]), "'weights' must be a number"),
        (lambda: ops.linear([A, B], torch.ones(2, device="meta")), "no numbers"),
        (lambda: ops.linear([A], [1], out=np.ones((37, 106), np.float32)[:, ::2]), "copy from it"),
        (lambda: ops.linear([A.astype(">f4")], [1]), "newbyteorder"),
        (lambda: ops.linear([torch.ones(1).expand(9)], [1]), "not contiguous"),
        (lambda: ops.gram([], base=A), "no tensors"),
        (lambda: ops.linear([A, B], [0.5, None]), "'weights' must be a number, not None"),
        (lambda: ops.linear([A, B], None), "'weights' must be a number, not None"),
        (lambda: ops.slerp(A, B, 10**400), "'t' must be finite"),
        (lambda: ops.dare_ties(BASE, [X], [1], density=0.5, seed=1.0), "'seed' must be a whole"),
        (lambda: ops.dare_ties(BASE, [X], [1], density=0.5, seed=-1), "'seed' must be a whole"),
        (lambda: ops.slerp(A, B, 0.5, threads=0), "threads"),
        (lambda: ops.slerp(A, B, 0.5, threads="2"), "not a whole number of threads"),
    ],
)
def test_refusals_are_one_clear_line(call, message):
    with pytest.raises(FastmergeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_read_only_and_overlapping_outputs_are_refused():
    frozen = A.copy()
    frozen.flags.writeable = False
    with pytest.raises(FastmergeError, match="read-only"):
        ops.slerp(A, B, 0.5, out=frozen)
    memory = np.zeros(A.size + 8, np.float32)
    x, out = memory[: A.size].reshape(A.shape), memory[8:].reshape(A.shape)
    with pytest.raises(FastmergeError, match="overlaps"):
        ops.slerp(x, B, 0.5, out=out)


def test_meta_tensors_are_refused_by_name():
    a = torch.empty(3, device="meta")
    with pytest.raises(FastmergeError, match="no kernels for device 'meta'"):
        ops.slerp(a, a, 0.5)


def test_the_package_says_its_version():
    assert fastmerge.__version__


def test_numbers_of_numpy_and_torch_are_numbers():
    weights = [0.25, 0.75]
    expected = ops.linear([A, B], weights)
    given = torch.nn.Parameter(torch.tensor(weights).bfloat16())
    for same in (np.float32(weights), np.array(weights), given, tuple(weights)):
        np.testing.assert_array_equal(ops.linear([A, B], same), expected)
        np.testing.assert_array_equal(ops.combine([A, B], same), expected)
    np.testing.assert_array_equal(ops.linear([A, B], np.array([1, 3])), expected)
    exact = ops.slerp(A, B, 0.5)
    for t in (np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)):
        np.testing.assert_array_equal(ops.slerp(A, B, t), exact)


def _fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(5, 7)


def _freed():
    tensor = torch.ones(5, 7)
    tensor.untyped_storage().resize_(0)
    return tensor


NO_MEMORY = {
    "fake": (_fake, "FakeTensor has no memory of its own"),
    "freed": (_freed, "memory has been freed"),
    "sparse": (lambda: torch.eye(5).to_sparse(), "sparse"),
    "sparse rows": (lambda: torch.eye(5).to_sparse_csr(), "sparse"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "negated": (lambda: torch.tensor([1 + 2j]).conj().imag, "resolve_neg"),
}


@pytest.mark.parametrize("make, message", NO_MEMORY.values(), ids=NO_MEMORY)
def test_tensors_that_are_not_their_memory_are_refused(make, message):
    tensor = make()
    with pytest.raises(FastmergeError, match=message):
        ops.linear([tensor], [1.0])
    if message in ("FakeTensor has no memory of its own", "memory has been freed"):
        plain = torch.ones(tuple(tensor.shape))
        with pytest.raises(FastmergeError, match=message):
            ops.linear([plain], [1.0], out=tensor)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize])
def test_inside_torchs_transforms_is_refused(transform):
    with pytest.raises(FastmergeError, match="has no memory of its own"):
        transform(lambda x: ops.linear([x], [1.0]))(torch.ones(3, 4))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_inside_fake_tensor_mode_is_refused():
    """Everything that torch makes there, a result too, has no memory: it ended the process."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    one, two = torch.ones(5, 7), torch.zeros(5, 7)
    for _ in range(2):  # the second is of tensors that are known
        ops.linear([one, two], [1, 1])
        with FakeTensorMode(allow_non_fake_inputs=True):
            with pytest.raises(FastmergeError, match="FakeTensor has no memory of its own"):
                ops.linear([one, two], [1, 1])
            with pytest.raises(FastmergeError, match="FakeTensor has no memory of its own"):
                fastmerge.merge_state_dicts(
                    [{"w": one}, {"w": two}], "linear", parameters={"weight": 1}
                )


def test_lazy_parameters_masks_and_what_is_no_array_are_refused():
    lazy = torch.nn.UninitializedParameter()
    with pytest.raises(FastmergeError, match="UninitializedParameter has no memory of its own"):
        ops.linear([lazy, lazy], [1, 1])
    hidden = np.ma.masked_array(A, A > 0)  # its numbers would be taken, masked or not
    for call in (
        lambda: ops.linear([hidden, hidden], [1, 1]),
        lambda: ops.linear([A, A], [1, 1], out=hidden.copy()),
        lambda: fastmerge.merge_state_dicts([{"w": hidden}], "linear", parameters={"weight": 1}),
    ):
        with pytest.raises(FastmergeError, match=r"a masked array; pass .*x.filled\(0\)"):
            call()
    for odd in (None, "x", b"1234"):
        with pytest.raises(FastmergeError, match="is no tensor and no array") as caught:
            ops.linear([odd, odd], [1, 1])
        assert "\n" not in str(caught.value)


def test_autograd_sees_the_write():
    weight = torch.nn.Parameter(torch.ones(4))
    loss = (weight * weight).sum()
    ops.linear([torch.full((4,), 5.0)], [1.0], out=weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_karcher_of_opposite_inputs():
    """mergekit 0.1.5: what is opposite to the mean does not move it. (It was 8 and 1e8.)"""
    numbers = [np.array([x], np.float32) for x in (1.0, -2.0, 3.0)]
    np.testing.assert_allclose(ops.karcher(numbers), [2.0], rtol=1e-6)
    np.testing.assert_allclose(ops.karcher([A, A, -A]), A, rtol=1e-5)


def test_multislerp_of_a_tiny_delta_keeps_its_digits():
    base = (1 + 0.05 * A).astype(np.float32)
    one, two = base.copy(), base + np.float32(0.1) * B
    one[0, 0] += np.float32(2e-5)
    d = np.stack([one - base, two - base]).astype(np.float64)
    norms = np.sqrt((d**2).sum((1, 2)))
    units = d / (norms[:, None, None] + 1e-8)
    mean = units.mean(0) / np.linalg.norm(units.mean(0))
    tau = np.mean([u - (u * mean).sum() * mean for u in units], 0)
    n = np.linalg.norm(tau) + 1e-8
    exact = base + (mean * np.cos(n) + tau * np.sin(n) / n) * norms.mean()
    got = ops.multislerp([one, two], [0.5, 0.5], base=base)
    assert norms[0] / norms[1] < 1e-5
    np.testing.assert_allclose(got, exact, rtol=1e-6)


@pytest.mark.parametrize("weights", [[-1.0, 1.0], [0.5, 0.5], [2.0, -1.0]])
@pytest.mark.parametrize("base", [None, BASE])
def test_multislerp_beside_a_model_of_weight_0_is_that_without(weights, base):
    """Weights that sum to 0 were taken for a merge that is its base."""
    wanted = ops.multislerp([A, B], weights, base=base, normalize_weights=False)
    got = ops.multislerp([-A, A, B], [0.0, *weights], base=base, normalize_weights=False)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("base", [None, BASE])
def test_multislerp_of_one_weight_has_the_formula_s_eps(base):
    """The direction itself has a tangent of length eps: 0.5 % at 0.1."""
    origin = np.zeros_like(A) if base is None else base
    got = ops.multislerp([A, B], [0.0, 1.0], base=base, eps=0.1)
    np.testing.assert_allclose(got, origin + np.cos(0.1) * (B - origin), rtol=1e-5, atol=1e-6)


def test_one_task_runs_in_the_default_floating_point_mode():
    """torch.set_flush_denormal changes the caller's mode, which small tensors are computed in."""
    tiny = torch.full((8,), 1e-41)
    torch.set_flush_denormal(True)
    try:
        out = ops.linear([tiny], [1.0])
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out.view(torch.int32), tiny.view(torch.int32)) and out[0] != 0


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher", "linear"])
def test_equal_tensors_come_out_as_their_bytes(method):
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    given = {"slerp": {"t": 0.3}, "karcher": {}}.get(method, {"weight": [0.3, 0.4]})
    found = ops.merge(method, [mask, mask.copy()], given)
    np.testing.assert_array_equal(found.view(np.uint32), mask.view(np.uint32))
