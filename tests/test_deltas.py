"""Deltas without a base, other tools' definitions, PEFT's functions in fastmerge's place."""

from __future__ import annotations

import numpy as np
import pytest

from fastmerge import ops
from fastmerge.errors import FastmergeError, RecipeError
from fastmerge.integrations import peft as ours
from fastmerge.methods import METHODS, REQUIRED
from fastmerge.planning.planner import make_plan

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
theirs = pytest.importorskip("peft.utils.merge_utils")

OF_DELTAS = [row.name for row in METHODS.values() if row.of_deltas]
WEIGHTS = [0.7, -0.4, 1.2]


def some(count=3, shape=(61, 48), dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def distinct(dtype, count=3, size=2928):
    """Deltas whose entries all differ in magnitude: which of equal ones stay is each tool's own."""
    generator = torch.Generator().manual_seed(5)
    sizes = (0x3800 + torch.arange(size, dtype=torch.int16)).view(torch.bfloat16)
    order = [torch.randperm(size, generator=generator) for _ in range(count)]
    signs = [1 - 2 * torch.randint(2, (size,), generator=generator) for _ in range(count)]
    return [(sizes[o] * s).to(dtype) for o, s in zip(order, signs, strict=True)]


def parameters_of(row):
    given = {"weight": WEIGHTS, "density": 0.6}
    asked = {p.name for p in row.parameters}
    missing = {p.name for p in row.parameters if p.default is REQUIRED} - set(given)
    assert not missing
    return {name: value for name, value in given.items() if name in asked}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", OF_DELTAS)
def test_without_a_base_is_with_a_base_of_zeros(method, dtype):
    row, tensors = METHODS[method], some(dtype=dtype)
    options = {"seed": 3, "name": "w"} if row.random else {}
    made = ops.merge(method, tensors, parameters_of(row), **options)
    zeros = torch.zeros_like(tensors[0])
    wanted = ops.merge(method, tensors, parameters_of(row), base=zeros, **options)
    assert made.dtype == dtype and torch.equal(made, wanted)


def test_equal_deltas_are_still_deltas():
    tensor = some(1)[0]
    made = ops.task_arithmetic(None, [tensor, tensor], [1.0, 1.0])
    assert torch.equal(made, tensor + tensor)


@pytest.mark.parametrize("method", ["nearswap", "arcee_fusion", "model_stock"])
def test_what_is_no_merge_of_deltas_needs_its_base(method):
    given = {"t": 0.1} if method == "nearswap" else {}
    with pytest.raises(FastmergeError, match="needs a base"):
        ops.merge(method, some(2 if method == "model_stock" else 1), given)


@pytest.mark.parametrize("how", ["magnitude", "random", "rank"])
def test_prune_alone(how):
    tensor = some(1)[0]
    kept = ops.prune(tensor, 0.3, how, seed=7, rescale="density" if how != "magnitude" else False)
    stays = kept != 0
    assert abs(stays.float().mean() - 0.3) < 0.02
    scale = 1 if how == "magnitude" else float(np.float32(1 / 0.3))
    assert torch.equal(kept[stays], (tensor * scale)[stays])
    if how == "magnitude":
        assert torch.equal(kept, theirs.prune(tensor, 0.3, "magnitude"))


def test_prune_restores_the_l1_norm():
    tensor = some(1)[0]
    kept = ops.prune(tensor, 0.3, "random", seed=7, rescale=True)
    np.testing.assert_allclose(kept.abs().sum(), tensor.abs().sum(), rtol=1e-5)


def test_prune_names_the_ways():
    with pytest.raises(FastmergeError, match="did you mean 'magnitude'"):
        ops.prune(some(1)[0], 0.5, "magnitud")


def test_every_tie_stays_where_that_is_asked_for():
    """At least int(density n) entries, all those as large as the smallest of them: the paper's
    code and sd-mecha keep |d| >= the k-th.
    """
    delta = torch.tensor([3.0, 1.0, 1.0, -1.0, 0.5, 0.25])
    exact = ops.ties(None, [delta], [1.0], density=0.5)
    assert (exact != 0).sum() == 3
    kept = ops.ties(None, [delta], [1.0], density=0.5, ties="all")
    assert torch.equal(kept, torch.where(delta.abs() >= 1, delta, 0))
    with pytest.raises(FastmergeError, match="ties: all with rescale: l1"):
        ops.ties(None, [delta], [1.0], density=0.5, ties="all", rescale=True)


def test_what_speaks_dlpack_or_array_interface_is_taken():
    class Foreign:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    class Interface:
        def __init__(self, array):
            self.__array_interface__ = array.__array_interface__

    arrays = [t.numpy() for t in some(2)]
    wanted = ops.linear(arrays, [1, 2])
    for kind in (Foreign, Interface):
        assert np.array_equal(ops.linear([kind(a) for a in arrays], [1, 2]), wanted)
    halves = some(2, dtype=torch.bfloat16)  # which NumPy's reader does not know
    made = ops.linear([Foreign(t) for t in halves], [1, 2])
    assert torch.equal(made, ops.linear(halves, [1, 2]))


@pytest.mark.parametrize("words", [{"rescale": "sum"}, {"votes": "majority"}, {"divisor": 2}])
def test_other_words_are_refused(words):
    with pytest.raises(FastmergeError, match=rf"ties: '{next(iter(words))}' must be"):
        ops.ties(None, some(2), [1, 1], density=0.5, **words)


def test_a_recipe_has_them_too(zoo):
    base = zoo.base("base")
    a, b = zoo.tune(base, "a", seed=1), zoo.tune(base, "b", seed=2)
    recipe = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(m), "parameters": {"weight": 1, "density": 0.5}} for m in (a, b)],
        "parameters": {"votes": "frequency", "divisor": "count", "rescale": "density"},
    }
    root = make_plan(recipe).tensors[0].root
    assert root.values["votes"] == "frequency" and root.values["rescale"] == "density"
    with pytest.raises(RecipeError, match="'rescale' must be true or false or l1"):
        make_plan(recipe | {"parameters": {"rescale": "l2"}})


# --- PEFT ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, given",
    [
        ("task_arithmetic", {}),
        ("magnitude_prune", {"density": 0.3}),
        *(
            ("ties", {"density": density, "majority_sign_method": method})
            for density in (0.3, 1.0, 0.0)
            for method in ("total", "frequency")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The density")
def test_peft_s_functions_give_its_values(name, given, dtype):
    tensors, weights = distinct(dtype), torch.tensor(WEIGHTS, dtype=dtype)
    made = getattr(ours, name)(tensors, weights, **given)
    wanted = getattr(theirs, name)([t.double() for t in tensors], weights.double(), **given)
    assert made.dtype == getattr(theirs, name)(tensors, weights, **given).dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(made.double(), wanted, rtol=step, atol=1e-4)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear"])
def test_results_have_the_type_of_peft_s(name, weights):
    given = {} if name == "task_arithmetic" else {"density": 0.5}
    tensors, numbers = distinct(torch.bfloat16), torch.tensor(WEIGHTS, dtype=weights)
    made = getattr(ours, name)(tensors, numbers, **given)
    assert made.dtype == getattr(theirs, name)(tensors, numbers, **given).dtype


@pytest.mark.parametrize("recorded", [False, True])
def test_peft_computes_the_rest_as_before(recorded):
    tensors = distinct(torch.float32 if recorded else torch.float64)
    if recorded:
        tensors = [tensor.requires_grad_() for tensor in tensors]
    numbers = torch.tensor(WEIGHTS, dtype=tensors[0].dtype)
    wanted = theirs.ties(tensors, numbers, 0.5)
    with ours.installed():
        made = theirs.ties(tensors, numbers, 0.5)
    assert torch.equal(made, wanted)
    assert made.dtype == wanted.dtype
    assert made.requires_grad == wanted.requires_grad == recorded


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_peft_s_random_functions_agree_in_the_mean(name):
    """Over many draws: both are unbiased in the linear merge; the elected one has the same mean."""
    tensors, weights = some(shape=(40, 40)), torch.tensor(WEIGHTS)
    torch.manual_seed(0)
    runs = 400
    means = []
    for module in (ours, theirs):
        draws = torch.stack(
            [getattr(module, name)(tensors, weights, 0.5) for _ in range(runs)]
        ).double()
        means.append((draws.mean(0), draws.var(0) / runs))
    (a, va), (b, vb) = means
    z = (a - b) / (va + vb).clamp_min(1e-12).sqrt()
    assert abs(float(z.mean())) < 5 / 40 and 0.9 < float(z.std()) < 1.1


def test_peft_s_draws_follow_torch_s_seed():
    tensors, weights = some(), torch.tensor(WEIGHTS)
    torch.manual_seed(1)
    first = ours.dare_linear(tensors, weights, 0.5)
    torch.manual_seed(1)
    assert torch.equal(first, ours.dare_linear(tensors, weights, 0.5))
    assert not torch.equal(first, ours.dare_linear(tensors, weights, 0.5))


def adapted():
    """A small model with two adapters of one rank."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=False)
    body = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))
    model = peft.get_peft_model(body, config, adapter_name="a")
    model.add_adapter("b", config)
    return model


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"])
def test_weighted_adapters_with_ours_in_place(kind):
    states = []
    for inside in (False, True):
        model = adapted()
        given = {"combination_type": kind, "density": 0.4}
        if inside:
            with ours.installed():
                assert theirs.ties is ours.ties
                model.add_weighted_adapter(["a", "b"], [0.7, 0.5], "c", **given)
        else:
            model.add_weighted_adapter(["a", "b"], [0.7, 0.5], "c", **given)
        model.set_adapter("c")
        states.append(model(torch.ones(1, 16)))
    assert theirs.ties is not ours.ties
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_installing_twice_and_leaving_once():
    own = theirs.ties
    ours.install()
    ours.install()
    with ours.installed():
        pass
    assert theirs.ties is ours.ties
    ours.uninstall()
    assert theirs.ties is own
    ours.uninstall()


def test_a_density_that_peft_refuses_is_a_value_error():
    with pytest.raises(ValueError, match="density"):
        ours.ties(some(), torch.tensor(WEIGHTS), -0.5)
