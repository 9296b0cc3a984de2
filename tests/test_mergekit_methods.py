"""mergekit's methods on fastmerge's kernels: the values, who computes what, and the way back."""

from __future__ import annotations

import importlib

import pytest

from fastmerge import ops
from fastmerge.integrations import mergekit_methods as ours
from fastmerge.methods import METHODS

torch = pytest.importorskip("torch")
api = pytest.importorskip("mergekit.merge_methods.api")

TENSORS = [torch.randn(24, 20, generator=torch.Generator().manual_seed(s)) for s in range(3)]
DETERMINISTIC = [
    ("linear", None, 3, {"weight": [0.5, 0.2, 0.3]}),
    ("linear", 1, 3, {"weight": 1.0, "normalize": False}),
    ("slerp", 1, 2, {"t": 0.3}),
    ("nuslerp", None, 2, {"weight": [0.3, 0.7]}),
    ("nuslerp", 2, 3, {"weight": [0.3, 0.7], "nuslerp_flatten": False}),
    ("multislerp", 0, 3, {"weight": [0.3, 0.7]}),
    ("karcher", None, 3, {}),
    ("model_stock", 2, 3, {}),
    ("task_arithmetic", 0, 3, {"weight": [0.3, 0.7], "lambda": 0.8}),
    ("ties", 1, 3, {"weight": [0.3, 0.7], "density": 0.4}),
    ("breadcrumbs", 0, 3, {"weight": 0.5, "density": 0.4, "gamma": 0.1}),
    ("breadcrumbs_ties", 0, 3, {"weight": 0.5, "density": 0.4, "gamma": 0.1}),
    ("sce", 0, 3, {"select_topk": 0.5}),
    ("ram", 0, 3, {"epsilon": 0.3}),
    ("nearswap", 0, 2, {"t": 0.1}),
    ("passthrough", None, 1, {"scale": 0.5}),
]

registry = importlib.import_module("mergekit.merge_methods.registry")
NAMES = sorted(METHODS.keys() & {own.spec.name for own in registry.registered_methods()})


@pytest.fixture
def calls(monkeypatch):
    """The methods that fastmerge was asked for."""
    seen = []
    merge = ops.merge

    def watched(method, *args, **kwargs):
        seen.append(method)
        return merge(method, *args, **kwargs)

    monkeypatch.setattr(ops, "merge", watched)
    return seen


@pytest.mark.parametrize("method, base, count, parameters", DETERMINISTIC)
def test_values_are_mergekit_s(method, base, count, parameters, calls):
    options = {"base_index": base, "parameters": parameters, "name": "w"}
    wanted = api.merge_tensors([t.double() for t in TENSORS[:count]], method, **options)
    with ours.installed():
        made = api.merge_tensors(TENSORS[:count], method, **options)
    assert calls == [method]
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_draws_follow_torch_s_seed(method, calls):
    options = {"base_index": 0, "parameters": {"weight": 0.5, "density": 0.6}}
    with ours.installed():
        torch.manual_seed(1)
        first = api.merge_tensors(TENSORS, method, **options)
        torch.manual_seed(1)
        assert torch.equal(first, api.merge_tensors(TENSORS, method, **options))
        assert not torch.equal(first, api.merge_tensors(TENSORS, method, **options))
    assert calls == [method] * 3


def test_state_dicts_and_types():
    models = [{"w": t.bfloat16(), "n": torch.tensor([1])} for t in TENSORS]
    options = {"parameters": {"weight": 1.0}, "out_dtype": torch.float32}
    with ours.installed():
        made = api.merge_state_dicts(models, "linear", **options)
    mean = torch.stack([m["w"].float() for m in models]).mean(0)
    assert made["w"].dtype == torch.float32 and torch.equal(made["n"], models[0]["n"])
    torch.testing.assert_close(made["w"], mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.double(),
        lambda t: t.clone().requires_grad_(),
        lambda t: t[:0],
    ],
)
def test_what_has_no_kernels_stays_mergekit_s(change, calls):
    tensors = [change(t) for t in TENSORS]
    with ours.installed():
        made = api.merge_tensors(tensors, "linear", parameters={"weight": 1.0})
    assert not calls and made.requires_grad == tensors[0].requires_grad


def test_without_recording_gradients_parameters_are_taken(calls):
    tensors = [torch.nn.Parameter(t) for t in TENSORS]
    with ours.installed(), torch.no_grad():
        api.merge_tensors(tensors, "linear", parameters={"weight": 1.0})
    assert calls == ["linear"]


def test_a_density_of_0_and_others_of_the_same_name_stay_mergekit_s(calls):
    from mergekit.merge_methods import base, registry

    own = registry.get("linear")
    other = base.BatchedMergeMethod(own.spec, own.implementation)
    group = base.TensorGroup.from_tensors(TENSORS)
    with ours.installed():
        other((group,), parameters={"weight": 1.0})
        nothing = {"weight": 1.0, "density": 0.0}
        made = api.merge_tensors(TENSORS, "ties", base_index=0, parameters=nothing)
    assert not calls and made.shape == TENSORS[0].shape


def test_a_base_alone_stays_mergekit_s(calls):
    parameters = {"weight": 1.0, "density": 0.5}
    with ours.installed():
        made = api.merge_tensors(TENSORS[:1], "ties", base_index=0, parameters=parameters)
    assert not calls and torch.equal(made, TENSORS[0])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("method", NAMES)
def test_results_have_mergekit_s_type(method, dtype, calls):
    """Two of its methods widen to float32, and go on so."""
    row = METHODS[method]
    tensors = [t.bfloat16() if dtype is None else t for t in TENSORS[: row.max_operands or 3]]
    options = {"base_index": None if row.base == "none" else 0, "dtype": dtype}
    if row.base in ("required", "optional"):
        tensors = [t.to(tensors[0]) for t in TENSORS][: (row.max_operands or 2) + 1]
    given = {p.name: 0.5 for p in row.parameters if p.name in ("weight", "t", "density")}
    wanted = api.merge_tensors(tensors, method, parameters=given, **options)
    with ours.installed():
        made = api.merge_tensors(tensors, method, parameters=given, **options)
    assert calls == [method] and made.dtype == wanted.dtype


def test_the_way_back():
    from mergekit.merge_methods.base import MergeMethod

    own = MergeMethod._execute_resolved
    ours.install()
    ours.install()
    with ours.installed():
        pass
    assert MergeMethod._execute_resolved is not own
    ours.uninstall()
    assert MergeMethod._execute_resolved is own
    ours.uninstall()


def test_numbers_that_we_refuse_are_mergekit_s_to_take():
    """Its own tests want the quotient of weights that sum to 0."""
    cancelling = {"parameters": {"weight": [1.0, -1.0]}}
    wanted = api.merge_tensors(TENSORS[:2], "linear", **cancelling)
    with ours.installed():
        made = api.merge_tensors(TENSORS[:2], "linear", **cancelling)
    torch.testing.assert_close(made, wanted, rtol=0, atol=0, equal_nan=True)
    with ours.installed(), pytest.raises(ValueError, match="t"):
        api.merge_tensors(TENSORS[:2], "slerp", base_index=0, parameters={"t": "half"})
