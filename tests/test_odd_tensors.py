"""Things of torch's that look like tensors or numbers and are none, wherever a call takes those:
one short line of FastmergeError each.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

import fastmerge
from fastmerge import live, ops
from fastmerge.errors import FastmergeError, RecipeError, ResourceError
from fastmerge.integrations import fusion_bench, peft, torch_ops
from fastmerge.methods import unregister
from fastmerge.search.sweep import parse_range, sweep

torch = pytest.importorskip("torch")

X = torch.arange(64.0).reshape(8, 8)
LOOP: list[object] = []
LOOP.append(LOOP)


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)


class Foreign:
    """Somebody's own class, whose code for NumPy's protocol and DLPack's fails in its own way."""

    def __init__(self, dlpack: bool, error: Exception) -> None:
        if dlpack:
            self.__dict__["__dlpack__"] = None
        self.error = error

    def __array__(self, *_: object, **__: object) -> None:
        raise self.error

    def __dlpack_device__(self) -> None:
        raise self.error


LONG = "word\n" * 9999
NO_TENSORS = {
    "an array of a failing protocol": lambda: Foreign(False, KeyError(LONG)),
    "of a failing DLPack": lambda: Foreign(True, KeyError(LONG)),
    "of a DLPack not there": lambda: Foreign(True, BufferError(LONG)),
    "of a symbolic trace": lambda: torch.fx.Proxy(torch.fx.Graph().placeholder("x")),
    "a module": lambda: torch.nn.Linear(8, 8),
    "a storage": X.untyped_storage,
    "a list of itself": lambda: LOOP,
    "nested": nested,
    "the class": lambda: torch.Tensor,
}
NO_NUMBERS = {
    "sparse": X.to_sparse,
    "compressed": X.to_sparse_csr,
    "quantised": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "nested": nested,
    "the class": lambda: torch.Tensor,
    "on meta": lambda: X.to("meta"),
    "a matrix": lambda: X,
    "a million digits": lambda: 10**400,
}
CALLS = {
    "ops.slerp": lambda x: ops.slerp(X, x, 0.5),
    "ops.ties": lambda x: ops.ties(x, [X, X], [1, 1]),
    "ops.gram": lambda x: ops.gram([X, x]),
    "ops.linear": lambda x: ops.linear(x, [1, 1]),
    "out": lambda x: ops.linear([X, X], [1, 1], out=x),
    "torch_ops.slerp": lambda x: torch_ops.slerp(X, x, 0.5),
    "torch_ops.gram": lambda x: torch_ops.gram([X, X], base=x),
    "torch_ops.linear": lambda x: torch_ops.linear([X, x], [0.5, 0.5]),
    "peft.ties": lambda x: peft.ties([X, x], torch.ones(2), 0.5),
    "state_dicts": lambda x: fastmerge.merge_state_dicts(
        [{"w": X}, {"w": x}], "linear", parameters={"weight": 1}
    ),
}
NUMBERS = {
    "weights": lambda x: ops.linear([X, X], x),
    "one weight": lambda x: ops.linear([X, X], [1, x]),
    "t": lambda x: ops.slerp(X, X, x),
    "coefficients": lambda x: ops.combine([X, X], x),
    "threads": lambda x: ops.linear([X, X], [1, 1], threads=x),
    "torch_ops.t": lambda x: torch_ops.slerp(X, X, x),
    "torch_ops.lambda": lambda x: torch_ops.task_arithmetic(X, [X], [1], lambda_=x),
    "peft.density": lambda x: peft.ties([X, X], torch.ones(2), -x if type(x) is int else x),
    "state_dicts": lambda x: fastmerge.merge_state_dicts(
        [{"w": X}, {"w": X}], "slerp", base=0, parameters={"t": x}
    ),
    "sweep": lambda x: sweep({"merge_method": "slerp"}, "out", x),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_tensor(call, kind):
    with pytest.raises(FastmergeError) as caught:
        CALLS[call](NO_TENSORS[kind]())
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("call", NUMBERS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_number(call, kind):
    with pytest.raises(FastmergeError) as caught:
        NUMBERS[call](NO_NUMBERS[kind]())
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


ODD = {
    "parameters that are a list": lambda: fastmerge.merge_state_dicts([], "linear", parameters=[1]),
    "parameters of no mapping": lambda: fastmerge.merge_state_dicts(
        [{"w": X}, {"w": X}], "linear", parameters=[1]
    ),
    "a base that is a list": lambda: fastmerge.merge_state_dicts([{"w": X}], "linear", base=[0]),
    "a method that is a list": lambda: fastmerge.merge_state_dicts([{"w": X}], ["linear"]),
    "models of no axis": lambda: fastmerge.merge_state_dicts(torch.tensor(1.0), "linear"),
    "a target that repeats its memory": lambda: fastmerge.merge_state_dicts(
        [{"w": X}, {"w": X}], "linear", parameters={"weight": 1}, out={"w": X[:, :1].expand(8, 8)}
    ),
    "a method that is an array": lambda: ops.merge(X.numpy(), [X]),
    "a base without a hash": lambda: fastmerge.merge_state_dicts(
        [{"w": X}], "linear", base=memoryview(bytearray(1))
    ),
    "a name without a hash": lambda: [
        ops.dare_linear(None, [X], [1], density=0.5, seed=1, name=name)
        for name in ("w", "w", memoryview(bytearray(1)))
    ],
    "a parameter's name that is a number": lambda: ops.merge("linear", [X, X], {5: 1}),
    "a way to prune that is a list": lambda: ops.prune(X, 0.5, [X]),
    "no plan": lambda: live.merge_into(torch.nn.Linear(2, 2), [1]),
    "no plan of tensors": lambda: list(live.tensors("recipe.yml")),
    "no model": lambda: live.forget([1]),
    "a range that is a number": lambda: parse_range(0.5),
    "a method of no function": lambda: fastmerge.method(version="1")(X),
    "a method's name": lambda: fastmerge.method(5, version="1"),
    "a method's version": lambda: fastmerge.method(version=1),
    "a method's torch": lambda: fastmerge.method(version="1", torch=X),
}


@pytest.mark.parametrize("what", ODD)
def test_other_mistakes(what):
    with pytest.raises(FastmergeError):
        ODD[what]()


def test_weights_that_cancel_are_refused_where_gradients_flow():
    for merge in (torch_ops.linear, lambda pair, weights: torch_ops.nuslerp(*pair, weights)):
        with pytest.raises(RecipeError, match="sum to 0"):
            merge([X, X + 1], [1.0, -1.0])


def test_t_has_its_bounds_where_gradients_flow():
    with pytest.raises(FastmergeError, match=r"for 35 % write 0\.35"):
        torch_ops.slerp(X, X + 1, 35)


def test_fusion_bench_s_own_tensors_without_fusion_bench(monkeypatch):
    monkeypatch.setitem(sys.modules, "fusion_bench.utils.state_dict_arithmetic", None)
    with pytest.raises(ResourceError, match="pip install fusion-bench"):
        fusion_bench.state_dict_avg([{"w": X.double()}, {"w": X.double()}])


def test_peft_s_mistakes_are_value_errors_too():
    with pytest.raises(ValueError, match="must be finite") as caught:
        peft.task_arithmetic([X], torch.tensor([float("nan")]))
    assert isinstance(caught.value, FastmergeError)


def test_a_method_that_fails_on_a_tensor_without_a_name_says_so_first():
    @fastmerge.method("fails_at_once", version="1")
    def fails(tensors):
        """Fail."""
        raise KeyError(len(tensors))

    try:
        with pytest.raises(FastmergeError, match=r"^method fails_at_once failed: KeyError"):
            ops.merge("fails_at_once", [X, X + 1])
    finally:
        unregister("fails_at_once")


FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


@pytest.mark.parametrize("kind", FLOAT8)
@pytest.mark.parametrize("of_numpy", [False, True])
def test_float8_is_taken_as_the_numbers_it_holds(kind: str, of_numpy: bool) -> None:
    """Every code of the type: bfloat16 has each number, so that nothing is rounded on the way."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    torch_a = codes.view(getattr(torch, kind))
    torch_b = torch.roll(codes, 77).view(getattr(torch, kind))
    wide = [x.to(torch.float32) for x in (torch_a, torch_b)]
    assert all(
        (x.to(torch.bfloat16).to(torch.float32) == x).logical_or(x.isnan()).all() for x in wide
    )
    bf16 = [x.to(torch.bfloat16) for x in wide]
    if of_numpy:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        a, b = (x.numpy().view(getattr(ml_dtypes, kind)) for x in (codes, torch.roll(codes, 77)))
    else:
        a, b = torch_a, torch_b

    def numbers(found: Any) -> torch.Tensor:
        bits = found if isinstance(found, torch.Tensor) else torch.from_numpy(found.view("int16"))
        assert bits.dtype in (torch.int16, torch.bfloat16)
        return bits.view(torch.bfloat16).float().nan_to_num(-1.0)

    for _ in range(2):  # a call like an earlier one takes another way
        weights = [0.3, 0.7]
        pairs = [
            (ops.linear([a, b], weights), ops.linear(bf16, weights)),
            (ops.ties(a, [b], [0.5]), ops.ties(bf16[0], bf16[1:], [0.5])),
        ]
        assert all(torch.equal(numbers(x), numbers(y)) for x, y in pairs)
    products = ops.gram([a[1:100], a[1:100]], base=a[:99])
    assert (products == ops.gram([bf16[0][1:100]] * 2, base=bf16[0][:99])).all()
    into = torch.empty(256) if not of_numpy else torch.empty(256).numpy()
    ops.linear([a, b], [0.3, 0.7], out=into)
    with pytest.raises(FastmergeError, match=r"out: cannot merge float8_.* convert to one of"):
        ops.linear([a, b], [0.3, 0.7], out=a)


def test_a_recorded_program_takes_float8() -> None:
    a, b = (torch.randn(64).to(torch.float8_e4m3fn) for _ in range(2))
    merged = torch.compile(
        lambda a, b: ops.linear([a, b], [0.5, 0.5]), fullgraph=True, backend="eager"
    )
    assert torch.equal(merged(a, b), ops.linear([a, b], [0.5, 0.5]))
    assert merged(a, b).dtype == torch.bfloat16


def test_scales_are_no_numbers_to_merge() -> None:
    scales = torch.zeros(4, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(FastmergeError, match="cannot merge float8_e8m0fnu"):
        ops.linear([scales, scales], [0.5, 0.5])
