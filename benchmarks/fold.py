"""Folds a LoRA into a llama-shaped base with fastmerge, PEFT and the machine's floor, side by side.

    python benchmarks/fold.py --size 1.1b --rank 16 --repeat 5

Each repetition runs the floor (floor.py: reads base and adapter once, writes the output's bytes),
`fastmerge fold` as a whole process, and ``merge_and_unload`` and ``save_pretrained`` of PEFT,
without its imports and without loading, one after another on warm inputs, so that a noisy neighbour
hits all three. The adapter is on all linear layers. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import SHAPES, Shape, write_set
from merge_model import bytes_of, commit, run_floor, settle
from process import machine, measure
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEER = """
import json, sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter)
began = time.perf_counter()
model.merge_and_unload().save_pretrained(out)
print(json.dumps(time.perf_counter() - began))
"""


def write_adapter(folder: Path, shape: Shape, rank: int, base: Path) -> None:
    """A LoRA on every linear layer, float32 as PEFT saves it."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (rows, cols) in _matrices(shape):
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


def _matrices(shape: Shape) -> list[tuple[str, tuple[int, int]]]:
    return [
        (name, (size[0], size[1]))
        for name, size in shape.tensors().items()
        if name.split(".")[-2] in TARGETS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=list(SHAPES), default="0.2b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--skip-peft", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary one here")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="fold-", dir=HERE))
    try:
        print(json.dumps(run(root, options), indent=1))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians, and the ratios within a repetition."""
    (base,) = write_set(root / options.size, options.size, 1)
    adapter, out, floor_out = root / "adapter", root / "out", root / "floor.bin"
    write_adapter(adapter, SHAPES[options.size], options.rank, base)
    command = Path(sys.executable).with_name("fastmerge")
    seconds: dict[str, list[float]] = {"floor": [], "fastmerge": [], "peft": []}
    anonymous = 0
    for repetition in range(options.repeat):
        settle([base, adapter], [out, floor_out])
        seconds["floor"].append(run_floor([base, adapter], floor_out).seconds)
        settle([base, adapter], [out, floor_out])
        usage = measure([command, "fold", base, adapter, out, "--fresh", "--quiet"])
        seconds["fastmerge"].append(usage.seconds)
        anonymous = max(anonymous, usage.peak_anonymous_bytes)
        if repetition == 0 and not options.skip_peft:
            settle([base, adapter], [out, floor_out])
            made = subprocess.run(
                [sys.executable, "-c", PEER, base, adapter, out],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            seconds["peft"].append(json.loads(made.stdout.splitlines()[-1]))
    pairs = list(zip(seconds["floor"], seconds["fastmerge"], strict=True))
    return {
        "size": options.size,
        "rank": options.rank,
        "bytes": 2 * bytes_of(base) + bytes_of(adapter),
        "seconds": seconds,
        "share_of_floor_speed": statistics.median(floor / ours for floor, ours in pairs),
        "times_peft": [peft / statistics.median(seconds["fastmerge"]) for peft in seconds["peft"]],
        "peak_anonymous_bytes": anonymous,
        "machine": machine(root if root.exists() else HERE),
        "commit": commit(),
    }


if __name__ == "__main__":
    main()
