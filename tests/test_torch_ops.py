"""fastmerge's operators in programs of torch's, and gradients through merges."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import fastmerge
from fastmerge import FastmergeError, ops

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from fastmerge.integrations import torch_ops  # noqa: E402

# In fp32: steps of 1/100, so that rounding of sums stays below a thousandth of a difference.
NUMERIC = {"eps": 1e-2, "atol": 2e-3, "rtol": 2e-3}


def drawn(count: int, *shape: int, grad: bool = False) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=made).requires_grad_(grad) for _ in range(count)]


def double(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


W = [0.3, 0.9]
EVERY = {
    "linear": lambda c, a, b: ops.linear([a, b], W),
    "slerp": lambda c, a, b: ops.slerp(a, b, 0.3),
    "nuslerp": lambda c, a, b: ops.nuslerp(a, b, W, base=c, flatten=False),
    "multislerp": lambda c, a, b: ops.multislerp([a, b], W, base=c),
    "karcher": lambda c, a, b: ops.karcher([a, b, c]),
    "model_stock": lambda c, a, b: ops.model_stock(c, [a, b]),
    "task_arithmetic": lambda c, a, b: ops.task_arithmetic(c, [a, b], W, lambda_=0.5),
    "ties": lambda c, a, b: ops.ties(c, [a, b], W, density=[0.5, 0.7], rescale=True),
    "ties of deltas": lambda c, a, b: ops.ties(
        None, [a, b], W, density=0.5, votes="plain", divisor="count"
    ),
    "dare_linear": lambda c, a, b: ops.dare_linear(c, [a, b], W, density=0.5, seed=3, name="x"),
    "dare_ties": lambda c, a, b: ops.dare_ties(
        c, [a, b], W, density=0.5, seed=3, rescale="density"
    ),
    "breadcrumbs": lambda c, a, b: ops.breadcrumbs(c, [a, b], W, density=0.8),
    "della": lambda c, a, b: ops.della(c, [a, b], W, density=0.5, seed=3),
    "sce": lambda c, a, b: ops.sce(c, [a, b], select_topk=0.5),
    "nearswap": lambda c, a, b: ops.nearswap(c, a, 0.1),
    "magmax": lambda c, a, b: ops.magmax(c, [a, b]),
    "prune": lambda c, a, b: ops.prune(a, 0.5, "random", seed=2),
    "passthrough": lambda c, a, b: ops.passthrough(a, scale=0.5),
    "combine": lambda c, a, b: ops.combine([a, b, c], [1.0, -1.0, 0.5]),
    "merge": lambda c, a, b: ops.merge("ram", [a, b], base=c),
}


def everything(c, a, b):
    return tuple(call(c, a, b) for call in EVERY.values())


def test_every_op_compiles_without_a_break_and_exports():
    tensors = drawn(3, 6, 8)
    expected = everything(*tensors)

    class Module(torch.nn.Module):
        def forward(self, c, a, b):
            return everything(c, a, b)

    compiled = torch.compile(everything, fullgraph=True, backend="eager")(*tensors)
    exported = torch.export.export(Module(), tuple(tensors))
    for name, eager, *others in zip(
        EVERY, expected, compiled, exported.module()(*tensors), strict=True
    ):
        assert all(torch.equal(eager, other) for other in others), name
    # One operator for each call, and nothing that was computed while it was recorded.
    called = [str(n.target) for n in exported.graph.nodes if "fastmerge." in str(n.target)]
    assert len(called) == len(EVERY)


def test_a_compiled_call_follows_numbers_and_shapes():
    compiled = torch.compile(
        lambda a, b, t: ops.slerp(a, b, t), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for size in (3, 5, 9):
        a, b = drawn(2, size, 4)
        for t in (0.0, 0.25, 1.0):
            assert torch.equal(compiled(a, b, t), ops.slerp(a, b, t))


def test_out_and_types_of_a_compiled_call():
    a, b = drawn(2, 5, 3)

    def mixed(a, b, out):
        return ops.linear([a, b], W, out=out)

    for one, other, kind in ((a, b, torch.float16), (a.bfloat16(), b.bfloat16(), torch.bfloat16)):
        out, again = torch.empty(5, 3, dtype=kind), torch.empty(5, 3, dtype=kind)
        torch.compile(mixed, fullgraph=True, backend="aot_eager")(one, other, out)
        mixed(one, other, again)
        # The result is rounded once to the inputs' type, then to out's.
        torch.testing.assert_close(out, again, rtol=2e-3, atol=1e-4)
    made = torch.compile(lambda a, b: ops.linear([a, b], W), fullgraph=True, backend="aot_eager")
    assert made(a, b.half()).dtype == torch.float32
    assert torch.equal(made(a, b.half()), ops.linear([a, b.half()], W))


def test_gram_in_a_compiled_function_is_an_array():
    a, b, c = drawn(3, 4, 4)
    compiled = torch.compile(
        lambda a, b, c: ops.gram([a, b], base=c), fullgraph=True, backend="aot_eager"
    )
    np.testing.assert_array_equal(compiled(a, b, c), ops.gram([a, b], base=c))


@pytest.mark.parametrize("name", ["slerp", "ties", "combine"])
def test_a_trace_records_the_call_and_no_numbers(name):
    call = EVERY[name]
    traced = torch.jit.trace(lambda c, a, b: call(c, a, b), drawn(3, 4, 4), check_trace=False)
    others = [tensor + 1 for tensor in drawn(3, 4, 4)]
    assert torch.equal(traced(*others), call(*others))


def test_a_trace_of_an_array_is_refused():
    with pytest.raises(FastmergeError, match=r"gram: torch\.jit\.trace .*torch_ops\.gram"):
        torch.jit.trace(lambda a: torch.from_numpy(ops.gram([a])), drawn(1, 4), check_trace=False)


@pytest.mark.parametrize("name", ["slerp", "ties", "combine"])
def test_make_fx_records_the_call_and_no_numbers(name):
    """It recorded empty_like alone: whatever was in memory there."""
    call = EVERY[name]
    recorded = make_fx(lambda c, a, b: call(c, a, b))(*drawn(3, 4, 4))
    others = [tensor + 1 for tensor in drawn(3, 4, 4)]
    assert torch.equal(recorded(*others), call(*others))


CONSTANTS = {
    "gram": lambda x: torch.from_numpy(ops.gram([x])),
    "coefficient_gradients": lambda x: torch.from_numpy(
        ops.coefficient_gradients({"w": x}, [{"w": x}])["w"]
    ),
    "merge_state_dicts": lambda x: fastmerge.merge_state_dicts(
        [{"w": x}, {"w": x}], "linear", parameters={"weight": 1}
    )["w"],
}


@pytest.mark.parametrize("record", ["make_fx", "trace"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_what_a_trace_would_keep_as_constants_is_refused(name, record):
    recorders = {
        "make_fx": lambda call, x: make_fx(call)(x),
        "trace": lambda call, x: torch.jit.trace(call, (x,), check_trace=False),
    }
    with pytest.raises(FastmergeError, match=f"^{name}: .* as constants"):
        recorders[record](CONSTANTS[name], torch.ones(4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: ops.linear([a, b], W, out=torch.zeros(2, 3, 4)),
        lambda a, b: ops.combine([a, b], W, out=torch.zeros(3, 4, dtype=torch.int64)),
        lambda a, b: ops.linear([a, b], torch.tensor(W)),
        lambda a, b: ops.linear([a, b[:2]], W),
    ],
    ids=["an out of another shape", "an out of integers", "weights in a tensor", "other shapes"],
)
def test_what_a_call_refuses_a_recorded_one_does_too(call):
    """torch's copy spreads over other shapes, and cuts fractions off."""
    a, b = drawn(2, 3, 4)
    with pytest.raises(FastmergeError):
        make_fx(call)(a, b)
    with pytest.raises(Exception, match=r"fastmerge|FastmergeError"):
        torch.compile(call, fullgraph=True, backend="eager")(a, b)


FORWARD = {
    "by a tensor": lambda x: torch_ops.linear([x, x], W),
    "by weights": lambda x: torch_ops.combine([x.detach(), x.detach()], x[:2, 0]),
    "by t": lambda x: torch_ops.slerp(x.detach(), x.detach() + 1, x[0, 0]),
    "by a base": lambda x: torch_ops.gram([x.detach()], base=x),
}


@pytest.mark.parametrize("call", FORWARD.values(), ids=FORWARD)
def test_forward_mode_is_refused(call):
    """Its tangents were 0."""
    x = torch.rand(3, 4)
    with pytest.raises(FastmergeError, match="forward-mode gradients"):
        torch.func.jvp(call, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(FastmergeError, match="forward-mode gradients"):
        call(forward_ad.make_dual(x, x))


@pytest.mark.parametrize(
    "operator, arguments, given",
    [
        ("combine", lambda a, b, c: ([a, b], double(*W)), {}),
        ("gram", lambda a, b, c: ([a], c), {}),
        ("task_arithmetic", lambda a, b, c: ([a, b], c), {"weight": W, "normalize": True}),
        ("ties", lambda a, b, c: ([x.detach() for x in (a, b)], c.detach()), {"weight": W}),
        (
            "dare_linear",
            lambda a, b, c: ([a.detach()], None),
            {"weight": [1.0], "density": [0.5], "seed": 1, "rescale": "density"},
        ),
    ],
)  # fmt: skip
def test_operators_are_what_torch_asks_of_them(operator, arguments, given):
    a, b, c = drawn(3, 3, 4, grad=True)
    found = torch.library.opcheck(
        getattr(torch.ops.fastmerge, operator).default, arguments(a, b, c), given
    )
    assert set(found.values()) == {"SUCCESS"}


FLOWS = {
    "combine": (lambda w, c, a, b: torch_ops.combine([a, b], w), double(*W)),
    "linear": (lambda w, c, a, b: torch_ops.linear([a, b], w), double(*W)),
    "linear, as it is": (
        lambda w, c, a, b: torch_ops.linear([a, b], w, normalize=False), double(*W)
    ),
    "task_arithmetic": (
        lambda w, c, a, b: torch_ops.task_arithmetic(c, [a, b], w[:2], lambda_=w[2]),
        double(*W, 0.5),
    ),
    "slerp": (lambda w, c, a, b: torch_ops.slerp(a, b, w[0]), double(0.3)),
    "nuslerp": (lambda w, c, a, b: torch_ops.nuslerp(a, b, w, base=c), double(*W)),
    "gram": (lambda w, c, a, b: torch_ops.gram([a, b], base=c), double()),
    "operator": (
        lambda w, c, a, b: torch.ops.fastmerge.task_arithmetic([a, b], c, weight=W), double()
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # not float64
@pytest.mark.parametrize("flow, weights", FLOWS.values(), ids=FLOWS)
def test_gradients_to_weights_and_tensors(flow, weights):
    inputs = (weights, *drawn(3, 3, 4, grad=True))
    assert torch.autograd.gradcheck(flow, inputs, **NUMERIC)
    assert torch.autograd.gradgradcheck(flow, inputs, **NUMERIC)


SAME = {
    "linear": (lambda o, c, a, b: o.linear([a, b], W)),
    "task_arithmetic": (lambda o, c, a, b: o.task_arithmetic(c, [a, b], W, lambda_=0.5)),
    "normalized": (lambda o, c, a, b: o.task_arithmetic(c, [a, b], W, normalize=True)),
    "slerp": (lambda o, c, a, b: o.slerp(a, b, 0.3)),
    "slerp of near ones": (lambda o, c, a, b: o.slerp(a, a + 0.001 * b, 0.3)),
    "slerp of nothing": (lambda o, c, a, b: o.slerp(0 * a, b, 0.3)),
    "nuslerp": (lambda o, c, a, b: o.nuslerp(a, b, W)),
    "nuslerp of deltas": (lambda o, c, a, b: o.nuslerp(a, b, W, base=c)),
    "combine": (lambda o, c, a, b: o.combine([a, b], W)),
}


@pytest.mark.parametrize("call", SAME.values(), ids=SAME)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_values_are_those_of_ops(call, kind):
    tensors = [tensor.to(kind) for tensor in drawn(3, 40, 8)]
    made, expected = call(torch_ops, *tensors), call(ops, *tensors)
    assert made.dtype == expected.dtype
    tolerance = 1e-6 if kind == torch.float32 else 2**-7
    torch.testing.assert_close(made, expected, rtol=tolerance, atol=1e-6)


def test_gradients_of_narrow_types_and_of_views():
    a, b = (tensor.bfloat16().requires_grad_() for tensor in drawn(2, 64, 8))
    weights = double(*W)
    torch_ops.combine([a.T, b.T], weights).sum().backward()  # an expanded gradient, no memory
    assert a.grad.dtype == torch.bfloat16
    assert torch.equal(a.grad, torch.full_like(a, 0.3))
    exact = torch.stack([a.detach().double().sum(), b.detach().double().sum()])
    torch.testing.assert_close(weights.grad, exact, rtol=1e-6, atol=1e-6)


def test_weights_are_learned_in_a_compiled_step():
    a, b = drawn(2, 16, 4)
    target = 0.2 * a + 0.8 * b
    weights = torch.nn.Parameter(torch.tensor([0.5, 0.5], dtype=torch.float64))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss() -> torch.Tensor:
        return ((torch_ops.linear([a, b], weights) - target) ** 2).mean()

    optimizer = torch.optim.SGD([weights], lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    found = (weights / weights.sum()).detach()
    torch.testing.assert_close(found, torch.tensor([0.2, 0.8]).double(), rtol=0, atol=1e-3)


def test_what_has_no_gradient_says_so():
    a, b, c = drawn(3, 3, 4, grad=True)
    assert not ops.linear([a, b], W).requires_grad  # as its page says
    made = torch.ops.fastmerge.ties([a, b], c, weight=W, density=[0.5, 0.5])
    with pytest.raises(RuntimeError, match=r"fastmerge\.ties.*no autograd formula"):
        made.sum().backward()
    nan = torch.full((3, 4), torch.nan)
    torch_ops.combine([a], double(1.0)).backward(nan)  # a scaler of losses looks for it
    assert a.grad.isnan().all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: torch_ops.linear([a, a], [1.0]), "linear: 2 tensors but weights of shape"),
        (lambda a: torch_ops.combine([a, a], double(1.0)), "2 tensors but coefficients of"),
        (lambda a: torch_ops.combine(3, [1.0]), "combine: tensors: must be a list, not 3"),
        (lambda a: torch_ops.combine([a.double()], [1.0]), "cannot merge float64 tensors"),
        (lambda a: torch.ops.fastmerge.combine([a], double(1.0, 2.0)), "1 tensors but coeff"),
        (lambda a: torch.ops.fastmerge.slerp([a, a], None), "slerp: 't' is required"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(FastmergeError, match=message):
        call(torch.ones(3))


def test_coefficient_gradients_are_inner_products():
    names = {"w": (7, 5), "v": (300,)}
    grads, one, two, base = (
        {name: torch.randn(*shape) for name, shape in names.items()} for _ in range(4)
    )
    one["unused"] = torch.ones(2)
    plain = ops.coefficient_gradients(grads, [one, two])
    from_base = ops.coefficient_gradients(grads, [one, two], base)
    assert list(plain) == list(from_base) == ["w", "v"]
    for name, grad in grads.items():
        g, x, y, origin = (t.double().flatten() for t in (grad, one[name], two[name], base[name]))
        exact = [float(g @ x), float(g @ y)]
        np.testing.assert_allclose(plain[name], exact, rtol=1e-6, atol=1e-6)
        exact = [float(g @ (x - origin)), float(g @ (y - origin))]
        np.testing.assert_allclose(from_base[name], exact, rtol=1e-6, atol=1e-6)
        coefficients = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
        torch_ops.combine([one[name], two[name]], coefficients).backward(grad)
        np.testing.assert_allclose(plain[name], coefficients.grad, rtol=1e-12)


def test_coefficient_gradients_refuse_what_does_not_fit():
    x = {"w": np.ones(3, np.float32)}
    with pytest.raises(FastmergeError, match=r"models\[1\] has no tensor 'w'; did you mean 'w2'"):
        ops.coefficient_gradients(x, [x, {"w2": x["w"]}])
    with pytest.raises(FastmergeError, match="w: shapes differ"):
        ops.coefficient_gradients(x, [{"w": np.ones(4, np.float32)}])
    with pytest.raises(FastmergeError, match="base must be a mapping"):
        ops.coefficient_gradients(x, [x], x["w"])
    with pytest.raises(FastmergeError, match="no models"):
        ops.coefficient_gradients(x, [])


def test_ops_of_arrays_import_no_torch():
    code = (
        "import sys, numpy as np; from fastmerge import ops; x = np.ones(4, np.float32);"
        "ops.combine([x, x], [1, 1]); ops.slerp(x, x, 0.5); ops.gram([x]);"
        "import fastmerge.integrations.torch_ops; print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
