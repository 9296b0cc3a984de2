"""Small llama checkpoints for the tests, written without torch, and tensors for the kernels."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import safetensors

from fastmerge import _C
from fastmerge.compute.reference import round_to

# Before torch or transformers are imported: no test may use the network, and xdist already fills
# the cores (an OpenMP pool per worker makes small tests several times slower).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

HIDDEN, FF, HEADS, KV_HEADS, VOCAB = 32, 48, 4, 2, 40


def llama_config(layers: int = 2, *, tied: bool = False, hidden: int = HIDDEN, vocab: int = VOCAB):
    """config.json of a small llama that transformers can load."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * FF // HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def llama_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama's tensors."""
    h, ff, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {
            p + "self_attn.q_proj.weight": (h, h),
            p + "self_attn.k_proj.weight": (kv, h),
            p + "self_attn.v_proj.weight": (kv, h),
            p + "self_attn.o_proj.weight": (h, h),
            p + "mlp.gate_proj.weight": (ff, h),
            p + "mlp.up_proj.weight": (ff, h),
            p + "mlp.down_proj.weight": (h, ff),
            p + "input_layernorm.weight": (h,),
            p + "post_attention_layernorm.weight": (h,),
        }
    shapes["model.norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    return shapes


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as the stored bits of BF16 (uint16, to nearest even), F16 or F32."""
    if dtype == "F32":
        return values.astype(np.float32)
    if dtype == "F16":
        return values.astype(np.float16)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(raw: bytes, dtype: str) -> np.ndarray:
    """Stored bits as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    kinds = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return np.frombuffer(raw, kinds[dtype]).astype(np.float32)


def write_checkpoint(
    folder: Path,
    tensors: dict[str, np.ndarray],
    config: dict | None = None,
    *,
    dtype="BF16",
    shards=1,
) -> Path:
    """A Hugging Face folder: one file, or ``shards`` of them with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    per = math.ceil(len(names) / shards)
    weight_map = {}
    for number in range(shards):
        part = names[number * per : (number + 1) * per]
        file = "model.safetensors"
        if shards > 1:
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        header, data = {"__metadata__": {"format": "pt"}}, bytearray()
        for name in part:
            begin = len(data)
            data += encode(tensors[name], dtype).tobytes()
            shape = list(tensors[name].shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder as float32, through the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        # Sorted: the library's order differs from process to process, and tunes draw noise in it.
        for name, entry in sorted(safetensors.deserialize(file.read_bytes()), key=itemgetter(0)):
            found[name] = decode(bytes(entry["data"]), entry["dtype"]).reshape(entry["shape"])
    return found


class Zoo:
    """Makes related small llamas: a base, and fine-tunes that differ from it a little."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def base(self, name="base", *, layers=2, seed=0, dtype="BF16", shards=1, scale=0.05, **config):
        cfg = llama_config(layers, **config)
        rng = np.random.default_rng([seed, 1])
        tensors = {
            n: (1.0 + 0.05 * rng.normal(size=s) if len(s) == 1 else scale * rng.normal(size=s))
            for n, s in llama_shapes(cfg).items()
        }
        return self.write(name, tensors, cfg, dtype=dtype, shards=shards)

    def tune(self, of: Path, name: str, *, seed=1, dtype="BF16", shards=1, size=0.01):
        """A fine-tune: every weight of ``of`` moved by N(0, size^2), stored in ``dtype``."""
        rng = np.random.default_rng([seed, 2])
        tensors = {n: x + size * rng.normal(size=x.shape) for n, x in read_checkpoint(of).items()}
        config = json.loads((of / "config.json").read_text())
        return self.write(name, tensors, config, dtype=dtype, shards=shards)

    def write(self, name, tensors, config=None, *, dtype="BF16", shards=1):
        return write_checkpoint(self.root / name, tensors, config, dtype=dtype, shards=shards)

    def raw(self, name, tensors, config=None):
        """A folder of tensors of any type: {name: (safetensors' dtype, array of stored bits)}."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        header, data = {}, b""
        for tensor, (dtype, array) in tensors.items():
            offsets = [len(data), len(data) + array.nbytes]
            header[tensor] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
            data += array.tobytes()
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = folder / "model.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return folder

    def adapter(self, name: str, of: Path, *, seed=1, rank=3, **config) -> Path:
        """A LoRA of normal factors, fp32, on every projection of ``of``; ``config`` besides."""
        rng = np.random.default_rng([seed, 3])
        tensors: dict[str, tuple[str, np.ndarray]] = {}
        modules = []
        for weight, values in read_checkpoint(of).items():
            if "proj" not in weight:
                continue
            modules.append(weight.removesuffix(".weight"))
            for part, shape in (("A", (rank, values.shape[1])), ("B", (values.shape[0], rank))):
                factor = (0.1 * rng.normal(size=shape)).astype(np.float32)
                tensors[f"base_model.model.{modules[-1]}.lora_{part}.weight"] = ("F32", factor)
            if config.get("use_dora"):
                lengths = (1.1 * np.linalg.norm(values, axis=1)).astype(np.float32)
                tensors[f"base_model.model.{modules[-1]}.lora_magnitude_vector"] = ("F32", lengths)
        folder = self.raw(name, tensors)
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        said = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
            "bias": "none", "target_modules": sorted({m.rpartition(".")[2] for m in modules}),
            "base_model_name_or_path": str(of), **config,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(said))
        return folder

    read = staticmethod(read_checkpoint)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreted kernels first: one of them takes 10 minutes of a slow core, and begun last,
    as the alphabet has it, would leave the other core idle for as long.
    """
    items.sort(key=lambda item: item.path.name != "test_triton.py")


@pytest.fixture(autouse=True)
def _here() -> Iterator[None]:
    """The working folder is every test's own: Ray's workers import from where they are started."""
    here = Path.cwd()
    yield
    os.chdir(here)


@pytest.fixture(autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test imports from its folder goes with it: the next one's `measure` would be taken
    for the same, in whatever order two processes happen to run them.
    """
    before, path = {*sys.modules}, [*sys.path]
    yield
    sys.path[:] = path
    home = f"{tmp_path_factory.getbasetemp()}{os.sep}"
    for name in {*sys.modules} - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(home):
            del sys.modules[name]


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """Small related llamas under the test's own folder."""
    return Zoo(tmp_path)


@pytest.fixture
def family(zoo, monkeypatch):
    """Four llamas of eight layers, which tests/recipes/ name, in the working directory."""
    base = zoo.base("blur", layers=8)
    for seed, name in enumerate(["dolphin", "chat", "math"]):
        zoo.tune(base, name, seed=seed)
    monkeypatch.chdir(zoo.root)
    return zoo


@pytest.fixture(scope="session")
def shared_zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo for models that several tests read; names must differ between files."""
    return Zoo(tmp_path_factory.mktemp("zoo"))


class Memory:
    """Tensors for the kernels at any byte offset, and outputs that start as 0xFF bytes."""

    STORAGE: ClassVar = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}

    def put(self, values: np.ndarray, dtype: str, *, offset: int = 0) -> _C.View:
        """float32 values stored as ``dtype``, ``offset`` bytes past an aligned address."""
        view = self.blank(values.size, dtype, offset=offset)
        view.owner[:] = np.frombuffer(round_to(values.ravel(), dtype).tobytes(), np.uint8)
        return view

    def blank(self, count: int, dtype: str, *, offset: int = 0) -> _C.View:
        item = np.dtype(self.STORAGE[dtype]).itemsize
        room = np.full(count * item + 128, 0xFF, np.uint8)
        begin = -room.ctypes.data % 64 + offset
        data = room[begin : begin + count * item]
        view = OwnedView(room.ctypes.data + begin, count, dtype, data)
        view.owner = data
        return view

    def read(self, view: _C.View) -> np.ndarray:
        """What a view holds, in its storage type."""
        return np.frombuffer(view.owner.tobytes(), self.STORAGE[view.dtype])


class OwnedView(_C.View):
    """A view that remembers its bytes."""

    owner: np.ndarray


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture(scope="session")
def memory_class() -> type[Memory]:
    """For property tests, which may not use a fixture of one test's lifetime."""
    return Memory


@pytest.fixture
def bench(capsys, tmp_path: Path, monkeypatch):
    """Runs `fastmerge bench` in a folder of its own, "here": (exit code, stdout, stderr)."""
    from fastmerge.cli import main

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["bench", *map(str, words)])
        return (ended.value.code or 0, *capsys.readouterr())

    return run
