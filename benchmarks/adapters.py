"""Adapters beside other programs, in turn, in one run, each result checked before it has a figure.

    python benchmarks/adapters.py --rounds 5 --record       # ten minutes

- the SVD of a sum of three adapters from their factors beside LAPACK's of the sum (goal: 100 x);
- the nearest matrix of a rank to noise, by the range finder, beside the whole SVD;
- ``fastmerge merge`` of two adapters to one of their rank (svd), a whole process, beside PEFT's
  ``add_weighted_adapter`` and ``save_pretrained`` of the same adapters;
- PEFT's ``add_weighted_adapter`` with ties on a 7 B llama's modules, by its own functions and by
  fastmerge's (``integrations.peft``);
- ``fastmerge mergekit-extract-lora``, a whole process, beside mergekit-extract-lora (goal: 10 x).

Of other programs imports and loading are left out, their start too; of fastmerge nothing is. A
figure is the median of ``--rounds`` (of a whole SVD, PEFT's svd and mergekit: ``--peer-rounds``).
CPU seconds are of all threads, and are what other work on the machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from record import record, tell
from safetensors.numpy import load_file, save_file

from fastmerge import _C
from fastmerge.bench.checkpoints import SHAPES, write_adapter, write_set
from fastmerge.bench.process import measure
from fastmerge.compute.factors import Difference, nearest_of_rank, spectrum_of, spectrum_of_sum
from fastmerge.models.adapter import WEIGHTS, Adapter
from fastmerge.models.folder import SINGLE

ADAPTERS, SHARES = ("one", "two"), (0.7, 0.3)
KINDS = ("sum", "noise", "merge", "ties", "extract")
HEAD = "| work | fastmerge, s | beside | the other, s | x | x in CPU time | checked |"

# What other programs do, behind what prepares it: their words are in sys.argv.
_MERGEKIT = "from mergekit.scripts.extract_lora import main", "main(standalone_mode=False)"
_PEFT = (
    """
import peft, torch
from transformers import AutoModelForCausalLM
base, one, two, out, rank = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, one, adapter_name="one")
model.load_adapter(two, adapter_name="two")
""",
    f"""
model.add_weighted_adapter(
    {list(ADAPTERS)}, {list(SHARES)}, "merged", combination_type="svd", svd_rank=int(rank)
)
model.save_pretrained(out, selected_adapters=["merged"])
""",
)


class Used(NamedTuple):
    """What some work took, once."""

    seconds: float
    cpu_seconds: float


class Figure(NamedTuple):
    """One row: the rounds of each, what is aimed at, what was seen to be right."""

    what: str
    ours: list[Used]
    theirs: list[Used]
    other: str
    goal: float | None
    checked: str

    def cells(self) -> list[str]:
        (a, a_cpu), (b, b_cpu) = (
            (statistics.median(u.seconds for u in each), statistics.median(u[1] for u in each))
            for each in (self.ours, self.theirs)
        )
        goal = "" if self.goal is None else f" (≥ {self.goal:g})"
        times = f"{b / a:.1f}{goal}"
        return [self.what, f"{a:.4g}", self.other, f"{b:.4g}", times, f"{b_cpu / a_cpu:.1f}",
                self.checked]  # fmt: skip


class _WrongError(Exception):
    """A result that is not right has no figure."""


def check(condition: bool, said: str) -> str:
    if not condition:
        raise _WrongError(said)
    return said


def timed(work: Callable[[], Any]) -> tuple[Used, Any]:
    began, cpu = time.perf_counter(), time.process_time()
    made = work()
    return Used(time.perf_counter() - began, time.process_time() - cpu), made


def process(*words: object) -> Used:
    """A whole ``fastmerge``, from start to exit."""
    used = measure([sys.executable, "-m", "fastmerge", *map(str, words)])
    return Used(used.seconds, used.cpu_seconds)


def peer(code: tuple[str, str], *words: object) -> Used:
    """Other programs' work in a process of its own, without what comes before it."""
    lines = [
        "import json, sys, time", code[0], "began = time.perf_counter(), time.process_time()",
        code[1], "ended = time.perf_counter(), time.process_time()",
        "print(json.dumps([b - a for a, b in zip(began, ended)]))",
    ]  # fmt: skip
    used = measure([sys.executable, "-c", "\n".join(lines), *map(str, words)])
    return Used(*json.loads(used.stdout.splitlines()[-1]))


# ---------------------------------------------------------------- in memory


def sum_of_factors(size: int, rank: int, rounds: int, whole_rounds: int) -> Figure:
    rng = np.random.default_rng(0)
    bs = [rng.normal(size=(size, rank)) for _ in range(3)]
    factors_a = [rng.normal(size=(rank, size)) for _ in range(3)]
    fast, slow = [], []
    for _ in range(rounds):
        used, found = timed(lambda: spectrum_of_sum(bs, factors_a))
        fast.append(used)
    whole = sum(b @ a for b, a in zip(bs, factors_a, strict=True))
    for _ in range(whole_rounds):
        used, full = timed(lambda: spectrum_of(whole))
        slow.append(used)
    apart = np.abs(found.s - full.s[: len(found.s)]).max() / full.s[0]
    back = np.linalg.norm((found.u * found.s) @ found.vt - whole) / np.linalg.norm(whole)
    right = check(
        max(apart, back) < 1e-12, f"singular values to {apart:.0e}, the sum to {back:.0e}"
    )
    what = f"SVD of the sum of three adapters of rank {rank}, {size} x {size}"
    return Figure(what, fast, slow, "LAPACK, of the sum", 100, right)


def range_finder(size: int, rank: int, power: int, rounds: int) -> Figure:
    stored = np.random.default_rng(1).normal(size=(size, size)).astype(np.float32)
    base = np.zeros_like(stored)
    views = [_C.View(x.ctypes.data, x.size, "F32", x) for x in (stored, base)]
    difference = Difference(_C.Pool(1), *views, (size, size))
    slow, full = timed(lambda: np.linalg.svd(stored, full_matrices=False))
    least = float(np.linalg.norm(full[1][rank:].astype(np.float64)))
    fast = []
    for _ in range(rounds):
        used, found = timed(lambda: nearest_of_rank(difference, rank, 1, power_iterations=power))
        fast.append(used)
    b, a = (found.u * found.s).astype(np.float32), found.vt.astype(np.float32)
    above = difference.norm_without(b, a) / least - 1
    right = check(-1e-4 < above < 0.05, f"error {above:.1%} above the least")
    what = f"nearest of rank {rank} to noise, {size} x {size}, {power} power iterations"
    return Figure(what, fast, [slow], "LAPACK, fp32", None, right)


def weighted(layers: int, rank: int, rounds: int) -> Figure:
    """Two adapters of all seven projections of a 7 B llama, whose own weights are not read: here
    they are one number each. PEFT makes the new adapter first, whoever merges, in both times.
    """
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastmerge.integrations import peft as kernels

    torch.set_num_threads(2)
    torch.manual_seed(0)
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
    used: dict[str, list[Used]] = {"PEFT": [], "fastmerge": []}
    for _ in range(rounds):
        made = {}
        for who, context in {"PEFT": nullcontext, "fastmerge": kernels.installed}.items():
            with context():
                merge = partial(model.add_weighted_adapter, list(ADAPTERS), list(SHARES), "sum")
                used[who].append(timed(lambda merge=merge: merge(**choice))[0])
            made[who] = [p.detach().clone() for n, p in model.named_parameters() if ".sum." in n]
            model.delete_adapter("sum")
    away = sum(int((a - b).abs().gt(1e-6).sum()) for a, b in zip(*made.values(), strict=True))
    count = sum(tensor.numel() for tensor in made["PEFT"])
    # Of equal magnitudes at the threshold another one stays: two of a tensor at most.
    right = check(away <= 2 * len(made["PEFT"]), f"{away} of {count} entries differ")
    what = f"add_weighted_adapter, ties, rank {rank}, {len(made['PEFT'])} tensors of a 7 B llama"
    return Figure(what, used["fastmerge"], used["PEFT"], "PEFT's functions", None, right)


# ---------------------------------------------------------------- files


def products(adapter: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each weight and what an adapter adds to it, in float64."""
    opened = Adapter.open(adapter)
    tensors = numbers(opened.files[0])
    for module, own in opened.factors.items():
        yield f"{module}.weight", own.scale * (tensors[own.b] @ tensors[own.a])


def numbers(file: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {name: tensor.double().numpy() for name, tensor in load_file(file).items()}


def merged_adapters(folder: Path, size: str, rank: int, rounds: int, peer_rounds: int) -> Figure:
    (base,) = write_set(folder, size, 1)
    both = [folder / name for name in ADAPTERS]
    for seed, adapter in enumerate(both):
        write_adapter(adapter, base, rank)
        file, rng = adapter / WEIGHTS, np.random.default_rng(seed)
        tensors = {n: rng.permuted(t.ravel()).reshape(t.shape) for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    recipe, ours, theirs = folder / "loras.yml", folder / "ours", folder / "theirs"
    models = [
        {"model": str(adapter), "parameters": {"weight": weight}}
        for adapter, weight in zip(both, SHARES, strict=True)
    ]
    asked = {"merge_method": "svd", "models": models, "parameters": {"rank": rank}}
    recipe.write_text(json.dumps(asked))
    used: tuple[list[Used], list[Used]] = ([], [])
    for number in range(max(rounds, peer_rounds)):
        if number < rounds:
            used[0].append(process("merge", recipe, ours, "--overwrite", "--fresh", "--quiet"))
        if number < peer_rounds:
            used[1].append(peer(_PEFT, base, *both, theirs, rank))
    each = zip(products(ours), products(theirs / "merged"), strict=True)
    apart = max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for (_, x), (_, y) in each)
    right = check(apart < 1e-3, f"every delta within {apart:.0e} of PEFT's")
    what = f"two adapters of rank {rank} to one, svd, {size} llama"
    return Figure(what, *used, "PEFT's add_weighted_adapter", None, right)


def extraction(folder: Path, size: str, rank: int, rounds: int, peer_rounds: int) -> Figure:
    base, tuned = write_set(folder, size, 2)
    words = ["--model", tuned, "--base-model", base, "--max-rank", rank]
    ours, theirs = folder / "extracted", folder / "extracted-by-mergekit"
    used: tuple[list[Used], list[Used]] = ([], [])
    for number in range(max(rounds, peer_rounds)):
        for place in (ours, theirs):
            shutil.rmtree(place, ignore_errors=True)
        if number < rounds:
            used[0].append(process("mergekit-extract-lora", *words, "--out-path", ours))
        if number < peer_rounds:
            used[1].append(peer(_MERGEKIT, *words, "--out-path", theirs))
            by_mergekit = error_of(theirs, base, tuned)
    error = error_of(ours, base, tuned)
    said = f"error {error:.4f} of the difference, mergekit's {by_mergekit:.4f}"
    right = check(error <= 1.01 * by_mergekit, said)
    what = f"extract-lora, rank {rank}, {size} llama"
    return Figure(what, *used, "mergekit-extract-lora", 10, right)


def error_of(adapter: Path, base: Path, tuned: Path) -> float:
    """Of all matrices as one, Frobenius, relative to the difference."""
    from safetensors import safe_open

    left = total = 0.0
    with safe_open(base / SINGLE, "pt") as before, safe_open(tuned / SINGLE, "pt") as after:
        for name, product in products(adapter):
            own = after.get_tensor(name).double() - before.get_tensor(name).double()
            left += float(np.linalg.norm(own.numpy() - product) ** 2)
            total += float(np.linalg.norm(own.numpy()) ** 2)
    return math.sqrt(left / total)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", choices=SHAPES, default="0.2b")
    parser.add_argument("--rank", type=int, default=32, help="of what is extracted")
    parser.add_argument("--size", type=int, default=4096, help="of the matrix that is decomposed")
    parser.add_argument("--layers", type=int, default=32, help="of the 7 B llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=1)
    parser.add_argument("--only", choices=KINDS, action="append", help="some of the figures")
    parser.add_argument("--record", action="store_true", help="write results/adapters.*")
    parser.add_argument("--folder", type=Path, help="whose disk is used")
    options = parser.parse_args()
    size, rounds, others = options.size, options.rounds, options.peer_rounds
    small = min(size, 1024)
    with tempfile.TemporaryDirectory(prefix="adapters-", dir=options.folder) as name:
        place = Path(name)
        work: dict[str, list[Callable[[], Figure]]] = {
            "sum": [lambda: sum_of_factors(size, 16, rounds, others)],
            "noise": [
                partial(range_finder, small, rank, power, rounds)
                for rank, power in ((16, 2), (128, 2), (128, 4))
            ],
            "merge": [lambda: merged_adapters(place, options.models, 16, rounds, others)],
            "ties": [lambda: weighted(options.layers, 16, rounds)],
            "extract": [lambda: extraction(place, options.models, options.rank, rounds, others)],
        }
        rows = []
        for kind in options.only or KINDS:
            for figure in work[kind]:
                rows.append(figure().cells())
                tell(" | ".join(rows[-1]))
    if options.record:
        about = {"rounds": rounds, "of other programs": others, "peft": version("peft")}
        record("adapters", "Adapters beside other programs", HEAD, rows, about)


if __name__ == "__main__":
    main()
