"""fp8 and MXFP4 models: read as the numbers they stand for, against other tools' dequantisers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastmerge import _C, api
from fastmerge.compute.cpu import cpu
from fastmerge.compute.reference import CODES, dequantised
from fastmerge.errors import FastmergeError

torch = pytest.importorskip("torch")

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.fixture(params=_C.isas())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def raw(array: np.ndarray) -> _C.View:
    array = np.ascontiguousarray(array)
    code = {"float32": "F32", "uint16": "BF16", "float16": "F16"}.get(array.dtype.name, "RAW")
    return _C.View(array.ctypes.data, array.size, code, array)


def numbers(view: _C.View, begin: int = 0, end: int | None = None) -> np.ndarray:
    return np.array(cpu(2).array(view.slice(begin, view.count if end is None else end)))


# ---------------------------------------------------------------- the kernel


@pytest.mark.parametrize("code", FP8)
def test_the_tables_are_torchs(code):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(FP8[code]).float().numpy()
    np.testing.assert_array_equal(CODES[code], expected)
    assert np.signbit(CODES[code][0x80])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("code", FP8)
@pytest.mark.parametrize("scale", [1.0, 3e-5, 1.1754944e-38, 1e-42, 7e35])
def test_every_code_times_a_scale(code, scale):
    codes = np.arange(256, dtype=np.uint8)
    scales = np.array([scale], np.float32)
    view = _C.dequantised(
        code, raw(codes), raw(scales), rows=1, cols=256, block_rows=1, block_cols=256
    )
    with np.errstate(over="ignore", invalid="ignore"):
        expected = CODES[code] * scales[0]
    found = numbers(view)
    np.testing.assert_array_equal(found, expected)
    assert (np.signbit(found) == np.signbit(expected))[~np.isnan(expected)].all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (128, 128), (130, 257), (2, 300, 200)])
@pytest.mark.parametrize("kind", [np.float32, np.float16, "bf16", "e8m0"])
def test_blocks_against_the_reference_from_any_place(shape, kind):
    rng = np.random.default_rng(3)
    rows, cols = shape[-2:]
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    grid = (*shape[:-2], -(-rows // 128), -(-cols // 128))
    scales = rng.uniform(1e-3, 2, grid).astype(np.float32)
    stored, wide = scales, scales
    if kind == "e8m0":
        stored = rng.integers(100, 140, grid, np.uint8)
        wide = np.ldexp(np.float32(1), stored.astype(int) - 127)
    elif kind == "bf16":
        stored = (scales.view(np.uint32) >> 16).astype(np.uint16)
        wide = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = scales.astype(kind)
        wide = stored.astype(np.float32)
    expected = dequantised(codes, wide, "e4m3", (128, 128)).ravel()
    view = _C.dequantised(
        "e4m3", raw(codes), raw(stored), rows=rows, cols=cols, block_rows=128, block_cols=128
    )
    assert view.is_gathered
    np.testing.assert_array_equal(numbers(view), expected)
    for begin, end in ((codes.size // 3, codes.size), (codes.size - 1, codes.size)):
        np.testing.assert_array_equal(numbers(view, begin, end), expected[begin:end])


@pytest.mark.parametrize("shape", [(1, 32, 1), (2, 64, 5), (3, 96, 700)])
def test_mxfp4_is_the_transpose_of_what_is_stored(shape):
    rng = np.random.default_rng(4)
    experts, rows, cols = shape
    blocks = rng.integers(0, 256, (experts, cols, rows // 32, 16), np.uint8)
    scales = rng.integers(0, 255, (experts, cols, rows // 32), np.uint8)
    view = _C.dequantised(
        "mxfp4", raw(blocks), raw(scales), rows=rows, cols=cols, block_rows=32, block_cols=1
    )
    with np.errstate(over="ignore"):
        expected = dequantised(blocks, scales, "mxfp4", (32, 1))
    assert expected.shape == shape
    np.testing.assert_array_equal(numbers(view), expected.ravel())
    np.testing.assert_array_equal(numbers(view, 7, 29), expected.ravel()[7:29])


@pytest.mark.parametrize(
    ("value", "kind"),
    [(0, "F32"), (-1, "F32"), (np.nan, "F32"), (np.inf, "F32"), (255, "E8M0")],
)
def test_a_scale_that_is_none_is_found(value, kind):
    scales = np.ones(1000, np.float32 if kind == "F32" else np.uint8)
    assert _C.bad_scale(raw(scales)) is None
    scales[[700, 900]] = value
    assert _C.bad_scale(raw(scales)) == 700


def test_arguments_that_do_not_fit():
    codes, scales = raw(np.zeros(64, np.uint8)), raw(np.ones(4, np.float32))
    wrong = [
        ("e4m3", codes, scales, 8, 8, 8, 8),
        ("e4m3", codes, scales, 7, 8, 4, 4),
        ("e4m3", scales, scales, 2, 2, 1, 1),
        ("e3m4", codes, scales, 8, 8, 4, 4),
        ("mxfp4", codes, raw(np.zeros(4, np.uint8)), 32, 4, 16, 1),
        ("mxfp4", codes, scales, 32, 4, 32, 1),
    ]
    for code, a, b, rows, cols, down, across in wrong:
        with pytest.raises(ValueError, match=r"codes|coding|scale"):
            _C.dequantised(code, a, b, rows=rows, cols=cols, block_rows=down, block_cols=across)


# ---------------------------------------------------------------- models


def codes_of(values: np.ndarray, block: tuple[int, int] | None, code: str = "e4m3"):
    """fp8 codes by amax of each block, and their scales, by torch's rounding."""
    rows, cols = values.shape
    down, across = block or values.shape
    grid = -(-rows // down), -(-cols // across)
    scales = np.ones(grid, np.float32)
    for i, j in np.ndindex(grid):
        part = values[i * down : (i + 1) * down, j * across : (j + 1) * across]
        scales[i, j] = np.float32(np.abs(part).max() / torch.finfo(FP8[code]).max)
    wide = np.repeat(np.repeat(scales, down, 0), across, 1)[:rows, :cols]
    found = torch.from_numpy(values.astype(np.float32) / wide).to(FP8[code])
    return found.view(torch.uint8).numpy(), scales


def is_linear(name: str) -> bool:
    return "_proj" in name


def bf16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def section(**more) -> dict:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **more}


class Formats:
    """Small llamas of a zoo again, in fp8; ``numbers`` are what their codes stand for."""

    def __init__(self, zoo) -> None:
        self.zoo = zoo
        self.numbers: dict[str, dict[str, np.ndarray]] = {}

    def fp8(self, name, of, *, block=(16, 16), said=None, code="e4m3", ends="_scale_inv", more=()):
        config = json.loads((of / "config.json").read_text())
        tensors, plain = {}, {}
        for tensor, values in self.zoo.read(of).items():
            if not is_linear(tensor):
                tensors[tensor], plain[tensor] = ("BF16", bf16(values)), values
                continue
            shape = (1, values.shape[1]) if block == "rows" else block
            codes, scales = codes_of(values, shape, code)
            plain[tensor] = dequantised(codes, scales, code, shape or values.shape)
            kind = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}[code]
            tensors[tensor] = (kind, codes)
            tensors[tensor + ends] = ("F32", scales.reshape(()) if block is None else scales)
            for static in more:
                tensors[tensor.removesuffix("weight") + static] = ("F32", np.ones(1, np.float32))
        if said is None:
            size = list(block) if isinstance(block, tuple) else None
            said = section(weight_block_size=size, fmt=code)
        self.numbers[name] = plain
        return self.zoo.raw(name, tensors, {**config, "quantization_config": said})

    def compressed(self, name, of, strategy, **more):
        block = {"tensor": None, "channel": "rows", "block": (16, 16), "group": (1, 16)}[strategy]
        weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
        weights |= {"block": {"block_structure": [16, 16]}, "group": {"group_size": 16}}.get(
            strategy, {}
        )
        groups = {"group_0": {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}}
        said = {
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "quantization_status": "compressed", "config_groups": groups, "ignore": ["lm_head"],
        }  # fmt: skip
        return self.fp8(name, of, block=block, said=said, ends="_scale", **more)


@pytest.fixture
def formats(zoo) -> Formats:
    return Formats(zoo)


def linear(*models, weight=0.5, **more) -> dict:
    each = [{"model": str(m), "parameters": {"weight": weight}} for m in models]
    return {"merge_method": "linear", "models": each, **more}


def copy(model, **more) -> dict:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}], **more}


def refusal(*models, **more) -> str:
    with pytest.raises(FastmergeError) as caught:
        api.plan(linear(*models, **more))
    return str(caught.value)


def output(recipe, zoo, name="out") -> tuple[dict[str, np.ndarray], dict]:
    out = zoo.root / name
    api.merge(recipe, out, threads=2)
    return zoo.read(out), json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("block", [(16, 16), (32, 32), None, "rows"])
@pytest.mark.parametrize("code", FP8)
def test_a_merge_of_codes_is_the_merge_of_their_numbers(formats, zoo, block, code):
    a, b = zoo.base(), zoo.base("other", seed=5)
    coded = formats.fp8("coded", a, block=block, code=code)
    found, config = output(linear(coded, b), zoo)
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    assert found.keys() == zoo.read(a).keys()
    for name, values in zoo.read(b).items():
        expected = 0.5 * formats.numbers["coded"][name].astype(np.float64) + 0.5 * values
        np.testing.assert_allclose(found[name], expected, rtol=2**-8, atol=1e-30, err_msg=name)


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_ties", "karcher", "nearswap"])
def test_methods_over_codes_are_methods_over_numbers(formats, zoo, method):
    a = zoo.base()
    b, c = formats.fp8("b", zoo.tune(a, "tb")), formats.fp8("c", zoo.tune(a, "tc", seed=3))
    plain = [
        zoo.write(
            f"{n}32", formats.numbers[n], json.loads((a / "config.json").read_text()), dtype="F32"
        )
        for n in "bc"
    ]
    outs = []
    for number, (x, y) in enumerate([(b, c), plain]):
        models = [{"model": str(m)} for m in (x, y)]
        recipe = {"merge_method": method, "models": models, "dtype": "float32", "seed": 1}
        if method in ("ties", "dare_ties"):
            recipe |= {"base_model": str(a), "parameters": {"density": 0.5, "weight": 0.5}}
        elif method != "karcher":
            recipe |= {"base_model": str(x), "parameters": {"t": 0.3}}
        outs.append(output(recipe, zoo, f"out{number}")[0])
    for name, values in outs[0].items():
        np.testing.assert_array_equal(values, outs[1][name], err_msg=name)


@pytest.mark.parametrize("block", [(16, 16), None])
def test_numbers_are_transformers_own(formats, zoo, block):
    from transformers import AutoModelForCausalLM

    coded = formats.fp8("coded", zoo.base(), block=block)
    out = zoo.root / "out"
    api.merge(copy(coded, dtype="bfloat16"), out)
    theirs = AutoModelForCausalLM.from_pretrained(coded, dtype=torch.bfloat16)
    ours, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    made = ours.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block", "group"])
def test_numbers_are_compressed_tensors_own(formats, zoo, strategy):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    coded = formats.compressed("coded", zoo.base(), strategy)
    found, config = output(copy(coded, dtype="float32"), zoo)
    assert "quantization_config" not in config
    from safetensors.torch import load_file

    stored = load_file(coded / "model.safetensors")
    said = json.loads((coded / "config.json").read_text())["quantization_config"]
    args = quantization.QuantizationArgs(**said["config_groups"]["group_0"]["weights"])
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[f"{name}_scale"]
            theirs = forward.dequantize(tensor, scale, args=args, dtype=torch.float32)
            np.testing.assert_array_equal(found[name], theirs.numpy(), err_msg=name)


def gpt_oss(zoo, name, seed):
    """A small gpt-oss as it is shipped: experts in MXFP4, the rest bfloat16."""
    from safetensors.torch import save_file
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    config = GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        vocab_size=48, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    state = GptOssForCausalLM(config).to(torch.bfloat16).state_dict()
    for tensor in [t for t in state if t.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, cols = state.pop(tensor).shape
        state[f"{tensor}_blocks"] = torch.randint(
            0, 256, (experts, cols, rows // 32, 16), dtype=torch.uint8
        )
        state[f"{tensor}_scales"] = torch.randint(
            115, 123, (experts, cols, rows // 32), dtype=torch.uint8
        )
    folder = zoo.root / name
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    said = config.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_mxfp4_is_what_transformers_makes_of_it_and_generates(zoo):
    from transformers import AutoModelForCausalLM

    a, b = gpt_oss(zoo, "a", 0), gpt_oss(zoo, "b", 1)
    out, mean = zoo.root / "out", zoo.root / "mean"
    api.merge(copy(a, dtype="bfloat16"), out)
    theirs = AutoModelForCausalLM.from_pretrained(a, dtype=torch.bfloat16)
    ours, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    made = ours.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)

    plan = api.plan(linear(a, b))
    name = "model.layers.0.mlp.experts.down_proj"
    assert {t.name: t.shape for t in plan.tensors}[name] == (4, 32, 64)
    api.merge(linear(a, b), mean)
    other = AutoModelForCausalLM.from_pretrained(b, dtype=torch.bfloat16).state_dict()
    merged = zoo.read(mean)
    for name in (n for n in merged if "experts" in n):
        expected = (theirs.state_dict()[name].double() + other[name].double()) / 2
        np.testing.assert_allclose(merged[name], expected.numpy(), rtol=2**-8, err_msg=name)


# ---------------------------------------------------------------- what is copied, noted, refused


def test_a_copy_keeps_its_codes_where_no_type_is_asked_for(formats, zoo):
    coded = formats.fp8("coded", zoo.base())
    plan = api.plan(copy(coded))
    assert plan.methods == {"copy": len(plan.tensors)} and "quantization_config" in plan.config
    assert {t.dtype.code for t in plan.tensors} == {"F8_E4M3", "F32", "BF16"}
    layers = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(m), "layer_range": [0, 2]}]}
            for m in (coded, formats.fp8("other", zoo.base("b", seed=4), block=(32, 32)))
        ],
    }
    assert {t.dtype.code for t in api.plan(layers).tensors} == {"BF16"}, "two formats are numbers"


def test_what_becomes_of_codes_is_said(formats, zoo):
    a = zoo.base()
    coded = formats.fp8("coded", a, more=["input_scale", "k_scale"])
    plan = api.plan(linear(coded, a))
    said = "(e4m3, a scale for 16 x 16): its 14 coded tensors are merged as the numbers they stand"
    assert any(said in note and "28 scales of activations" in note for note in plan.notes)
    assert not any("scale" in tensor.name for tensor in plan.tensors)
    assert all(tensor.bytes_in > tensor.count * 2 for tensor in plan.tensors)


@pytest.mark.parametrize("as_base", [False, True])
def test_a_gpu_leaves_to_the_cpu_what_is_written_as_codes_and_says_so(
    formats, zoo, monkeypatch, as_base
):
    from fastmerge.engine import executor

    monkeypatch.setattr(executor, "choose_devices", lambda *_: (["cuda:0"], ""))
    a = formats.fp8("coded", zoo.base())
    more = {"out_dtype": "as_base", "base_model": str(a)} if as_base else {}
    plan = api.plan(linear(a, formats.fp8("other", zoo.root / "base"), **more))
    notes = executor.Local(plan, device="cuda").notes
    told = "14 tensors are stored as codes: the CPU computes them, with the GPU's bits"
    assert (told in notes) == as_base
    assert sum(map(executor.on_host, plan.tensors)) == (14 if as_base else 0)


Q = "model.layers.0.self_attn.q_proj.weight"


def spoilt(formats, zoo, change, **said):
    """A model whose tensors or section ``change`` has had its way with."""
    from safetensors.torch import load_file, save_file

    coded = formats.fp8("coded", zoo.base())
    tensors = load_file(coded / "model.safetensors")
    change(tensors)
    save_file(tensors, coded / "model.safetensors")
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"] |= said
    (coded / "config.json").write_text(json.dumps(config))
    return coded


def _same(_tensors) -> None:
    pass


def _set(name, make):
    def change(tensors) -> None:
        tensors[name] = make(tensors.get(name))

    return change


SPOILT = {
    "no scales": (
        lambda t: t.pop(f"{Q}_scale_inv"), {},
        f"'{Q}' is float8_e4m3fn without its scales, '{Q}_scale_inv' or '{Q}_scale'",
    ),
    "no codes": (lambda t: t.pop(Q), {}, f"'{Q}_scale_inv' has no codes beside it, '{Q}'"),
    "plain numbers": (
        _set(Q, lambda x: x.float().bfloat16()), {},
        f"'{Q}' is bfloat16 beside scales, '{Q}_scale_inv'",
    ),
    "misshapen scales": (
        _set(f"{Q}_scale_inv", lambda x: x[:1].clone()), {},
        f"'{Q}_scale_inv' is [1, 2] for '{Q}' of [32, 32], where it says weight_block_size: [2, 2]",
    ),
    "whole scales": (
        _set(f"{Q}_scale_inv", lambda x: x.int()), {}, f"'{Q}_scale_inv' is int32; scales are"
    ),
    "another block": (
        _same, {"weight_block_size": [24, 24]}, "where it says weight_block_size: [2, 2]"
    ),
    "another format": (
        _same, {"fmt": "e5m2"}, "_proj.weight' is float8_e4m3fn, where fmt says e5m2"
    ),
    "others' codes": (
        _set("model.layers.0.self_attn.q_proj.qweight", lambda _: torch.zeros(4, 4).int()), {},
        "q_proj.qweight' is int32, with no place in it",
    ),
    "groups in another order": (
        _set("model.layers.0.self_attn.q_proj.weight_g_idx", lambda _: torch.zeros(32).int()), {},
        "q_proj.weight_g_idx' is int32, with no place in it",
    ),
    "zeros beside 0": (
        _set(
            "model.layers.0.self_attn.q_proj.weight_zero_point",
            lambda _: torch.zeros(32, 1).to(torch.float8_e4m3fn),
        ), {}, "q_proj.weight_zero_point' is float8_e4m3fn, with no place in it",
    ),
    "mxfp4": (_same, {"quant_method": "mxfp4"}, "says mxfp4 (quantization_config), and tensor '"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_config_and_tensors_that_contradict_are_both_named(formats, zoo, kind):
    change, said, expected = SPOILT[kind]
    coded = spoilt(formats, zoo, change, **said)
    line = refusal(coded, zoo.base("plain", seed=2))
    assert expected in line and "config.json says" in line and "\n" not in line


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_none_end_the_merge(formats, zoo, value):
    def change(tensors) -> None:
        tensors[f"{Q}_scale_inv"][1, 0] = value

    coded = spoilt(formats, zoo, change)
    with pytest.raises(FastmergeError) as caught:
        api.merge(linear(coded, zoo.base("plain", seed=2)), zoo.root / "out")
    line = str(caught.value)
    assert f"{coded}: tensor '{Q}_scale_inv' holds {value} at 2, where a number above 0" in line
    assert not (zoo.root / "out").exists()


MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}
E = np.zeros((2, 4, 3, 16), np.uint8)
BLOCKS = {
    "codes of another type": ({"e.p_blocks": ("I8", E.view(np.int8))}, "is int8; blocks are uint8"),
    "no scales": ({"e.p_blocks": ("U8", E)}, "'e.p_blocks' lacks its scales, 'e.p_scales'"),
    "misshapen": (
        {"e.p_blocks": ("U8", E), "e.p_scales": ("U8", E[:, :, :2, 0].copy())},
        "'e.p_blocks' is [2, 4, 3, 16] and 'e.p_scales' [2, 4, 2]",
    ),
    "scales of another type": (
        {"e.p_blocks": ("U8", E), "e.p_scales": ("F32", E[..., 0].astype(np.float32))},
        "'e.p_scales' is float32; scales are uint8 (E8M0)",
    ),
    "scales alone": (
        {
            "e.p_blocks": ("U8", E), "e.p_scales": ("U8", E[..., 0].copy()),
            "e.q_scales": ("U8", E[..., 0].copy()),
        },
        "'e.q_scales' has no codes beside it, 'e.q_blocks'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_that_do_not_fit(zoo, kind):
    tensors, expected = BLOCKS[kind]
    assert expected in refusal(zoo.raw("a", tensors, MXFP4), zoo.base())


def test_other_formats_are_refused_as_before(zoo):
    codes = {"q.weight_packed": ("I32", np.zeros((4, 4), np.int32))}
    int4 = {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}}
    for said in (
        {"quant_method": "compressed-tensors", "config_groups": int4},
        {"quant_method": "gptq", "bits": 4},
    ):
        a = zoo.raw("a", codes, {"quantization_config": said})
        line = refusal(a, zoo.base())
        assert f"is quantised ({said['quant_method']} in config.json)" in line
        assert "does not dequantise; merge the original weights" in line


def test_an_adapter_on_codes_is_one_on_their_numbers(formats, zoo):
    base = zoo.base()
    coded = formats.fp8("coded", base)
    plain = zoo.write(
        "plain",
        formats.numbers["coded"],
        json.loads((base / "config.json").read_text()),
        dtype="F32",
    )
    rng = np.random.default_rng(0)
    folder = zoo.root / "adapter"
    folder.mkdir()
    tensors = {}
    for name, values in formats.numbers["coded"].items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, cols = values.shape
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((2, cols)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((rows, 2)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    one = dict(api.materialise(api.fold_recipe(str(coded), str(folder), dtype="float32")))
    two = dict(api.materialise(api.fold_recipe(str(plain), str(folder), dtype="float32")))
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert np.array_equal(array, two[name]), name


def test_weights_that_were_turned_are_no_numbers_to_merge(formats, zoo):
    """Hadamard rotations, which compressed-tensors undoes as the model runs."""
    coded = formats.compressed("coded", zoo.base(), "channel")
    turned = {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"]}]}}
    for transform, refused in (({"config_groups": turned}, True), ({"config_groups": {}}, False)):
        config = json.loads((coded / "config.json").read_text())
        config["quantization_config"]["transform_config"] = transform
        (coded / "config.json").write_text(json.dumps(config))
        if refused:
            assert "is quantised (compressed-tensors" in refusal(coded, dtype="bfloat16")
        else:
            api.plan(linear(coded, dtype="bfloat16"))


def test_scales_of_caches_and_bounds_are_none_of_weights(formats, zoo):
    static = ("kv_scale", "prob_scale", "input_scale_ub", "input_scale_inv", "k_scale")
    coded = formats.fp8("coded", zoo.base(layers=1), more=static)
    found, _ = output(linear(coded, weight=1.0, dtype="bfloat16"), zoo)
    assert found.keys() == formats.numbers["coded"].keys()
