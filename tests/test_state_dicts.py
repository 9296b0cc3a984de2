"""State dictionaries, modules and folders, merged in memory."""

from __future__ import annotations

import numpy as np
import pytest

import fastmerge
from fastmerge import _C
from fastmerge.errors import FastmergeError, ModelError, UnsupportedError
from fastmerge.models.state_dict import StateDict, as_model

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("mergekit.merge_methods.api")

merge = fastmerge.merge_state_dicts


def some(seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.layers.1.w": torch.randn((7, 12), generator=generator).to(dtype),
        "model.layers.3.w": torch.randn((7, 12), generator=generator).to(dtype),
        "head": torch.randn((5,), generator=generator).to(dtype),
        "steps": torch.tensor([1, 2]),
    }


MODELS = {"base": some(0), "a": some(1), "b": some(2)}


@pytest.mark.parametrize(
    "method, base, parameters",
    [
        ("linear", None, {"weight": [0.5, 0.2, 0.3]}),
        ("linear", None, {"weight": {"base": 0.5, "a": 0.2, "b": 0.3}}),
        ("task_arithmetic", "base", {"weight": 0.4}),
        ("ties", "base", {"weight": [0.7, 0.5], "density": 0.5}),
        ("model_stock", "base", {}),
        ("multislerp", None, {"weight": 1.0}),
    ],
)
def test_values_are_those_of_mergekit(method, base, parameters):
    ours = merge(MODELS, method, base=base, parameters=parameters, dtype=torch.float32)
    wide = {
        key: {n: t.double() if t.is_floating_point() else t for n, t in own.items()}
        for key, own in MODELS.items()
    }
    wanted = theirs.merge_state_dicts(wide, method, base=base, parameters=parameters)
    assert list(ours) == list(wanted)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), wanted[name].double(), rtol=2e-6, atol=2e-6)
    assert ours["head"].dtype == torch.float32 and ours["steps"].dtype == torch.int64


def test_lists_of_models_filters_and_gradients_by_name():
    models = list(MODELS.values())[1:]
    filters = [{"filter": "layers.3", "value": 1.0}, {"value": 0.0}]
    made = merge(models, "linear", parameters={"weight": {0: 1.0, 1: filters}})
    assert torch.equal(made["head"], models[0]["head"])
    mean = (models[0]["model.layers.3.w"].float() + models[1]["model.layers.3.w"].float()) / 2
    assert torch.equal(made["model.layers.3.w"], mean.bfloat16())


@pytest.mark.parametrize("target", ["new dictionary", "first model", "wider"])
def test_into_what_is_there(target):
    models = {"a": some(1), "b": some(2)}
    wanted = merge(models, "slerp", base="a", parameters={"t": 0.3})
    out = {
        "new dictionary": lambda: {n: torch.zeros_like(t) for n, t in models["a"].items()},
        "first model": lambda: models["a"],
        "wider": lambda: some(5, torch.float64),
    }[target]()
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in out.items()}
    assert merge(models, "slerp", base="a", parameters={"t": 0.3}, out=out) is out
    for name, tensor in out.items():
        assert torch.equal(tensor.to(wanted[name].dtype), wanted[name])
        assert tensor.data_ptr() == before[name][0] and tensor._version > before[name][1]


def module(seed):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 6)
    return torch.nn.Sequential(*layers)


def test_modules_and_a_module_as_the_place():
    a, b = module(1), module(2)
    wanted = merge([a, b], "linear", parameters={"weight": 1.0})
    assert merge([a, b], "linear", parameters={"weight": 1.0}, out=a) is a
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, wanted[name])
    assert all(p.requires_grad for p in a.parameters())


class Tied(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_what_is_one_memory_is_merged_once():
    a, b = Tied(1), Tied(2)
    mean = (a.embed.weight + b.embed.weight).detach() / 2
    made = merge([a, b], "linear", parameters={"weight": 1.0})
    assert made["embed.weight"] is made["head.weight"]
    assert torch.equal(made["embed.weight"], mean)
    merge([a, b], "linear", parameters={"weight": 1.0}, out=a)
    assert torch.equal(a.head.weight, mean) and a.head.weight is a.embed.weight


def test_tied_models_fill_what_is_not_tied():
    """The place of the second name kept what was in it, without a word."""
    models = [dict.fromkeys(("v", "w"), torch.ones(3)) for _ in range(2)]
    mean = {"parameters": {"weight": 1.0}}
    out = {name: torch.zeros(3) for name in ("v", "w")}
    merge(models, "linear", **mean, out=out)
    assert all(torch.equal(tensor, torch.ones(3)) for tensor in out.values())
    module = torch.nn.ParameterDict({name: torch.zeros(3) for name in ("v", "w")})
    merge(models, "linear", **mean, out=module)
    assert torch.equal(module["w"], torch.ones(3))
    shared = torch.zeros(3)
    merge(models, "linear", **mean, out={"v": shared, "w": shared})
    assert torch.equal(shared, torch.ones(3))
    with pytest.raises(FastmergeError, match="out: has no tensor 'w'"):
        merge(models, "linear", **mean, out={"v": shared})


@pytest.mark.parametrize("name", ["int64", "bool", "uint16", "complex64", "bits8"])
def test_places_that_hold_no_weights_are_refused_before_one_is_written(name):
    """torch cuts the fractions off, or refuses in the middle."""
    models = [{"v": torch.ones(3), "w": torch.full((3,), 0.75)}] * 2
    kind = getattr(torch, name)
    out = {"v": torch.zeros(3), "w": torch.empty(3, dtype=kind)}
    module = torch.nn.Module()
    module.v, module.w = (torch.nn.Parameter(t, requires_grad=False) for t in out.values())
    for place in (out, module):
        with pytest.raises(UnsupportedError, match=f"w: {name} holds no merged weights"):
            merge(models, "linear", parameters={"weight": 1.0}, out=place)
    assert not out["v"].any() and not module.v.any()
    arrays = {"v": np.zeros(3, np.float32), "w": np.zeros(3, np.int64)}
    with pytest.raises(UnsupportedError, match="out: w: cannot merge int64"):
        merge(models, "linear", parameters={"weight": 1.0}, out=arrays)
    assert not arrays["v"].any()


def test_tied_in_one_model_alone_is_two_tensors():
    a, b = Tied(1), Tied(2)
    b.head.weight = torch.nn.Parameter(torch.ones(10, 4))
    made = merge([a, b], "linear", parameters={"weight": 1.0})
    assert not torch.equal(made["embed.weight"], made["head.weight"])


def test_numpy_stays_numpy():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    a, b = ({"w": rng.normal(size=(4, 3)).astype(ml_dtypes.bfloat16)} for _ in range(2))
    made = merge([a, b], "linear", parameters={"weight": 1.0})
    assert made["w"].dtype == ml_dtypes.bfloat16 and made["w"].shape == (4, 3)
    np.testing.assert_array_equal(
        made["w"], ((a["w"].astype(np.float32) + b["w"]) / 2).astype(ml_dtypes.bfloat16)
    )
    merge([a, b], "linear", parameters={"weight": [0, 1]}, out=a)
    np.testing.assert_array_equal(a["w"], b["w"])


def test_a_folder_is_a_model(zoo):
    base = zoo.base("base")
    tensors = {n: torch.from_numpy(np.array(x)).bfloat16() for n, x in zoo.read(base).items()}
    shifted = {name: tensor + 1 for name, tensor in tensors.items()}
    made = merge({"disk": base, "memory": shifted}, "linear", parameters={"weight": [0.0, 1.0]})
    assert all(torch.equal(made[name], shifted[name]) for name in shifted)


def test_random_methods_follow_the_seed():
    options = {"base": "base", "parameters": {"weight": 1.0, "density": 0.5}}
    one, same, other = (merge(MODELS, "dare_ties", seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(one["head"], same["head"])
    assert not torch.equal(one["model.layers.1.w"], other["model.layers.1.w"])


def test_a_recipe_s_names_may_stand_for_state_dictionaries(zoo, tmp_path):
    base = zoo.base("base")
    tensors = {n: torch.from_numpy(np.array(x)).bfloat16() for n, x in zoo.read(base).items()}
    recipe = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in ("mine", "disk")],
    }
    models = {"mine": {n: t + 1 for n, t in tensors.items()}, "disk": str(base)}
    made = dict(fastmerge.materialise(recipe, models=models))
    name = "model.norm.weight"
    wanted = ((tensors[name] + 1).float() + tensors[name].float()) / 2
    got = torch.from_numpy(made[name].view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got, wanted.bfloat16())
    fastmerge.merge(recipe, tmp_path / "out", models=models)
    assert (tmp_path / "out" / "model.safetensors").exists()


class Stateful(torch.nn.Linear):
    """A module whose state dictionary holds more than tensors."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


TRAINED = [torch.nn.BatchNorm1d(3) for _ in range(2)]
TRAINED[0].num_batches_tracked.fill_(5)
EIGHTH = [{"w": torch.ones(2).to(torch.float8_e4m3fn)}] * 2


def without(model, name):
    return {key: tensor for key, tensor in model.state_dict().items() if key != name}


def test_what_the_refusals_say_works():
    weight = {"weight": 1}
    tracked = "num_batches_tracked"
    mixed = [TRAINED[0], without(TRAINED[1], tracked)]
    assert tracked not in merge(mixed, "linear", parameters=weight, strict=False)
    into = torch.nn.BatchNorm1d(3)
    merge([without(m, tracked) for m in TRAINED], "linear", parameters=weight, out=into)
    torch.testing.assert_close(into.weight.data, torch.ones(3))
    merge([without(Stateful(), "_extra_state")] * 2, "linear", parameters=weight, out=Stateful())
    wide = [{name: tensor.to(torch.bfloat16) for name, tensor in EIGHTH[0].items()}] * 2
    assert merge(wide, "linear", parameters=weight)["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "models, options, said",
    [
        ([], {}, "there are none"),
        ("path", {}, "must be a mapping or a list"),
        ([3], {}, "must be a folder, a state dictionary or a module, not int"),
        ([torch.nn.Linear], {}, "must be a folder, a state dictionary or a module, not type"),
        ([{"w": 3}], {}, "must be a tensor, not int"),
        ([{"\ud800": torch.ones(2)}], {}, "text that UTF-8 can say"),
        ([{"w": torch.ones(2, 3).T}], {}, "not contiguous"),
        ([{"w": torch.ones(2, 3, device="meta")}], {}, "has no numbers"),
        (MODELS, {"base": "c"}, "no model is called 'c'"),
        (MODELS, {"base": MODELS["a"]}, "base: is a model itself; put it among models="),
        (MODELS, {"base": torch.nn.Linear(1, 1)}, "base: is a model itself"),
        (MODELS, {"parameters": {"weight": [1, 2]}}, "2 values for 3 models"),
        (MODELS, {"parameters": {"weight": {"c": 1}}}, "no model is called 'c'"),
        (MODELS, {"parameters": {"wieght": 1}}, "did you mean 'weight'"),
        (MODELS, {"method": "slurp"}, "did you mean 'slerp'"),
        (MODELS, {"out": {}}, "out: has no tensor"),
        (MODELS, {"out": {n: t[:1] for n, t in MODELS["a"].items()}}, "has shape"),
        (MODELS, {"out": 3}, "out: must be a dictionary or a module, not"),
        ([{"w": torch.ones(2)}, {"v": torch.ones(2)}], {}, "has tensor 'w' and"),
        ([{"w": torch.ones(2)}, {"v": torch.ones(2)}], {"strict": False}, "no tensor is in all"),
        ([{"w": torch.ones(2)}, {"w": torch.ones(3)}], {}, "w"),
        ([{"n": torch.tensor(1)}, {"n": torch.tensor(2)}], {}, "only copied when equal"),
        (
            TRAINED,
            {},
            "'num_batches_tracked' .*give all models one of the two, or leave it out: dict",
        ),
        (
            [Stateful(), Stateful()],
            {},
            "not dict; pass a dictionary of the tensors alone, without it",
        ),
        ([{"step": 3, "w": torch.ones(2)}], {}, "not int; pass a dictionary of the tensors alone"),
        (
            [{"model": some(1)}],
            {},
            "'model': must be a tensor, not dict; pass that one, which holds",
        ),
        (EIGHTH, {}, "float8_e4m3fn, which .* pass x.to.torch.bfloat16., times the scale"),
    ],
)
def test_refusals_are_one_clear_line(models, options, said):
    given = {"method": "linear", "parameters": {"weight": 1.0}} | options
    with pytest.raises(FastmergeError, match=said) as caught:
        merge(models, **given)
    assert "\n" not in str(caught.value)


def test_names_that_not_all_have_are_left_out_if_that_is_asked_for():
    models = [some(1), {**some(2), "extra": torch.ones(3)}]
    with pytest.raises(ModelError, match="has tensor 'extra'"):
        merge(models, "linear", parameters={"weight": 1})
    made = merge(models, "linear", parameters={"weight": 1}, strict=False)
    assert list(made) == list(models[0])


def test_memory_that_is_still_to_be_read_is_not_written():
    whole = torch.randn(8)
    a, b = {"x": whole[:4], "y": whole[4:]}, {"x": torch.ones(4), "y": torch.ones(4)}
    out = {"x": whole[4:], "y": whole[:4]}
    with pytest.raises(FastmergeError, match="share memory"):
        merge([a, b], "linear", parameters={"weight": 1}, out=out)
    merge([a, b], "linear", parameters={"weight": 1}, out=a)  # each in its own place


def test_the_model_of_a_dictionary():
    model = StateDict("m", some(1), {})
    view = model.view("head")
    assert (view.dtype, view.count) == ("BF16", 5) and isinstance(view, _C.View)
    assert model.view("steps").dtype == "RAW"
    assert model.fingerprint == StateDict("other", some(1), {}).fingerprint
    assert model.fingerprint != StateDict("m", some(2), {}).fingerprint
    assert as_model(model, "x") is model


def test_a_module_without_memory_is_told_so():
    """All its parameters begin at address 0, and are not tied."""
    with pytest.raises(FastmergeError, match="not whole on one kind of device"):
        fastmerge.merge_state_dicts(
            [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)], "linear", parameters={"weight": 1},
            out=torch.nn.Linear(3, 2, device="meta"),
        )  # fmt: skip


class _Anew(dict):
    """Its tensors are copies, as a lazy loader's are."""

    def __getitem__(self, name):
        return super().__getitem__(name).clone()

    def get(self, name, default=None):
        found = super().get(name, default)
        return found if found is default else found.clone()


def test_an_out_that_would_keep_nothing_is_refused():
    """What was merged went into a copy, without a word."""
    models = [{"w": torch.ones(4)}, {"w": torch.zeros(4)}]
    with pytest.raises(FastmergeError, match="out: makes 'w' anew"):
        merge(models, "linear", parameters={"weight": 1}, out=_Anew(w=torch.zeros(4)))


def test_a_module_whose_buffers_are_copies_is_refused():
    class Hooked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self._register_state_dict_hook(
                lambda _, state, *__: state.update({n: t.clone() for n, t in state.items()})
            )

    models = [{"mean": torch.ones(4)}, {"mean": torch.zeros(4)}]
    with pytest.raises(FastmergeError, match="mean: the model's state_dict\\(\\) makes it anew"):
        merge(models, "linear", parameters={"weight": 1}, out=Hooked())


def test_a_state_dict_that_is_none_is_named():
    class Odd:
        def state_dict(self):
            return [1, 2]

    good = {"w": torch.ones(4)}
    for models, options in (([Odd(), good], {}), ([good, good], {"out": Odd()})):
        with pytest.raises(FastmergeError, match="its state_dict\\(\\) is no dictionary"):
            merge(models, "linear", parameters={"weight": 1}, **options)
