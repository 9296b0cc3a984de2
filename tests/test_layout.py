"""The planned layout: files as safetensors, torch and transformers expect them."""

from __future__ import annotations

import json
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastmerge import _C
from fastmerge.dtypes import BY_CODE, DType
from fastmerge.errors import FastmergeError
from fastmerge.output.layout import Layout
from fastmerge.output.writer import ModelWriter

F32, F16, BF16, U8 = (BY_CODE[code] for code in ("F32", "F16", "BF16", "U8"))

TENSORS: list[tuple[str, DType, tuple[int, ...]]] = [
    ("half", F16, (3, 5)),
    ("bytes", U8, (7,)),
    ("large", F32, (300, 100)),
    ("none", F16, (0, 4)),
    ("scalar", F16, ()),
    ("line\nand é", F32, (50, 10)),
    *((f"layers.{number}.weight", BF16, (40, 64)) for number in range(60)),
]


def put_bytes(writer: ModelWriter, name: str, data: bytes) -> None:
    """Fills a tensor from memory, as the kernels do through its sink."""
    held = np.frombuffer(data, np.uint8)
    view = _C.View(held.ctypes.data, held.size, "RAW", held)
    _C.copy(_C.Pool(1), view, writer.parts(name)(0, held.size))


def content(name: str, nbytes: int) -> bytes:
    return random.Random(name).randbytes(nbytes)


def layout(max_shard_bytes: int = 150_000) -> Layout:
    return Layout.plan(TENSORS, max_shard_bytes=max_shard_bytes, metadata={"seed": "1"})


def write_model(target: Path, plan: Layout) -> None:
    with ModelWriter(target, plan, key="k") as writer:
        for name in writer.pending():
            put_bytes(writer, name, content(name, plan.slots[name].nbytes))
            writer.computed(name, {})
        writer.finish({"config.json": b"{}"})


def test_layout_opens_with_the_library(tmp_path: Path) -> None:
    """NumPy has no bfloat16, so without those; torch reads them below."""
    tensors = [(name, dtype, shape) for name, dtype, shape in TENSORS if dtype is not BF16]
    write_model(tmp_path / "out", Layout.plan(tensors, max_shard_bytes=120_000))
    found: dict[str, np.ndarray] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(shard)
    assert set(found) == {name for name, _, _ in tensors}
    for name, dtype, shape in tensors:
        assert (found[name].dtype.name, found[name].shape) == (dtype.name, shape)
        assert found[name].tobytes() == content(name, found[name].nbytes)


def test_torch_reads_every_tensor(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load

    write_model(tmp_path / "out", layout())
    found = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        found |= load(shard)
    assert set(found) == {name for name, _, _ in TENSORS}
    for name, dtype, shape in TENSORS:
        assert found[name].dtype == getattr(torch, dtype.name)
        assert tuple(found[name].shape) == shape
        expected = content(name, found[name].numel() * dtype.bits // 8)
        assert found[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == expected


def test_layout_is_as_promised() -> None:
    plan = layout()
    assert list(plan.slots) != [name for name, _, _ in TENSORS]  # wider types first in a shard
    total = len(plan.shards)
    for number, shard in enumerate(plan.shards):
        assert shard.name == f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        slots = [slot for slot in plan.slots.values() if slot.shard == number]
        assert slots[0].begin == len(shard.header)
        assert slots[0].begin % 4096 == 0
        assert slots[-1].begin + slots[-1].nbytes == shard.size
        assert sum(slot.nbytes for slot in slots) <= 150_000
        assert [slot.dtype.bits for slot in slots] == sorted(
            (slot.dtype.bits for slot in slots), reverse=True
        )
        for before, slot in pairwise(slots):
            assert slot.begin == before.begin + before.nbytes
        for slot in slots:
            assert slot.begin % (slot.dtype.bits // 8) == 0
    index = json.loads(plan.index or b"")
    assert index["metadata"]["total_size"] == plan.total_bytes
    assert set(index["weight_map"]) == {name for name, _, _ in TENSORS}
    assert plan.digest == layout().digest
    assert plan.digest != layout(200_000).digest


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    plan = layout(10**9)
    assert [shard.name for shard in plan.shards] == ["model.safetensors"]
    write_model(tmp_path / "out", plan)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_one_tensor_larger_than_a_shard() -> None:
    plan = Layout.plan([("a", F32, (1,)), ("b", F32, (100,)), ("c", F32, (1,))], max_shard_bytes=8)
    assert [plan.slots[name].shard for name in "abc"] == [0, 1, 2]


def test_duplicate_name() -> None:
    with pytest.raises(FastmergeError, match="tensor 'a' is there twice"):
        Layout.plan([("a", F32, (1,)), ("a", F32, (1,))])


def test_large_layout_is_instant() -> None:
    tensors = [(f"model.layers.{i}.mlp.experts.weight", BF16, (7, 9)) for i in range(36_000)]
    started = time.process_time()
    assert len(Layout.plan(tensors, max_shard_bytes=100_000).slots) == 36_000
    assert time.process_time() - started < 10  # about 0.3 s; a quadratic step would take minutes


def test_transformers_loads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    plan = Layout.plan(
        [(name, F32, tuple(value.shape)) for name, value in state.items()], max_shard_bytes=10_000
    )
    with ModelWriter(tmp_path / "out", plan, key="k") as writer:
        for name in writer.pending():
            put_bytes(writer, name, state[name].numpy().tobytes())
            writer.computed(name, {})
        writer.finish({"config.json": config.to_json_string().encode()})
    assert len(plan.shards) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(12).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
