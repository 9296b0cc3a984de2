"""float64 models on disk and in memory: what is read, written, and refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge import api, live, llama, merge_state_dicts
from fastmerge.compute import reference
from fastmerge.engine.executor import Local
from fastmerge.errors import FastmergeError, UnsupportedError
from fastmerge.planning.planner import make_plan
from tests.conftest import llama_config, llama_shapes
from tests.tokenizer_models import EMBED, Maker, trio_of
from tests.tokenizer_models import recipe as aligned

State = dict[str, torch.Tensor]


def drawn(seed: int, shapes: Mapping[str, Sequence[int]], size: float = 1.0) -> State:
    random = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(tuple(shape), generator=random, dtype=torch.float64)
        for name, shape in shapes.items()
    }


A, B = (drawn(seed, {"one": (1,), "odd": (7,), "matrix": (33, 65)}) for seed in (1, 2))
CONFIG = llama_config() | {"torch_dtype": "float64"}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base and two tunes in float64, and the same rounded to float32."""
    base = {n: 0.02 * x for n, x in drawn(1, llama_shapes(CONFIG)).items()}
    states = {"base": base}
    for seed, name in ((2, "a"), (3, "b")):
        more = drawn(seed, llama_shapes(CONFIG), 0.001)
        states[name] = {n: base[n] + more[n] for n in base}
    for name, state in states.items():
        for kind, ending in ((torch.float64, ""), (torch.float32, "32")):
            folder = tmp_path / f"{name}{ending}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(CONFIG))
            save_file({n: x.to(kind) for n, x in state.items()}, folder / "model.safetensors")
    return {path.name: path for path in tmp_path.iterdir()}


def recipe(models: Mapping[str, Path], method: str, *names: str, **top: Any) -> dict[str, Any]:
    parameters = {"weight": 0.4, "density": 0.5} if method != "slerp" else {}
    return {
        "merge_method": method,
        "models": [{"model": str(models[n]), "parameters": dict(parameters)} for n in names],
        **top,
    }


def state_of(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "sce"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_float32_it_is_the_rounded_model(method, dtype, models, tmp_path) -> None:
    """Bit for bit; one note for each model says so."""
    made = {}
    for ending in ("", "32"):
        top: dict[str, Any] = {"dtype": dtype}
        if method != "linear":
            top["base_model"] = str(models[("a" if method == "slerp" else "base") + ending])
        if method == "slerp":
            top["parameters"] = {"t": 0.3}
        names = (f"a{ending}", f"b{ending}")
        report = api.merge(recipe(models, method, *names, **top), tmp_path / f"out{ending}", seed=1)
        made[ending] = state_of(tmp_path / f"out{ending}")
        said = [note for note in report.notes if "are float64: merged in float32" in note]
        assert len(said) == (0 if ending else 3 - (method in ("linear", "slerp")))
    for name, tensor in made[""].items():
        assert torch.equal(tensor, made["32"][name]) and tensor.dtype == getattr(torch, dtype)


def test_types_of_the_output(models, tmp_path) -> None:
    def run(**top: str) -> State:
        text = recipe(models, "linear", "a", "b32", **top)
        api.merge(text, tmp_path / "out", overwrite=True)
        return state_of(tmp_path / "out")

    a, b = state_of(models["a"]), state_of(models["b32"])
    exact = {n: (0.4 * a[n] + 0.4 * b[n].double()) / (0.4 + 0.4) for n in a}
    for made in (run(), run(dtype="float64")):
        for name, tensor in made.items():
            np.testing.assert_allclose(tensor.numpy(), exact[name].numpy(), rtol=1e-12, atol=1e-13)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float64"
    rounded = run(dtype="float64", out_dtype="bfloat16")
    for name, tensor in rounded.items():
        bits = reference.round_to(exact[name].numpy(), "BF16").view(np.int16)
        # Where the sum's last bit decides a tie it may be the other.
        assert (tensor.view(torch.int16).numpy() != bits).mean() < 1e-3
    narrow, wide = run(dtype="float32"), run(dtype="bfloat16", out_dtype="float64")
    for name, tensor in wide.items():
        assert torch.equal(tensor, narrow[name].double())


def test_a_copy_keeps_its_bytes(models, tmp_path) -> None:
    for top in ({}, {"dtype": "float64"}):
        text = {"merge_method": "passthrough", "models": [{"model": str(models["a"])}], **top}
        api.merge(text, tmp_path / "out", overwrite=True)
        made = state_of(tmp_path / "out")
        assert all(torch.equal(made[n], x) for n, x in state_of(models["a"]).items())


def test_threads_do_not_show_and_the_key_knows_the_arithmetic(models, tmp_path) -> None:
    text = recipe(models, "ties", "a", "b", base_model=str(models["base"]), dtype="float64")
    for threads in (1, 3):
        api.merge(text, tmp_path / f"t{threads}", threads=threads)
    one, three = state_of(tmp_path / "t1"), state_of(tmp_path / "t3")
    assert all(torch.equal(x, three[n]) for n, x in one.items())
    narrow = recipe(models, "linear", "a32", "b32", dtype="float32", out_dtype="bfloat16")
    assert make_plan(narrow).key != make_plan({**narrow, "dtype": "float64"}).key


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_adapter_on_a_float64_base(dtype, use_dora, models, zoo, tmp_path) -> None:
    adapter = zoo.adapter("lora", models["base32"], use_dora=use_dora)
    fastmerge.fold(str(models["base"]), str(adapter), tmp_path / "out", dtype=dtype)
    made, base = state_of(tmp_path / "out"), state_of(models["base"])
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in made.items():
        wanted = base[name]
        head = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{head}A.weight" in saved:
            b, a = (saved[f"{head}{part}.weight"].double() for part in "BA")
            wanted = wanted + 2 * b @ a
            if use_dora:
                lengths = saved[f"{head}magnitude_vector"].double()
                wanted = wanted * (lengths / wanted.norm(dim=1))[:, None]
        rtol = 1e-12 if dtype == "float64" else 1e-5
        np.testing.assert_allclose(
            tensor.double().numpy(), wanted.numpy(), rtol=rtol, atol=rtol / 10
        )


def test_transformers_loads_it(models, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    text = recipe(models, "linear", "a", "b", dtype="float64")
    api.merge(text, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.float64 and model.config.dtype == torch.float64
    loaded = llama.load_merged(text)
    assert loaded.dtype == torch.float64
    for name, tensor in state_of(tmp_path / "out").items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(loaded.state_dict()[name], tensor)
    for kind in (torch.float64, torch.bfloat16):
        model.to(kind).requires_grad_(False)
        for parameter in model.parameters():
            parameter.zero_()
        live.merge_into(model, make_plan(text))
        for name, tensor in state_of(tmp_path / "out").items():
            assert torch.equal(model.state_dict()[name], tensor.to(kind))


def test_into_tensors_and_arrays() -> None:
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        out = {name: torch.zeros_like(x, dtype=kind) for name, x in A.items()}
        merge_state_dicts([A, B], "linear", parameters={"weight": 1}, out=out)
        wanted = merge_state_dicts([A, B], "linear", parameters={"weight": 1})
        assert all(torch.equal(out[name], x.to(kind)) for name, x in wanted.items())
    arrays = [{name: x.numpy() for name, x in state.items()} for state in (A, B)]
    made = merge_state_dicts(arrays, "linear", parameters={"weight": 1})
    wide = merge_state_dicts(
        [{n: x.astype(np.float32) for n, x in a.items()} for a in arrays], "linear",
        parameters={"weight": 1}, dtype="float64",
    )  # fmt: skip
    into = {name: np.zeros_like(x) for name, x in arrays[0].items()}
    merge_state_dicts(arrays, "linear", parameters={"weight": 1}, out=into)
    for name, x in made.items():
        assert x.dtype == wide[name].dtype == np.float64
        np.testing.assert_array_equal(x, into[name])
        np.testing.assert_allclose(wide[name], x, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- what is refused


def test_gpus_have_none(models) -> None:
    plan = make_plan(recipe(models, "linear", "a", "b"))
    with pytest.raises(UnsupportedError, match=r"is merged in float64.* use .*cpu"):
        Local(plan, device="cuda")
    local = Local(plan, device="auto")
    assert local.backend == "cpu" and "device auto: merged on the CPU" in local.notes[0]


def test_searches_and_schedules_are_walked_in_float32(models, tmp_path) -> None:
    from fastmerge.retrograde.opening import open_template
    from fastmerge.retrograde.schedule import load
    from fastmerge.search.recipes import check_form, template_of

    def plan_of(**top: str) -> Any:
        from fastmerge.recipe.document import Recipe

        document = Recipe.load(recipe(models, "linear", "a", "b", **top)).output
        check_form(document)
        return template_of(document, tmp_path, "")

    assert not any(item.in_float64 for item in plan_of().tensors)
    assert any("are float64: merged in float32" in note for note in plan_of().notes)
    with pytest.raises(FastmergeError, match="a search merges in float32"):
        plan_of(dtype="float64")
    schedule = {
        "baseline": str(models["a"]), "pool": [str(models["b"])],
        "schedule": {"steps": [{"degrade": {"partner": "b", "method": "linear", "t": 0.3}}]},
    }  # fmt: skip
    assert not any(item.in_float64 for item in open_template(load(schedule)).tensors)
    with pytest.raises(FastmergeError, match="walked in float32"):
        load({**schedule, "dtype": "float64"})


def test_factors_and_calls_stay_in_float32(models, tmp_path) -> None:
    with pytest.raises(FastmergeError, match="'float64'"):
        fastmerge.extract_lora(
            str(models["a32"]), str(models["base32"]), tmp_path / "x", rank=2, dtype="float64"
        )
    with pytest.raises(FastmergeError, match="cannot merge float64 tensors"):
        fastmerge.ops.linear([A["odd"], B["odd"]], [1, 1])


def test_codes_are_made_of_float32(zoo: Any) -> None:
    base = zoo.base("plain", dtype="F32")
    tensors = {}
    for name, x in zoo.read(base).items():
        if "proj" not in name:
            tensors[name] = ("F32", x)
            continue
        tensors[name] = ("F8_E4M3", np.full(x.shape, 0x38, np.uint8))
        tensors[f"{name}_scale_inv"] = ("F32", np.full((1, 1), 0.5, np.float32))
    section = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    coded = zoo.raw("coded", tensors, llama_config() | {"quantization_config": section})
    text = recipe({"a": coded, "b": base}, "linear", "a", "b", dtype="float64")
    wanted = {n: x.astype(np.float64) for n, x in zoo.read(base).items()}
    for name, array in fastmerge.materialise(text, as_="numpy"):
        first = 0.5 if "proj" in name else wanted[name]
        np.testing.assert_allclose(array, (first + wanted[name]) / 2, rtol=1e-15)
    with pytest.raises(UnsupportedError, match="codes are made of float32"):
        make_plan(text | {"out_dtype": "as_base"})


def test_rows_of_a_union_of_tokenizers(zoo: Any, tmp_path: Path) -> None:
    """Of numbers that float32 holds, rows and their means are float32's to its rounding."""
    pytest.importorskip("tokenizers")
    trio = trio_of(Maker(zoo), "union")
    for folder in trio.values():
        state = {n: x.double() for n, x in state_of(folder).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    made = {}
    for dtype in ("float64", "float32"):
        text = aligned(trio, dtype=dtype, tokenizer_source="union")
        api.merge(text, tmp_path / dtype)
        made[dtype] = state_of(tmp_path / dtype)
    assert made["float64"][EMBED].shape[0] > state_of(trio["base"])[EMBED].shape[0]
    for name, tensor in made["float64"].items():
        assert tensor.dtype == torch.float64
        assert torch.allclose(tensor, made["float32"][name].double(), rtol=1e-5, atol=1e-6)


def test_memory_that_is_not_the_numbers_is_refused() -> None:
    masked = {"w": np.ma.masked_array(np.ones(3), [True, False, False])}
    with pytest.raises(FastmergeError, match="masked array"):
        merge_state_dicts([masked], "linear", parameters={"weight": 1})
    swapped = {"w": np.ones(3, ">f8")}
    with pytest.raises(FastmergeError, match="not known"):
        merge_state_dicts([swapped], "linear", parameters={"weight": 1})


def test_at_an_odd_address(zoo: Any) -> None:
    x = np.linspace(0, 1, 5)
    odd = zoo.raw("odd", {"a": ("U8", np.zeros(3, "u1")), "w": ("F64", x)})
    for dtype in ("float64", "float32"):
        text = recipe({"odd": odd}, "linear", "odd", dtype=dtype)
        made = dict(fastmerge.materialise(text))
        np.testing.assert_array_equal(made["w"], x.astype(dtype))
