"""Adapters: the SVD of a sum from its factors beside the full one, the range finder's error beside
the least, and extract-lora beside mergekit-extract-lora on one pair of models; with ``--weighted``
alone, PEFT's add_weighted_adapter with ties, by its own functions and by fastmerge's.

    python benchmarks/adapters.py DIR --models 0.2b --rank 32
    python benchmarks/adapters.py DIR --weighted 32 --runs 3

Whole processes, in turn, the models cached. CPU seconds are what other work on the machine does not
stretch; of mergekit some 5 are its imports.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge import _C
from fastmerge.bench.checkpoints import write_set
from fastmerge.bench.machine import machine
from fastmerge.bench.process import measure
from fastmerge.compute.factors import Difference, nearest_of_rank, spectrum_of, spectrum_of_sum


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    made = work()
    return time.perf_counter() - began, made


def sum_of_factors(size: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    bs = [rng.normal(size=(size, rank)) for _ in range(3)]
    factors_a = [rng.normal(size=(rank, size)) for _ in range(3)]
    fast, found = min((timed(lambda: spectrum_of_sum(bs, factors_a)) for _ in range(3)),
                      key=lambda pair: pair[0])  # fmt: skip
    whole = sum(b @ a for b, a in zip(bs, factors_a, strict=True))
    slow, full = timed(lambda: spectrum_of(whole))
    error = np.abs(found.s - full.s[: len(found.s)]).max() / full.s[0]
    print(f"three of rank {rank}, {size} x {size}: {fast * 1e3:.1f} ms by QR, {slow:.1f} s by a "
          f"full SVD, {slow / fast:.0f} times; singular values agree to {error:.1e}")  # fmt: skip


def range_finder(size: int, rank: int) -> None:
    stored = np.random.default_rng(1).normal(size=(size, size)).astype(np.float32)
    base = np.zeros_like(stored)
    views = [_C.View(x.ctypes.data, x.size, "F32", x) for x in (stored, base)]
    difference = Difference(_C.Pool(1), *views, (size, size))
    slow, values = timed(lambda: np.linalg.svd(stored, compute_uv=False).astype(np.float64))
    least = float(np.sqrt((values[rank:] ** 2).sum()))
    for power in (0, 1, 2, 4):
        seconds, found = timed(
            lambda power=power: nearest_of_rank(difference, rank, 1, power_iterations=power)
        )
        b, a = (found.u * found.s).astype(np.float32), found.vt.astype(np.float32)
        error = difference.norm_without(b, a)
        print(f"noise of {size} x {size}, rank {rank}, {power} power iterations: {seconds:.2f} s, "
              f"error {error / least - 1:.2%} above the least ({slow:.1f} s)")  # fmt: skip


def extraction(folder: Path, models: str, rank: int, runs: int) -> None:
    base, tuned = write_set(folder / "models", models, 2)
    words = ["--model", tuned, "--base-model", base, "--max-rank", rank]
    code = "from mergekit.scripts.extract_lora import main; main()"
    commands = {
        "fastmerge": [sys.executable, "-m", "fastmerge", "mergekit-extract-lora", *words],
        "mergekit": [sys.executable, "-c", code, *words],
    }
    for _ in range(runs):
        for name, command in commands.items():
            used = measure([*map(str, command), "--out-path", folder / name])
            print(f"{name}, {models}, rank {rank}: {used.seconds:.1f} s, {used.cpu_seconds:.1f} s "
                  f"of CPU, {used.peak_anonymous_bytes / 1e6:.0f} MB", flush=True)  # fmt: skip
            shutil.rmtree(folder / name)
    shutil.rmtree(folder / "models")


def weighted(layers: int, rank: int, runs: int) -> None:
    """Two adapters of all seven projections of a 7 B llama, whose own weights are not read: here
    they are one number each. PEFT makes the new adapter first, whoever merges, in both times.
    """
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastmerge.integrations import peft as kernels

    torch.set_num_threads(2)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))
    for name, parameter in [*llama.named_parameters()]:
        place, _, own = name.rpartition(".")
        nothing = torch.nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False)
        setattr(llama.get_submodule(place), own, nothing)
    lora = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(llama, lora, "one")
    model.add_adapter("two", lora)
    choice = {"combination_type": "ties", "density": 0.5}
    for _ in range(runs):
        made = {}
        for who, context in {"PEFT": nullcontext, "fastmerge": kernels.installed}.items():
            before = time.process_time()
            with context():
                seconds, _ = timed(
                    lambda: model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", **choice)
                )
            used = time.process_time() - before
            made[who] = [p.detach().clone() for n, p in model.named_parameters() if ".sum." in n]
            model.delete_adapter("sum")
            count = sum(tensor.numel() for tensor in made[who])
            print(f"add_weighted_adapter, ties, {layers} layers, rank {rank}, {len(made[who])} "
                  f"tensors of {count / 1e6:.1f} M entries, {who}: {seconds:.2f} s, "
                  f"{used:.2f} s of CPU", flush=True)  # fmt: skip
        away = sum(int((a - b).abs().gt(1e-6).sum()) for a, b in zip(*made.values(), strict=True))
        print(f"{away} entries differ: of equal magnitudes at the threshold another one stays")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--models", default="0.2b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=1, help="of the extractions; 0: none")
    parser.add_argument("--weighted", type=int, metavar="LAYERS", help="PEFT's merge of so many")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print(machine(given.folder), "load", os.getloadavg())
    if given.weighted:
        weighted(given.weighted, given.rank, given.runs)
        return
    sum_of_factors(given.size, given.rank)
    range_finder(min(given.size, 1024), given.rank)
    if given.runs:
        extraction(given.folder, given.models, given.rank, given.runs)


if __name__ == "__main__":
    main()
