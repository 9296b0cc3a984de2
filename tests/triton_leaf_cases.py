"""Codes and adapted weights on a GPU: the CPU's bits, kernel by kernel and from files to files.

Run by test_triton.py under Triton's interpreter, where the one device is the CPU; on a GPU, run it
there directly.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("yaml")  # recipes are read with it

import fastmerge
from fastmerge import _C, api, live, llama
from fastmerge.compute import devices
from fastmerge.compute import lane as lane_module
from fastmerge.compute.batch import Batch
from fastmerge.compute.cpu import cpu
from fastmerge.engine.products import grams
from fastmerge.errors import FastmergeError, ModelError
from fastmerge.kernels import common, leaves
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.planning.of_models import of_models
from fastmerge.recipe.settings import constant
from fastmerge.search import expressions as search
from fastmerge.search.space import Space
from fastmerge.tree.nodes import Merge

pytestmark = pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
INTERPRETED = common.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The pipeline on this machine's GPUs, or on the CPU through the interpreter."""
    if INTERPRETED:
        monkeypatch.setattr(devices, "cuda_devices", lambda: ["cpu"])
    monkeypatch.setattr(lane_module, "PIECE_BYTES", 2000)  # several pieces, the last one short


def bits(array: np.ndarray) -> np.ndarray:
    """fp32 as integers, every NaN one of them."""
    return np.where(np.isnan(array), 0x7FC00000, array.view(np.uint32))


def bf16(values: np.ndarray) -> np.ndarray:
    words = values.astype(np.float32).view(np.uint32)
    return ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)


def raw(array: np.ndarray, dtype: str = "RAW") -> _C.View:
    return _C.View(array.ctypes.data, array.size, dtype, array)


@pytest.mark.parametrize("coding", ["e4m3", "e5m2"])
@pytest.mark.parametrize(
    ("matrices", "rows", "cols", "block"),
    [(1, 1, 256, (1, 256)), (1, 40, 515, (16, 128)), (3, 9, 20, (4, 8)), (2, 16, 7, (16, 7))],
)
def test_codes_times_scales(coding, matrices, rows, cols, block) -> None:
    count = matrices * rows * cols
    codes = np.resize(np.arange(256, dtype=np.uint8), count)
    each = -(-rows // block[0]) * -(-cols // block[1])
    scales = np.exp2(np.random.default_rng(1).normal(size=matrices * each) * 9).astype(np.float32)
    sizes = {"rows": rows, "cols": cols, "block_rows": block[0], "block_cols": block[1]}
    wanted = cpu(1).array(_C.dequantised(coding, raw(codes), raw(scales, "F32"), **sizes))
    given = [torch.from_numpy(each.copy()).to(DEVICE) for each in (codes, scales)]
    got = leaves.dequantised(coding, *given, **sizes).cpu().numpy()
    assert np.array_equal(bits(got), bits(wanted))


def test_scales_of_one_byte_are_powers_of_two() -> None:
    codes, scales = (
        np.arange(256, dtype=np.uint8),
        np.arange(254, 254 - 16 * 8, -8).astype(np.uint8),
    )
    scales[-1] = 0  # 2**-127, which is subnormal
    sizes = {"rows": 16, "cols": 16, "block_rows": 4, "block_cols": 4}
    wanted = cpu(1).array(_C.dequantised("e4m3", raw(codes), raw(scales), **sizes))
    given = [torch.from_numpy(each.copy()).to(DEVICE) for each in (codes, scales)]
    got = leaves.dequantised("e4m3", *given, **sizes).cpu().numpy()
    assert np.array_equal(bits(got), bits(wanted))


@pytest.mark.parametrize(("matrices", "rows", "cols"), [(1, 32, 5), (3, 64, 16), (1, 96, 600)])
def test_mxfp4(matrices, rows, cols) -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 256, matrices * cols * rows // 2, np.uint8)
    scales = rng.integers(0, 255, matrices * cols * rows // 32, np.uint8)
    scales[:2] = 0, 254  # the smallest power is subnormal, the largest overflows with a 4
    sizes = {"rows": rows, "cols": cols, "block_rows": 32, "block_cols": 1}
    wanted = cpu(1).array(_C.dequantised("mxfp4", raw(codes), raw(scales), **sizes))
    given = [torch.from_numpy(each.copy()).to(DEVICE) for each in (codes, scales)]
    got = leaves.dequantised("mxfp4", *given, **sizes).cpu().numpy()
    assert np.array_equal(bits(got), bits(wanted))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("rows", "cols", "rank"), [(1, 1, 1), (5, 700, 3), (17, 513, 16)])
def test_a_product_of_thin_matrices_is_added(dtype, rows, cols, rank) -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(rows, cols)).astype(np.float32)
    stored = {"BF16": bf16(values), "F16": values.astype(np.float16), "F32": values}[dtype]
    left = rng.normal(size=(rows, rank)).astype(np.float32)
    right = rng.normal(size=(rank, cols)).astype(np.float32)
    views = raw(stored, dtype), raw(left, "F32"), raw(right, "F32")
    wanted = cpu(1).array(_C.low_rank(*views, rank, 0.7))
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    base = torch.from_numpy(stored.view(np.uint8).reshape(-1).copy()).to(DEVICE).view(kind)
    factors = [torch.from_numpy(each).to(DEVICE) for each in (left, right)]
    got = leaves.low_rank(base, *factors, 0.7).cpu().numpy()
    assert np.array_equal(bits(got), bits(wanted))


def test_products_of_a_stack_are_each_matrix_s() -> None:
    rng = np.random.default_rng(4)
    count, rows, cols, rank = 3, 5, 70, 3
    base = rng.normal(size=(count, rows, cols)).astype(np.float32)
    left = rng.normal(size=(count, rows, rank)).astype(np.float32)
    right = rng.normal(size=(count, rank, cols)).astype(np.float32)
    views = [raw(each, "F32") for each in (base, left, right)]
    wanted = cpu(1).array(_C.low_rank(*views, rank, 0.7, matrices=count))
    given = [torch.from_numpy(each).to(DEVICE) for each in (base, left, right)]
    got = leaves.low_rank(given[0].reshape(-1), *given[1:], 0.7).cpu().numpy()
    assert np.array_equal(bits(got), bits(wanted))


# --- whole merges ---


def coded(zoo, name: str, of: Path, seed: int = 5) -> Path:
    """A llama whose projections are codes at random, a scale for each 16 x 16 of them."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for tensor, values in zoo.read(of).items():
        if "proj" not in tensor:
            tensors[tensor] = ("BF16", bf16(values))
            continue
        codes = rng.integers(0, 0x7F, values.shape, np.uint8)
        codes |= rng.integers(0, 2, values.shape, np.uint8) << 7
        scales = rng.uniform(1e-4, 2e-4, [-(-size // 16) for size in values.shape])
        tensors[tensor] = ("F8_E4M3", codes)
        tensors[f"{tensor}_scale_inv"] = ("F32", scales.astype(np.float32))
    section = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
    }  # fmt: skip
    config = json.loads((of / "config.json").read_text())
    return zoo.raw(name, tensors, {**config, "quantization_config": section})


def adapter(zoo, name: str, seed: int, **config) -> Path:
    """On all projections of `zoo.base(layers=1)`, with normal factors."""
    rng = np.random.default_rng([seed, 7])
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for tensor, values in zoo.read(zoo.root / "base").items():
        if "proj" not in tensor:
            continue
        head = "base_model.model." + tensor.removesuffix(".weight")
        rows, cols = values.shape
        shapes = {"lora_A.weight": (3, cols), "lora_B.weight": (rows, 3)}
        for part, shape in shapes.items():
            factor = 0.1 * rng.normal(size=shape)
            tensors[f"{head}.{part}"] = ("F32", factor.astype(np.float32))
        if config.get("use_dora"):
            lengths = np.linalg.norm(values, axis=1) * 1.1
            tensors[f"{head}.lora_magnitude_vector"] = ("F32", lengths.astype(np.float32))
    folder = zoo.raw(name, tensors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 5, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": sorted({name.split(".")[-3] for name in tensors if "lora_A" in name}),
        "base_model_name_or_path": "someone/base", **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def same_bytes(recipe: dict, folder: Path, **options) -> api.MergeReport:
    api.merge(recipe, folder / "cpu", device="cpu", seed=3)
    report = api.merge(recipe, folder / "gpu", device="cuda", seed=3, **options)
    assert report.backend == "triton"
    made, wanted = ((folder / n / "model.safetensors").read_bytes() for n in ("gpu", "cpu"))
    assert made == wanted
    return report


def merged(method: str, base: Path, *models: object) -> dict:
    own = {"weight": 0.6} | ({"density": 0.5} if method != "linear" else {})
    listed = [{"model": str(m), "parameters": own} for m in models]
    head = {"merge_method": method, "models": listed, "dtype": "bfloat16"}
    return head | ({"base_model": str(base)} if method != "linear" else {})


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_a_model_of_codes(method, zoo, tmp_path) -> None:
    base = zoo.base(layers=1)
    codes = coded(zoo, "coded", base)
    report = same_bytes(merged(method, base, codes, zoo.tune(base, "b", seed=2)), tmp_path)
    assert not any("CPU" in note for note in report.notes)


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_adapters_over_one_base(method, config, zoo, tmp_path) -> None:
    base = zoo.base(layers=1)
    models = [f"{base}+{adapter(zoo, name, seed, **config)}" for seed, name in enumerate("ab")]
    report = same_bytes(merged(method, base, *models), tmp_path)
    assert not any("CPU" in note for note in report.notes)


@pytest.mark.parametrize("form", ["stack", "each"])
def test_an_adapter_on_stacked_experts(form, zoo, tmp_path) -> None:
    rng = np.random.default_rng(6)
    count, rows, cols, rank = 3, 10, 6, 2
    head = "model.layers.0.mlp.experts"
    made = rng.normal(size=(count, rows, cols))
    named = {f"{head}.gate_up_proj": made}
    if form == "each":
        halves = {"gate_proj": made[:, :5], "up_proj": made[:, 5:]}
        named = {
            f"{head}.{i}.{part}.weight": half[i] for part, half in halves.items() for i in range(3)
        }
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1}
    base = zoo.raw("base", {n: ("BF16", bf16(own)) for n, own in named.items()}, config)
    models = []
    for name in "ab":
        shapes = {"A": (count * rank, cols), "B": (rows, count * rank)}
        factors = {
            f"base_model.model.{head}.lora_{part}.weight": (
                "F32", rng.normal(size=shape).astype(np.float32)
            )
            for part, shape in shapes.items()
        }  # fmt: skip
        folder = zoo.raw(name, factors)
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        said = {
            "peft_type": "LORA", "r": rank, "lora_alpha": 5,
            "target_parameters": ["experts.gate_up_proj"],
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(said))
        models.append(f"{base}+{folder}")
    report = same_bytes(merged("ties", base, *models), tmp_path)
    assert not any("CPU" in note for note in report.notes)


def test_an_adapter_over_codes(zoo, tmp_path) -> None:
    base = zoo.base(layers=1)
    codes = coded(zoo, "coded", base)
    same_bytes(merged("linear", base, f"{codes}+{adapter(zoo, 'a', 1)}", base), tmp_path)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_pieces_are_read_by_the_host(method, zoo, tmp_path) -> None:
    """What does not fit the device goes through it in pieces, which have their numbers already."""
    base = zoo.base(layers=1)
    codes = coded(zoo, "coded", base)
    recipe = merged(method, base, codes, f"{base}+{adapter(zoo, 'a', 1)}")
    report = same_bytes(recipe, tmp_path, gpu_memory=1 << 20)
    assert any("went through it in pieces" in note for note in report.notes)


def damage(codes: Path) -> None:
    """A scale of -1, the first of one tensor."""
    tensors = (codes / "model.safetensors").read_bytes()
    size = int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8 : 8 + size])
    name = next(n for n in header if n.endswith("_scale_inv"))
    at = 8 + size + header[name]["data_offsets"][0]
    spoilt = tensors[:at] + np.float32(-1).tobytes() + tensors[at + 4 :]
    (codes / "model.safetensors").write_bytes(spoilt)


def test_a_damaged_scale_is_named(zoo, tmp_path) -> None:
    base = zoo.base(layers=1)
    codes = coded(zoo, "coded", base)
    damage(codes)
    with pytest.raises(ModelError, match=r"_scale_inv' holds -1\.0 at 0"):
        api.merge(merged("linear", base, codes, base), tmp_path / "out", device="cuda")


def test_what_is_written_as_codes_stays_on_the_host_and_is_noted(zoo, tmp_path) -> None:
    base = zoo.base(layers=1)
    one, other = coded(zoo, "one", base), coded(zoo, "other", base, seed=6)
    recipe = merged("linear", base, one, other) | {"out_dtype": "as_base", "base_model": str(one)}
    del recipe["dtype"]
    report = same_bytes(recipe, tmp_path)
    assert any("are stored as codes: the CPU computes them" in note for note in report.notes)


# --- into live models ---


@pytest.fixture
def batches(monkeypatch):
    """The batches that merges into live models prepare, as on a GPU."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(live, "_uses_gpu", lambda targets: True)
    made = []
    monkeypatch.setattr(live, "Batch", lambda *given: made.append(given) or Batch(*given))
    return made


def merged_into(model, recipe, **options) -> None:
    """Merges into the live model, whose parameters are then what the CPU makes of the recipe."""
    plan = api.plan(recipe, seed=3)
    live.merge_into(model, plan, **options)
    wanted = dict(fastmerge.materialise(plan))
    for name, tensor in model.state_dict().items():
        assert (tensor.cpu().view(torch.uint16).numpy() == wanted[name]).all(), name


@pytest.mark.parametrize(
    "method, keep, memory",
    [
        ("linear", "device", 1 << 30),
        ("ties", "device", 1 << 13),
        ("model_stock", "pinned", 1 << 14),
        ("nuslerp", "device", 1 << 13),
    ],
)
def test_adapters_and_codes_into_a_live_model(method, keep, memory, zoo, batches) -> None:
    """Groups that lie within the memory given share it for the numbers that they are made."""
    base = zoo.base(layers=1, hidden=16, vocab=8)
    codes = coded(zoo, "coded", base)
    models = [f"{base}+{zoo.adapter('dora', base, use_dora=True)}"]
    models += [f"{codes}+{zoo.adapter('lora', base, seed=2)}"]
    own = {} if method == "model_stock" else {"weight": 0.6}
    own |= {"density": 0.5} if method == "ties" else {}
    recipe = {
        "merge_method": method, "dtype": "bfloat16",
        "models": [{"model": m, "parameters": own} for m in models],
        "parameters": {"nuslerp_flatten": False} if method == "nuslerp" else {},
    }  # fmt: skip
    recipe |= {"base_model": str(base)} if method != "linear" else {}
    model = llama.load(base).to(DEVICE)
    merged_into(model, recipe, keep=keep, gpu_memory=memory)
    assert len(batches) == 1 if memory == 1 << 30 else len(batches) > 2


def test_a_walk_over_adapters_prepares_once_and_reads_no_file_again(
    zoo, batches, monkeypatch
) -> None:
    """Ten states of three adapters, whose base is no model of the walk: copies, means, SLERPs."""
    base = zoo.base(layers=1, hidden=16, vocab=8)
    kinds = {"a": {}, "b": {"use_rslora": True}, "c": {"use_dora": True}}
    adapters = [zoo.adapter(name, base, seed=ord(name), **more) for name, more in kinds.items()]
    template = of_models([f"{base}+{adapter}" for adapter in adapters])
    wanted = {i.name: i.root.operands for i in template.tensors if isinstance(i.root, Merge)}
    found = grams(template.models, wanted)
    space = Space(template, np.stack([found[n] for n in wanted]), [0.0] * len(wanted))
    read = []
    view = Checkpoint.view
    monkeypatch.setattr(Checkpoint, "view", lambda *given: read.append(given[1]) or view(*given))
    state = search.Model(0)
    model = llama.load(base).to(DEVICE)
    for step in range(10):
        if step % 3 == 1:
            state = search.average((state, search.Model(1 + step % 2)), (0.75, 0.25))
        elif step % 3 == 2:
            t = {"t": constant(step / 20)}
            state = search.blend("slerp", (state, search.Model(1 + step % 2)), parameters=t)
        plan = space.plan(state if step != 6 else search.Model(2))
        read.clear()
        live.merge_into(model, plan, keep="device")
        assert bool(read) == (step == 0)
        expected = dict(fastmerge.materialise(plan))
        for name, tensor in model.state_dict().items():
            assert (tensor.cpu().view(torch.uint16).numpy() == expected[name]).all()
    assert len(batches) == 1


def test_the_same_recipe_with_other_weights_needs_nothing_new(zoo, batches) -> None:
    """Planned again: adapted weights are known again by what they are made of."""
    base = zoo.base(layers=1, hidden=16, vocab=8)
    a, b = zoo.adapter("a", base), zoo.adapter("b", base, seed=2)
    model = llama.load(base).to(DEVICE)
    for weight in (0.3, 1.2, -0.5):
        recipe = {
            "merge_method": "task_arithmetic", "base_model": str(base), "dtype": "bfloat16",
            "models": [{"model": f"{base}+{x}", "parameters": {"weight": w}}
                       for x, w in ((a, weight), (b, 0.5))],
        }  # fmt: skip
        merged_into(model, recipe)
    assert len(batches) == 1


def tokens_of(zoo, base: Path) -> Path:
    """An adapter that replaces two rows of the embeddings."""
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tokens = zoo.raw("tokens", {name: ("F32", np.full((2, 16), 0.5, np.float32))})
    (tokens / "model.safetensors").rename(tokens / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 3, "bias": "none", "target_modules": [],
        "trainable_token_indices": {"embed_tokens": [3, 5]}, "base_model_name_or_path": str(base),
    }  # fmt: skip
    (tokens / "adapter_config.json").write_text(json.dumps(config))
    return tokens


def test_rows_from_several_places_are_the_cpu_s_and_the_rest_is_the_gpu_s(zoo, batches) -> None:
    base = zoo.base(layers=1, hidden=16, vocab=8)
    a, tokens = zoo.adapter("a", base), tokens_of(zoo, base)
    model = llama.load(base).to(DEVICE)
    merged_into(model, merged("linear", base, f"{base}+{a}", f"{base}+{tokens}"))
    names = [job.name for jobs, *_ in batches for job in jobs]
    assert len(names) == 11 and "model.embed_tokens.weight" not in names


@pytest.mark.usefixtures("batches")
def test_what_a_gpu_does_not_take_changes_no_row(zoo) -> None:
    base = zoo.base(layers=1, hidden=16, vocab=8)
    recipe = merged("ties", base, f"{base}+{tokens_of(zoo, base)}") | {
        "parameters": {"trim": "model"}
    }
    model = llama.load(base).to(DEVICE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FastmergeError, match="trim: model is not for models on a GPU"):
        live.merge_into(model, api.plan(recipe))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.usefixtures("batches")
def test_a_damaged_scale_is_named_before_the_model_changes(zoo) -> None:
    base = zoo.base(layers=1, hidden=16, vocab=8)
    codes = coded(zoo, "coded", base)
    damage(codes)
    model = llama.load(base).to(DEVICE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"_scale_inv' holds -1\.0 at 0"):
        live.merge_into(model, api.plan(merged("linear", base, codes, base)))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
