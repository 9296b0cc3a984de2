"""Merges written in the base's own format: codes and scales again, and what that costs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors

from fastmerge import _C, api
from fastmerge.averages import average
from fastmerge.cli import main
from fastmerge.compute.reference import CODES, dequantised
from fastmerge.errors import FastmergeError
from fastmerge.models.patterns import followed
from fastmerge.models.summary import summarise
from fastmerge.output.sink import ModelFolder
from tests.test_low_precision import (
    FP8,
    Formats,
    bf16,
    copy,
    gpt_oss,
    linear,
    raw,
)

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402


@pytest.fixture
def formats(zoo) -> Formats:
    return Formats(zoo)


# ---------------------------------------------------------------- the kernel


def quantise(x, code, block, *, power=False, scales="float32", threads=2):
    """`_C.quantise` of a matrix or a stack of them: codes, scales and its sums."""
    x = np.ascontiguousarray(x, np.float32)
    rows, cols = x.shape[-2:]
    down, across = -(-rows // block[0]), -(-cols // block[1])
    lead = x.shape[:-2]
    if code == "mxfp4":
        codes = np.empty((*lead, cols, rows // 32, 16), np.uint8)
        made = np.empty((*lead, cols, rows // 32), np.uint8)
    else:
        codes = np.empty(x.shape, np.uint8)
        made = np.empty((*lead, down, across), scales)
    sums = _C.quantise(
        _C.Pool(threads), raw(x), code, _C.MemorySink(raw(codes)), _C.MemorySink(raw(made)),
        rows=rows, cols=cols, block_rows=block[0], block_cols=block[1], power_of_two=power,
    )  # fmt: skip
    return codes, made, sums


@pytest.mark.parametrize("code", FP8)
def test_codes_are_rounded_as_torch_rounds(code):
    """Every code, every middle between two, and its neighbours; beyond the largest they saturate.
    The first number fixes the scale at 1.
    """
    most = torch.finfo(FP8[code]).max
    values = np.unique(CODES[code][np.isfinite(CODES[code])]).astype(np.float64)
    middles = (values[1:] + values[:-1]) / 2
    points = np.concatenate([values, middles, values * 1.0001]).astype(np.float32)
    near = [points, np.nextafter(points, np.float32(9e9)), np.nextafter(points, np.float32(-9e9))]
    x = np.concatenate([[most], *near]).astype(np.float32)[None]
    x = np.clip(x, -most, most)
    codes, scales, (bad, error, size) = quantise(x, code, (1, x.shape[1]))
    assert scales.tolist() == [[1.0]] and bad == 0
    expected = torch.from_numpy(x).to(FP8[code]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes, expected)
    wide = CODES[code][codes].astype(np.float64)
    np.testing.assert_allclose(error, ((wide - x) ** 2).sum(), rtol=1e-12)
    np.testing.assert_allclose(size, (x.astype(np.float64) ** 2).sum(), rtol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (130, 257), (2, 300, 200)])
@pytest.mark.parametrize("power", [False, True])
def test_scales_of_blocks(shape, power):
    x = np.random.default_rng(1).normal(0, 0.02, shape).astype(np.float32)
    x[..., :1, :1] = 0
    codes, scales, _ = quantise(x, "e4m3", (128, 128), power=power)
    for place in np.ndindex(scales.shape):
        *lead, i, j = place
        block = x[(*lead, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))]
        wanted = np.abs(block).max() / np.float32(448)
        if power and wanted:
            wanted = 2.0 ** np.ceil(np.log2(wanted))
        assert scales[place] == (wanted or 1)
    wide = dequantised(codes, scales, "e4m3", (128, 128))
    step = 2.0**-4 * np.abs(x) + 2.0**-10 * scales.max()
    assert (np.abs(wide - x) <= step).all()
    one = quantise(x, "e4m3", (128, 128), power=power, threads=1)
    np.testing.assert_array_equal(codes, one[0])


def test_whole_tensors_rows_and_what_is_not_finite():
    x = np.random.default_rng(2).normal(size=(3000, 50)).astype(np.float32)
    x[1, 1], x[2, 2], x[3, 3], x[7] = np.nan, np.inf, -np.inf, 0
    finite = np.where(np.isfinite(x), x, 0)
    codes, scales, (bad, _, _) = quantise(x, "e4m3", x.shape)
    assert bad == 3 and scales[0, 0] == np.abs(finite).max() / np.float32(448)
    assert [codes[1, 1], codes[2, 2], codes[3, 3]] == [0x7F, 0x7E, 0xFE]
    _, scales, _ = quantise(x, "e5m2", (1, 50))
    most = np.abs(finite).max(1) / np.float32(57344)
    np.testing.assert_array_equal(scales[:, 0], np.where(most > 0, most, 1))


def test_scales_of_other_types_are_what_the_numbers_are_divided_by():
    x = np.random.default_rng(3).normal(size=(64, 64)).astype(np.float32)
    codes, scales, _ = quantise(x, "e4m3", (64, 64), scales="float16")
    assert scales.dtype == np.float16
    wide = np.float32(scales[0, 0])
    clipped = torch.from_numpy(np.clip(x / wide, -448, 448))
    np.testing.assert_array_equal(codes, clipped.to(FP8["e4m3"]).view(torch.uint8).numpy())
    codes, scales, _ = quantise(x, "e4m3", (64, 64), scales="uint8")
    power = 2.0 ** (int(scales[0, 0]) - 127)
    assert power / 2 < np.abs(x).max() / 448 <= power


def test_mxfp4_by_the_specification():
    x = np.random.default_rng(4).normal(0, 0.1, (2, 64, 9)).astype(np.float32)
    x[0, :32, 0] = 0
    x[0, 32:, 1] *= 1e-30
    codes, scales, _ = quantise(x, "mxfp4", (32, 1))
    groups = np.swapaxes(x, 1, 2).reshape(2, 9, 2, 32)
    most = np.abs(groups).max(-1)
    with np.errstate(divide="ignore"):
        exponent = np.where(most > 0, np.floor(np.log2(most)) - 2, 0)
    np.testing.assert_array_equal(scales, np.clip(exponent + 127, 0, 254).astype(np.uint8))
    table = CODES["mxfp4"].astype(np.float64)
    scaled = groups.astype(np.float64) / np.ldexp(1.0, scales.astype(int) - 127)[..., None]
    found = table[np.stack([codes & 15, codes >> 4], -1).reshape(groups.shape)]
    nearest = np.abs(np.clip(scaled, -6, 6)[..., None] - table).min(-1)
    np.testing.assert_array_equal(np.abs(found - np.clip(scaled, -6, 6)), nearest)
    tie = np.zeros((1, 32, 1), np.float32)
    tie[0, :8, 0] = [4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    codes, scales, _ = quantise(tie, "mxfp4", (32, 1))
    even = [4, 0, 1, 1, 2, 2, 4, 4]
    assert scales.tolist() == [[[127]]]
    assert table[np.stack([codes & 15, codes >> 4], -1).ravel()[:8]].tolist() == even


@pytest.mark.parametrize("code", ["e4m3", "e5m2", "mxfp4"])
def test_codes_of_codes_are_the_codes(code):
    """Of blocks whose largest number is the coding's, rounding is undone by nothing."""
    rng = np.random.default_rng(5)
    if code == "mxfp4":
        blocks = rng.integers(0, 256, (3, 4, 2, 16), np.uint8) & 0x77
        blocks[..., 0] = 0x67
        exponents = rng.integers(100, 140, (3, 4, 2), np.uint8)
        wide = dequantised(blocks, exponents, code, (32, 1))
        codes, scales, (_, error, _) = quantise(wide, code, (32, 1))
        np.testing.assert_array_equal(codes, blocks)
        np.testing.assert_array_equal(scales, exponents)
    else:
        start = rng.integers(0, 0x70, (64, 64), np.uint8)
        start[::16, ::16] = 0x7E if code == "e4m3" else 0x7B
        given = (2.0 ** rng.integers(-9, 3, (4, 4))).astype(np.float32)
        wide = dequantised(start, given, code, (16, 16))
        codes, scales, (_, error, _) = quantise(wide, code, (16, 16))
        np.testing.assert_array_equal(codes, start)
        np.testing.assert_array_equal(scales, given)
    assert error == 0


# ---------------------------------------------------------------- models


def stored(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


KINDS = {
    "blocks": lambda f, n, of: f.fp8(n, of),
    "partial blocks": lambda f, n, of: f.fp8(n, of, block=(32, 32)),
    "tensor": lambda f, n, of: f.fp8(n, of, block=None, ends="_scale", more=["input_scale"]),
    "e5m2 rows": lambda f, n, of: f.fp8(n, of, block="rows", code="e5m2"),
    "compressed channel": lambda f, n, of: f.compressed(n, of, "channel"),
    "compressed block": lambda f, n, of: f.compressed(n, of, "block"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_as_the_base_is_stored(formats, zoo, kind):
    a = zoo.base()
    x = KINDS[kind](formats, "x", a)
    y = KINDS[kind](formats, "y", zoo.tune(a, "tuned"))
    out = zoo.root / "out"
    report = api.merge(linear(x, y, out_dtype="as_base"), out, threads=2)
    made, own = stored(out), stored(x)
    assert {n: (t.dtype, t.shape) for n, t in made.items()} == {
        n: (t.dtype, t.shape) for n, t in own.items()
    }
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (x / "config.json").read_text()
    )
    numbers = dict(api.materialise(copy(out, dtype="float32")))
    total = error = 0.0
    for name, first in formats.numbers["x"].items():
        merged = (first.astype(np.float64) + formats.numbers["y"][name]) / 2
        off = numbers[name].astype(np.float64) - merged
        if "_proj" in name:
            error, total = error + (off**2).sum(), total + (merged**2).sum()
    said = next(note for note in report.notes if note.startswith("rounding to codes: "))
    share = float(said.removeprefix("rounding to codes: ").partition("%")[0]) / 100
    np.testing.assert_allclose(share, np.sqrt(error / total), atol=6e-5)
    bound = 2**-3 if "e5m2" in kind else 2**-4
    assert 0 < np.sqrt(error / total) < bound
    lineage = json.loads((out / "fastmerge.json").read_text())["tensors"]
    rounded = lineage["model.layers.0.self_attn.q_proj.weight"]
    assert 0 < rounded["rounding"] < bound
    if kind == "tensor":
        assert sum(name.endswith("input_scale") for name in made) == 14
        assert any(
            "scales of activations are those of the model that leads" in n for n in report.notes
        )


def test_what_is_equal_keeps_its_codes_and_a_copy_is_one(formats, zoo):
    a = formats.fp8("a", zoo.base(), block=(32, 32))
    b = formats.fp8("b", zoo.base("again"), block=(32, 32))
    out = zoo.root / "out"
    api.merge(linear(a, b, out_dtype="as_base"), out)
    own, made = stored(a), stored(out)
    for name, tensor in own.items():
        assert torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("block", [(16, 16), None])
def test_the_result_loads_and_generates(formats, zoo, block):
    from transformers import AutoModelForCausalLM

    a = zoo.base()
    x, y = formats.fp8("x", a, block=block), formats.fp8("y", zoo.tune(a, "t"), block=block)
    out = zoo.root / "out"
    api.merge(linear(x, y, out_dtype="as_base"), out)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    made = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)


def test_mxfp4_again(zoo):
    from transformers import AutoModelForCausalLM

    a, b = gpt_oss(zoo, "a", 0), gpt_oss(zoo, "b", 1)
    out = zoo.root / "out"
    api.merge(linear(a, b, out_dtype="as_base"), out)
    made, own = stored(out), stored(a)
    assert {n: (t.dtype, t.shape) for n, t in made.items()} == {
        n: (t.dtype, t.shape) for n, t in own.items()
    }
    merged = dict(api.materialise(linear(a, b, dtype="float32")))
    model, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for name in (n for n in state if n.endswith("down_proj")):
        x, y = merged[name], state[name].numpy()
        # No further than half the largest step of a group, or a sixth beyond the largest code.
        assert np.abs(x - y).max() <= np.abs(x).max() * 0.34
        assert np.linalg.norm(x - y) < 0.2 * np.linalg.norm(x)
    made = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)


def test_layers_stacked_take_their_codes_along(formats, zoo):
    a = zoo.base()
    x = formats.fp8("x", a, block=None, more=["input_scale"])
    y = formats.fp8("y", zoo.tune(a, "t"), block=None, more=["input_scale"])
    pairs = [(x, y), (y, x), (x, y)]
    slices = [
        {"sources": [{"model": str(m), "layer_range": [0, 2]} for m in pair]} for pair in pairs
    ]
    recipe = {
        "merge_method": "slerp", "slices": slices, "base_model": str(x), "parameters": {"t": 0.4},
        "out_dtype": "as_base",
    }  # fmt: skip
    plan = api.plan(recipe)
    names = [part.name for tensor in plan.tensors for part in tensor.written]
    assert "model.layers.5.mlp.up_proj.weight_scale_inv" in names
    assert "model.layers.5.mlp.up_proj.input_scale" in names
    assert plan.config["quantization_config"] and plan.config["num_hidden_layers"] == 6


def test_a_base_without_codes_is_written_as_it_is(formats, zoo):
    a = zoo.base(dtype="F16")
    x = formats.fp8("x", zoo.base("b", seed=4))
    recipe = linear(a, x, out_dtype="as_base")
    plan = api.plan(recipe)
    assert {tensor.dtype.code for tensor in plan.tensors} == {"F16"}
    assert "quantization_config" not in plan.config


def test_two_formats_have_no_one_base(formats, zoo):
    x = formats.fp8("x", zoo.base())
    y = formats.fp8("y", zoo.base("b", seed=4), block=(32, 32))
    slices = [{"sources": [{"model": str(m), "layer_range": [0, 2]}]} for m in (x, y)]
    recipe = {
        "merge_method": "passthrough", "slices": slices, "out_dtype": "as_base",
        "parameters": {"scale": 1.5},
    }  # fmt: skip
    with pytest.raises(FastmergeError, match=r"as_base: tensor 'model.layers.2.*whose format"):
        api.plan(recipe)


@pytest.mark.parametrize("killed", [8, 9, 10, 11])
def test_a_killed_merge_ends_with_the_same_codes(formats, zoo, monkeypatch, killed):
    a = zoo.base()
    x, y = formats.fp8("x", a), formats.fp8("y", zoo.tune(a, "t"))
    recipe = linear(x, y, out_dtype="as_base")
    whole, cut = zoo.root / "whole", zoo.root / "cut"
    small = {"threads": 1, "max_shard_bytes": 1100}  # some codes lie in another than their scales
    api.merge(recipe, whole, **small)
    computed, calls = ModelFolder.computed, []

    def dies(self, item, outcome) -> None:
        calls.append(item.name)
        if len(calls) > killed:
            until = time.monotonic() + 30  # what the disk has not taken by now is not kept
            while not self._writer._journal.entries and time.monotonic() < until:
                self._writer.mark()
                time.sleep(0.001)
            raise KeyboardInterrupt
        computed(self, item, outcome)

    monkeypatch.setattr(ModelFolder, "computed", dies)
    with pytest.raises(KeyboardInterrupt):
        api.merge(recipe, cut, **small)
    monkeypatch.undo()
    report = api.merge(recipe, cut, **small)
    assert report.resumed
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (cut / file.name).read_bytes(), file.name
    told = [json.loads((f / "fastmerge.json").read_text())["tensors"] for f in (whole, cut)]
    assert told[0] == told[1]


def test_every_instruction_set_writes_the_same(formats, zoo):
    a = zoo.base()
    x, y = formats.fp8("x", a), formats.fp8("y", zoo.tune(a, "t"))
    recipe = linear(x, y, out_dtype="as_base")
    made = []
    before = _C.isa()
    for isa in _C.isas():
        _C.set_isa(isa)
        api.merge(recipe, zoo.root / isa, threads=2)
        made.append((zoo.root / isa / "model.safetensors").read_bytes())
    _C.set_isa(before)
    assert len(set(made)) == 1


def test_what_was_written_is_verified(formats, zoo):
    a = zoo.base()
    x, y = formats.fp8("x", a), formats.fp8("y", zoo.tune(a, "t"))
    recipe, out = linear(x, y, out_dtype="as_base"), zoo.root / "out"
    api.merge(recipe, out)
    found = api.verify(out, recipe)
    assert found.whole and not found.unchecked and found.tensors == len(stored(x))


def test_memory_holds_numbers(formats, zoo):
    a = zoo.base()
    x, y = formats.fp8("x", a), formats.fp8("y", zoo.tune(a, "t"))
    found = dict(api.materialise(linear(x, y, out_dtype="as_base")))
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == np.uint16
    assert found.keys() == zoo.read(a).keys()


MIXED = [f"model.layers.1.{m}_proj" for m in ("self_attn.q", "self_attn.k", "self_attn.v")]


def partly(formats, zoo) -> Path:
    """A coded model whose second layer's attention is left as numbers, as its config says."""
    coded = formats.fp8("partly", zoo.base(layers=3))
    tensors, config = stored_raw(coded), json.loads((coded / "config.json").read_text())
    for module in MIXED:
        del tensors[f"{module}.weight_scale_inv"]
        name = f"{module}.weight"
        tensors[name] = ("BF16", bf16(formats.numbers["partly"][name]))
    config["quantization_config"]["modules_to_not_convert"] = [*MIXED, "lm_head"]
    return zoo.raw("partly", tensors, config)


def stored_raw(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    types = {"BF16": np.uint16, "F32": np.float32, "F8_E4M3": np.uint8, "U8": np.uint8}
    found = safetensors.deserialize((folder / "model.safetensors").read_bytes())
    return {
        name: (own["dtype"], np.frombuffer(own["data"], types[own["dtype"]]).reshape(own["shape"]))
        for name, own in found
    }


@pytest.mark.parametrize("how", ["copied", "rounded"])
def test_the_config_names_modules_where_their_layers_now_are(formats, zoo, how):
    """Else codes are loaded as numbers, and numbers as codes."""
    coded, other = partly(formats, zoo), zoo.base("other", seed=5, layers=3)
    ranges = [[1, 3], [0, 2]]
    slices = [{"sources": [{"model": str(coded), "layer_range": r}]} for r in ranges]
    recipe = {"merge_method": "passthrough", "slices": slices}
    if how == "rounded":
        for entry, own in zip(slices, ranges, strict=True):
            entry["sources"].append({"model": str(other), "layer_range": own})
        recipe |= {"merge_method": "linear", "parameters": {"weight": 0.5}, "out_dtype": "as_base"}
    api.merge(recipe, zoo.root / "out")
    said = json.loads((zoo.root / "out" / "config.json").read_text())["quantization_config"]
    tensors = stored_raw(zoo.root / "out")
    plain = {
        n.removesuffix(".weight") for n, (t, _) in tensors.items() if "proj" in n and t == "BF16"
    }
    assert plain == {m.replace("s.1.", f"s.{i}.") for m in MIXED for i in (0, 3)}
    assert set(said["modules_to_not_convert"]) == {*plain, "lm_head"}


def test_names_and_expressions_follow_their_layers():
    moves = {f"model.layers.{i}.mlp.{p}": [f"model.layers.{j}.mlp.{p}" for j in to]
             for i, to in ((1, (0, 2)), (10, (1,))) for p in ("up_proj", "experts.3")}  # fmt: skip
    moves["lm_head"] = ["lm_head"]

    def followed_(*names: str) -> list[str]:
        return followed({"a": [{"ignore": list(names)}]}, moves, "x")["a"][0]["ignore"]

    assert followed_("lm_head", "re:.*experts.*") == ["lm_head", "re:.*experts.*"]
    assert followed_("model.layers.1") == ["model.layers.0", "model.layers.2"]
    assert followed_("layers.10.mlp.up_proj") == ["layers.1.mlp.up_proj"]
    assert followed_("mlp.experts.3") == ["mlp.experts.3"]
    assert followed_("re:.*experts.[0-9]+") == ["re:.*experts.[0-9]+"]
    assert followed_(r"re:.*layers\.10\..*up") == ["model.layers.1.mlp.up_proj"]
    # Of a layer that was left out, whose number is another's now.
    assert followed_("model.layers.0.mlp") == []
    assert followed_("vision.patch2") == ["vision.patch2"]
    with pytest.raises(FastmergeError, match="could take for ever"):
        followed_("re:((a+)+)+1")


@pytest.mark.parametrize("case", ["lead", "opened first", "slices"])
def test_an_adapter_on_codes_is_written_as_codes(formats, zoo, case):
    """As its base is stored, in whatever order models and adapters are opened."""
    base = zoo.base()
    coded, other = formats.fp8("coded", base), formats.fp8("other", zoo.base("b", seed=5))
    adapted = f"{coded}+{zoo.adapter('adapter', base, target_modules=['q_proj'])}"
    keep_q(zoo.root / "adapter")
    if case == "lead":
        recipe = copy(adapted, out_dtype="as_base")
    elif case == "opened first":
        recipe = linear(adapted, other, out_dtype="as_base", base_model=str(other))
    else:
        sources = [
            {"sources": [{"model": m, "layer_range": [0, 1]}]} for m in (adapted, str(other))
        ]
        recipe = {"merge_method": "passthrough", "slices": sources, "out_dtype": "as_base"}
    report = api.merge(recipe, zoo.root / "out")
    assert sum("are merged as the numbers" in note for note in report.notes) == 1 + (case != "lead")
    made, before = stored_raw(zoo.root / "out"), stored_raw(coded)
    for name, (kind, array) in made.items():
        assert kind == before[name][0]
        if "q_proj" not in name and case == "lead":
            assert (array == before[name][1]).all()
    config = json.loads((zoo.root / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    wide = api.materialise(
        {**{k: v for k, v in recipe.items() if k != "out_dtype"}, "dtype": "float32"}
    )
    for name, values in dict(wide).items():
        if "proj" not in name:
            continue
        codes, scales = made[name][1], made[f"{name}_scale_inv"][1]
        near = dequantised(codes, scales, "e4m3", (16, 16))
        assert np.abs(near - values).max() <= np.abs(values).max() / 15


def keep_q(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "q_proj" in name}
    save_file(kept, file)


def test_averages_and_folds_as_the_base_is_stored(formats, zoo):
    a = zoo.base()
    x, y = formats.fp8("x", a), formats.fp8("y", zoo.tune(a, "tuned"))
    api.merge(linear(x, y, weight=1.0, out_dtype="as_base"), zoo.root / "recipe")
    average([x, y], zoo.root / "averaged", dtype="as_base")
    assert raw_tensors(zoo.root / "averaged") == raw_tensors(zoo.root / "recipe")

    lora, name = zoo.root / "lora", "base_model.model.model.layers.0.self_attn.q_proj"
    lora.mkdir()
    factors = {"A": torch.ones(1, 32), "B": torch.ones(32, 1)}
    save_file(
        {f"{name}.lora_{which}.weight": each for which, each in factors.items()},
        lora / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "layers_to_transform": [0]}
    config["target_modules"] = ["q_proj"]
    (lora / "adapter_config.json").write_text(json.dumps(config))
    report = api.fold(x, lora, zoo.root / "folded", dtype="as_base")
    assert any(note.startswith("1 tensors are rounded to the codes of") for note in report.notes)
    before, after = raw_tensors(x), raw_tensors(zoo.root / "folded")
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert {each for each in before if before[each] != after[each]} == {
        weight, f"{weight}_scale_inv",
    }  # fmt: skip
    merged = dict(api.materialise(copy(zoo.root / "folded", dtype="float32")))[weight]
    np.testing.assert_allclose(merged, formats.numbers["x"][weight] + 1, rtol=2**-4)


def raw_tensors(folder: Path) -> dict[str, tuple]:
    stored_as = load_file(folder / "model.safetensors")
    return {n: (t.dtype, t.view(torch.uint8).tolist()) for n, t in stored_as.items()}


def test_info_and_diff_say_that_weights_are_codes(formats, zoo, capsys):
    a = zoo.base()
    x, y = formats.fp8("x", a), formats.fp8("y", zoo.tune(a, "tuned"))
    found = summarise(x)
    assert found.codes == "fp8 (e4m3, a scale for 16 x 16), 14 tensors"
    assert found.parameters == summarise(a).parameters and summarise(a).codes is None
    for words, code in ((["info", x], 0), (["diff", x, y], 0)):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        assert int(stop.value.code or 0) == code
        said = "".join(capsys.readouterr())
        assert "fp8 (e4m3, a scale for 16 x 16), 14 tensors" in said
    assert "x is fp8" in said and "y is fp8" in said and "`dtype: bfloat16` writes the" in said
    packed = json.loads((x / "config.json").read_text())
    packed["quantization_config"]["weight_block_size"] = [3, 3]
    (x / "config.json").write_text(json.dumps(packed))
    assert "config.json says fp8" in str(summarise(x).codes)


def mxfp8(formats, zoo, name, of) -> Path:
    """compressed-tensors' MXFP8: a power of two, as a byte, for each of a row's groups."""
    coded = formats.compressed(name, of, "group")
    tensors, numbers = stored_raw(coded), formats.numbers[name]
    config = json.loads((coded / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["scale_dtype"] = "torch.uint8"
    for scale in [tensor for tensor in tensors if tensor.endswith("_scale")]:
        powers = np.round(np.log2(tensors[scale][1])).astype(int) + 127
        tensors[scale] = ("U8", powers.astype(np.uint8))
        codes = tensors[scale.removesuffix("_scale")][1]
        wide = np.ldexp(np.float32(1), powers - 127)
        numbers[scale.removesuffix("_scale")] = dequantised(codes, wide, "e4m3", (1, 16))
    return zoo.raw(name, tensors, config)


def test_mxfp8_as_compressed_tensors_writes_it(formats, zoo):
    a = zoo.base()
    x, y = mxfp8(formats, zoo, "x", a), mxfp8(formats, zoo, "y", zoo.tune(a, "t"))
    found = dict(api.materialise(linear(x, y, dtype="float32")))
    for name, values in formats.numbers["x"].items():
        expected = 0.5 * values.astype(np.float64) + 0.5 * formats.numbers["y"][name]
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-30, err_msg=name)
    api.merge(linear(x, y, out_dtype="as_base"), zoo.root / "out")
    made, before = stored(zoo.root / "out"), stored(x)
    assert {n: (t.dtype, t.shape) for n, t in made.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    again = dict(api.materialise(copy(zoo.root / "out", dtype="float32")))
    for name in (n for n in found if "_proj" in n):
        # Half a step of four bits, or of the smallest codes.
        step = np.abs(found[name]) * 2.0**-4 + np.abs(found[name]).max() * 2.0**-15
        assert (np.abs(again[name] - found[name]) <= step).all(), name
    plain = json.loads((x / "config.json").read_text())
    del plain["quantization_config"]["config_groups"]["group_0"]["weights"]["scale_dtype"]
    (x / "config.json").write_text(json.dumps(plain))
    with pytest.raises(FastmergeError, match=r"weight_scale' is uint8; scales are float32"):
        api.plan(linear(x, y))
