"""FusionBench's sums of state dictionaries on fastmerge's kernels."""

from __future__ import annotations

from collections import OrderedDict

import pytest

from fastmerge import ops
from fastmerge.integrations import fusion_bench as ours

torch = pytest.importorskip("torch")
pytest.importorskip("fusion_bench")
theirs = pytest.importorskip("fusion_bench.utils.state_dict_arithmetic")


def models(count: int, dtype=torch.float32) -> list[OrderedDict]:
    made = torch.Generator().manual_seed(3)
    names = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (64, 40)}
    return [
        OrderedDict((name, torch.randn(*s, generator=made).to(dtype)) for name, s in names.items())
        for _ in range(count)
    ]


CALLS = {
    "avg": lambda m: theirs.state_dict_avg(m),
    "sum": lambda m: theirs.state_dict_sum(m),
    "interpolation": lambda m: theirs.state_dict_interpolation(m, [0.5, -0.2, 0.7]),
    "weighted_sum": lambda m: theirs.state_dict_weighted_sum(m, [0.5, 0.0, 1.0]),
    "to a device": lambda m: theirs.state_dict_weighted_sum(m, [0.5, 2, 1.0], device="cpu"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_fusion_bench_s(call, dtype, monkeypatch):
    given = models(3, dtype)
    wanted = call([{name: t.double() for name, t in model.items()} for model in given])
    asked = []
    for name in ("linear", "combine"):
        own = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, own=own: asked.append(1) or own(*a))
    with ours.installed():
        made = call(given)
    assert len(asked) == 3
    assert isinstance(made, OrderedDict)
    assert list(made) == list(given[0])
    for name, tensor in made.items():
        assert tensor.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # one rounding
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=tolerance, atol=1e-6)


def test_what_has_no_kernels_is_fusion_bench_s():
    given = models(2)
    for index, model in enumerate(given):
        model["steps"] = torch.tensor([index, 5])
        model["exact"] = torch.ones(3, dtype=torch.float64)
        model["learned"] = torch.ones(3, requires_grad=True)
    wanted = theirs.state_dict_sum(given)
    with ours.installed():
        made = theirs.state_dict_sum(given)
    assert list(made) == list(wanted)
    for name in ("steps", "exact", "learned"):
        assert torch.equal(made[name], wanted[name])
        assert made[name].dtype == wanted[name].dtype
    assert made["learned"].requires_grad


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda m: theirs.state_dict_avg([]), ValueError),
        (lambda m: theirs.state_dict_avg(3), TypeError),
        (lambda m: theirs.state_dict_sum([m[0], {"other": m[0]["a.bias"]}]), ValueError),
        (lambda m: theirs.state_dict_weighted_sum(m, [0.5]), ValueError),
    ],
)
def test_what_fusion_bench_refuses_it_still_refuses(call, error):
    with ours.installed(), pytest.raises(error):
        call(models(2))


def test_every_place_gets_its_function_back():
    from fusion_bench.utils import state_dict_avg

    assert state_dict_avg is theirs.state_dict_avg
    before = dict(vars(theirs))
    with ours.installed():
        assert theirs.state_dict_avg is ours.state_dict_avg
        with ours.installed():
            pass
        assert theirs.state_dict_avg is ours.state_dict_avg
        import fusion_bench.utils as package

        package.state_dict_avg = theirs.state_dict_avg  # as of a module imported in the meantime
    assert {name: vars(theirs)[name] for name in before} == before
    assert package.state_dict_avg is before["state_dict_avg"]
