"""What a tensor costs beyond its bytes: a stand-in for DeepSeek-V3, every name with tiny shapes.

    python benchmarks/many_tensors.py --rounds 3

61 layers, 58 of them with 256 experts and a shared one, in fp8 with a scale for each matrix: 91 000
tensors in 163 files. Two such models are planned and merged (linear) in processes of their own;
seconds are of the plan and of the merge behind it, wall and CPU, the least of the rounds, since
others' load only adds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from record import record

LAYERS, DENSE, EXPERTS, FILES = 61, 3, 256, 163
HIDDEN, RANK, INNER, VOCAB = 8, 4, 4, 16
SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "first_k_dense_replace": DENSE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "vocab_size": VOCAB,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
Tensor = tuple[str, str, tuple[int, ...]]

_CHILD = """
import json, resource, sys, time
from fastmerge import api

def now():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime

begin = now()
plan = api.plan(json.loads(sys.argv[1]))
planned = now()
api.merge(plan, sys.argv[2], overwrite=True)
merged = now()
print(json.dumps({"tensors": len(plan.tensors), "stored": len(plan.models[0].tensors),
                  "plan": [b - a for a, b in zip(begin, planned)],
                  "merge": [b - a for a, b in zip(planned, merged)]}))
"""


def tensors() -> Iterator[Tensor]:
    """Names, types and shapes, in the order of the published files."""
    yield "model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        attention = {
            "q_a_proj": (RANK, HIDDEN),
            "q_b_proj": (HIDDEN, RANK),
            "kv_a_proj_with_mqa": (RANK, HIDDEN),
            "kv_b_proj": (HIDDEN, RANK),
            "o_proj": (HIDDEN, HIDDEN),
        }
        for name, shape in attention.items():
            yield from _coded(f"{prefix}self_attn.{name}.weight", shape)
        for name, size in {
            "self_attn.q_a_layernorm": RANK,
            "self_attn.kv_a_layernorm": RANK,
            "input_layernorm": HIDDEN,
            "post_attention_layernorm": HIDDEN,
        }.items():
            yield f"{prefix}{name}.weight", "BF16", (size,)
        if layer < DENSE:
            yield from _mlp(f"{prefix}mlp.")
            continue
        yield f"{prefix}mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
        yield f"{prefix}mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
        yield from _mlp(f"{prefix}mlp.shared_experts.")
        for expert in range(EXPERTS):
            yield from _mlp(f"{prefix}mlp.experts.{expert}.")
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCAB, HIDDEN)


def _mlp(prefix: str) -> Iterator[Tensor]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        shape = (HIDDEN, INNER) if name == "down_proj" else (INNER, HIDDEN)
        yield from _coded(f"{prefix}{name}.weight", shape)


def _coded(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    yield name, "F8_E4M3", shape
    yield f"{name}_scale_inv", "F32", (1, 1)


def write_model(folder: Path, seed: int) -> None:
    """One stand-in: codes at random, scales near 1."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    every = list(tensors())
    weight_map: dict[str, str] = {}
    for number in range(FILES):
        part = every[number * len(every) // FILES : (number + 1) * len(every) // FILES]
        name = f"model-{number + 1:05d}-of-{FILES:06d}.safetensors"
        header, data = {}, bytearray()
        for tensor, dtype, shape in part:
            count = int(np.prod(shape))
            if dtype == "F32":
                bits = rng.uniform(0.5, 2, count).astype(np.float32).tobytes()
            else:
                bits = rng.integers(0, 60, count * SIZES[dtype], np.uint8).tobytes()
            offsets = [len(data), len(data) + len(bits)]
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
            data += bits
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bench(folder: Path, rounds: int) -> list[dict]:
    """Each round's figures, of a process of its own."""
    models = [folder / name for name in "ab"]
    for seed, model in enumerate(models):
        write_model(model, seed)
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    recipe = json.dumps({"merge_method": "linear", "models": entries})
    command = [sys.executable, "-c", _CHILD, recipe, str(folder / "out")]
    return [
        json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        for _ in range(rounds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write results/many_tensors.*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="many-") as name:
        found = bench(Path(name), options.rounds)
    stored = found[0]["stored"]
    print(f"{stored} tensors a model ({found[0]['tensors']} written); least of {len(found)} rounds")
    rows = []
    for what, goal in (("plan", "<= 3 s"), ("merge", "<= 60 us a tensor")):
        wall, cpu = (min(each[what][i] for each in found) for i in range(2))
        each_us, each_cpu_us = (f"{1e6 * seconds / stored:.0f}" for seconds in (wall, cpu))
        rows.append([what, f"{wall:.2f}", each_us, f"{cpu:.2f}", each_cpu_us, goal])
        print(f"{what}: {wall:.2f} s, {each_us} us a tensor (CPU: {cpu:.2f} s, {each_cpu_us} us)")
    if options.record:
        record(
            "many_tensors",
            "What a tensor costs beyond its bytes",
            "| of two models of 91 000 tensors | s | us a tensor | CPU s | the same, us | goal |",
            rows,
            {"rounds": options.rounds, "tensors a model": stored, "written": found[0]["tensors"]},
        )


if __name__ == "__main__":
    main()
