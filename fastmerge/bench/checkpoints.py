"""Llama-shaped checkpoint sets to merge: one base and fine-tunes whose bf16 deltas tie as real ones
do; and adapters.

The base is N(0, 0.02^2), each fine-tune is bf16(base + N(0, s^2)) with s between 2e-4 and 2e-3 by
tensor: most deltas are then a few bf16 steps, so magnitudes repeat and trims have ties, as in
published fine-tunes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmerge.errors import UnsupportedError
from fastmerge.models.checkpoint import Checkpoint

BASE_STD = 0.02
DELTA_STD = (2e-4, 2e-3)
SHARD_BYTES = 5_000_000_000  # Hugging Face's default
_CHUNK = 1 << 20  # elements: 4 MiB of fp32 stays in cache between the rounding steps
_POOL = 1 << 24  # normals drawn once; tensors take windows of it at random offsets


@dataclass(frozen=True)
class Shape:
    """What decides the size of a llama."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int = 32000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Tensor names and shapes in the order safetensors' own writer uses (by name)."""
        kv = self.hidden // self.heads * self.kv_heads
        block = {
            "input_layernorm.weight": (self.hidden,),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
        }
        names: dict[str, tuple[int, ...]] = {
            "lm_head.weight": (self.vocab, self.hidden),
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for layer in range(self.layers):
            names |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        return dict(sorted(names.items()))

    def config(self) -> dict[str, object]:
        """The config.json of Hugging Face's LlamaForCausalLM."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.tensors().values())


SHAPES = {
    "tiny": Shape(64, 1, 176, 4, 4, vocab=512),
    "0.2b": Shape(1024, 12, 2816, 16, 4),
    "0.5b": Shape(2048, 8, 5632, 32, 4),  # eight of them fit into a small machine's page cache
    "1.1b": Shape(2048, 22, 5632, 32, 4),  # TinyLlama-1.1B
    "3b": Shape(3200, 26, 8640, 32, 32),  # OpenLLaMA-3B
    "7b": Shape(4096, 32, 11008, 32, 32),  # Llama-2-7B
}


def bytes_of_size(size: str) -> int:
    """Of one model's weights."""
    return 2 * SHAPES[size].parameters


def write_set(folder: Path, size: str, models: int, *, sparse: bool = False) -> list[Path]:
    """Writes ``models`` checkpoint folders (the first is the base) below ``folder`` and returns
    them.

    With ``sparse`` the files are holes, all zeros: enough to measure memory where the disk is too
    small for the real bytes. A set that is already complete is kept.
    """
    shape = SHAPES[size]
    names = ["base", *(f"tune{i}" for i in range(1, models))]
    paths = [folder / f"{name}{'-sparse' if sparse else ''}" for name in names]
    if not all((path / "config.json").exists() for path in paths):
        layouts = [_prepare(path, shape) for path in paths]
        if not sparse:
            _fill(layouts)
        for path in paths:  # last: its presence says that the weights are complete
            (path / "config.json").write_text(json.dumps(shape.config(), indent=2))
    return paths


@dataclass(frozen=True)
class _Slot:
    file: Path
    offset: int
    count: int
    name: str


def _prepare(folder: Path, shape: Shape) -> list[_Slot]:
    """Headers, index and files of the final size; returns where each tensor goes."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, dims in shape.tensors().items():
        nbytes = 2 * int(np.prod(dims))
        if filled + nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = dims
        filled += nbytes
    slots: list[_Slot] = []
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        many = len(shards) > 1
        file = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        )
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dims in tensors.items():
            begin, end = end, end + 2 * int(np.prod(dims))
            header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with open(folder / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(start + end)
        position = start
        for name, dims in tensors.items():
            count = int(np.prod(dims))
            slots.append(_Slot(folder / file, position, count, name))
            weight_map[name] = file
            position += 2 * count
    if len(shards) > 1:
        index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return slots


def _fill(layouts: list[list[_Slot]]) -> None:
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(_POOL, dtype=np.float32)
    pool = np.concatenate([pool, pool[:_CHUNK]])  # so that a chunk never has to wrap

    def fill(index: int) -> None:
        slots = [layout[index] for layout in layouts]
        draw = np.random.default_rng([1, index])
        mean = 1.0 if "norm" in slots[0].name else 0.0
        scales = [BASE_STD, *(np.exp(draw.uniform(*np.log(DELTA_STD))) for _ in slots[1:])]
        windows = [_windows(pool, int(draw.integers(_POOL)), slot.count) for slot in slots]
        files = [os.open(slot.file, os.O_WRONLY) for slot in slots]
        done = 0
        for normals in zip(*windows, strict=True):
            base = _bf16(np.float32(mean) + np.float32(scales[0]) * normals[0])
            exact = (base.astype(np.uint32) << 16).view(np.float32)
            parts = [base]
            for scale, normal in zip(scales[1:], normals[1:], strict=True):
                parts.append(_bf16(exact + np.float32(scale) * normal))
            for file, slot, part in zip(files, slots, parts, strict=True):
                os.pwrite(file, part.data, slot.offset + 2 * done)
            done += base.size
        for file in files:
            os.close(file)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(len(layouts[0]))))


def _windows(pool: NDArray[np.float32], start: int, count: int) -> Iterator[NDArray[np.float32]]:
    """Chunks that add up to ``count`` normals, from ``start`` on; ``pool`` repeats its head at its
    end."""
    for begin in range(0, count, _CHUNK):
        offset = (start + begin) % _POOL
        yield pool[offset : offset + min(_CHUNK, count - begin)]


def _bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of finite ``x`` rounded to nearest even."""
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, base: Path, rank: int) -> list[str]:
    """A LoRA on every linear layer of a llama or its like, float32 as PEFT saves it; the names of
    the weights that it is on. UnsupportedError where the base has no such layers.
    """
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    model = Checkpoint.open(base)
    names = [
        name
        for name, info in model.tensors.items()
        if name.endswith(".weight") and name.split(".")[-2] in TARGETS and len(info.shape) == 2
    ]
    if not names:
        raise UnsupportedError(
            f"{base}: has no layers called {', '.join(TARGETS[:3])}, ... for an adapter; give one "
            "of its own as the second model"
        )
    tensors = {}
    for name in names:
        rows, cols = model.info(name).shape
        prefix = f"base_model.model.{name.removesuffix('.weight')}."
        tensors[f"{prefix}lora_A.weight"] = rng.standard_normal((rank, cols), np.float32) * 0.02
        tensors[f"{prefix}lora_B.weight"] = rng.standard_normal((rows, rank), np.float32) * 0.002
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": rank, "lora_alpha": 2 * rank, "target_modules": list(TARGETS), "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return names
