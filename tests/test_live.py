"""Merges into a live model's parameters on the CPU; triton_resident_cases.py has the GPU's side."""

from __future__ import annotations

import pytest
import torch

from fastmerge import api, live, llama
from fastmerge.errors import FastmergeError
from fastmerge.output import sink as sink_module

torch.set_num_threads(1)


def slerp(a, b, t):
    return (
        f"merge_method: slerp\nbase_model: {a}\nparameters: {{t: {t}}}\ndtype: bfloat16\n"
        f"models: [{{model: {a}}}, {{model: {b}}}]\n"
    )


@pytest.mark.parametrize("tied", [False, True])
def test_merge_into_is_load_merged(zoo, tied):
    a = zoo.base("a", tied=tied)
    b = zoo.tune(a, "b")
    model = llama.load(a)
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    for t in (0.3, 0.8):
        llama.merge_into(model, slerp(a, b, t), threads=1)
        expected = llama.load_merged(slerp(a, b, t), threads=1).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name])
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == where


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_parameter_of_the_merge_s_type_is_written_without_a_copy(zoo, dtype, monkeypatch):
    """Others are written beside it; one that is not contiguous too."""
    a = zoo.base("a")
    b = zoo.tune(a, "b")
    made = []
    array_sink = sink_module.array_sink
    monkeypatch.setattr(sink_module, "array_sink", lambda i: made.append(i.name) or array_sink(i))
    model = llama.load(a, dtype=dtype)
    turned = model.model.layers[1].mlp.up_proj.weight
    turned.data = turned.data.T.contiguous().T
    before = {name: p._version for name, p in model.named_parameters()}
    outcomes = live.merge_into(model, api.plan(slerp(a, b, 0.3)), threads=1)
    names, odd = set(model.state_dict()), {"model.layers.1.mlp.up_proj.weight"}
    assert set(made) == (odd if dtype == torch.bfloat16 else names)
    assert len(made) == len(set(made)) and outcomes.keys() == names
    assert all(p._version > before[name] for name, p in model.named_parameters())
    monkeypatch.undo()
    expected = llama.load_merged(slerp(a, b, 0.3), threads=1, dtype=dtype).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


def test_coefficients_by_folder(zoo):
    a = zoo.base("a")
    b = zoo.tune(a, "b")
    model, x, y = llama.load(a), llama.load(a).state_dict(), llama.load(b).state_dict()
    llama.merge_into(model, {a: 1.25, b: -0.25}, threads=1)
    for name, tensor in model.state_dict().items():
        wanted = (1.25 * x[name].double() - 0.25 * y[name].double()).to(tensor.dtype)
        torch.testing.assert_close(tensor, wanted, rtol=0.008, atol=0)  # the ties of one rounding


def test_what_does_not_fit_changes_nothing(zoo):
    a, other = zoo.base("a"), zoo.base("other", layers=1)
    model = llama.load(other)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FastmergeError, match="the model has no parameter"):
        llama.merge_into(model, {a: 1.0})
    model = llama.load(a)
    with pytest.raises(FastmergeError, match="no tensor for the model's parameter"):
        llama.merge_into(model, {other: 1.0})
    with pytest.raises(FastmergeError, match="keep: unknown 'disk'"):
        llama.merge_into(model, {a: 1.0}, keep="disk")
    again = llama.load(other).state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_a_tied_model_takes_no_merge_that_unties_it(zoo):
    """Head and embeddings are one memory there: the later of the two would win."""
    tied, own = zoo.base("tied", tied=True), zoo.base("own", seed=3)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (tied, own)],
    }
    model = llama.load(tied)
    before = model.lm_head.weight.clone()
    with pytest.raises(FastmergeError, match="the model ties"):
        llama.merge_into(model, recipe)
    assert torch.equal(model.lm_head.weight, before)
    llama.merge_into(llama.load_merged(recipe), recipe)


def in_memory(models):
    entries = [{"model": name, "parameters": {"weight": 1}} for name in models]
    return api.plan({"merge_method": "linear", "models": entries}, models=models)


def test_sources_that_are_the_model_s_own_memory():
    """What was written for one name was read for the other."""
    model = torch.nn.ParameterDict({name: torch.randn(5) for name in ("v", "w")})
    before = {name: tensor.detach().clone() for name, tensor in model.items()}
    swapped = {"v": model["w"].detach(), "w": model["v"].detach()}
    with pytest.raises(FastmergeError, match="share memory"):
        live.merge_into(model, in_memory({"a": model, "b": swapped}))
    assert all(torch.equal(model[name], tensor) for name, tensor in before.items())
    live.merge_into(model, in_memory({"a": model, "b": before}))  # each its own source is fine
    torch.testing.assert_close(model["v"].detach(), before["v"], rtol=1e-6, atol=1e-6)


def test_a_parameter_that_repeats_its_memory_is_refused():
    model = torch.nn.ParameterDict({"v": torch.zeros(3), "w": torch.zeros(1).expand(3)})
    source = {name: torch.ones(3) for name in ("v", "w")}
    with pytest.raises(FastmergeError, match="w: the model's tensor repeats one memory"):
        live.merge_into(model, in_memory({"a": source, "b": source}))
    assert not model["v"].any()
