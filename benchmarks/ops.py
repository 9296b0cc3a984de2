"""`fastmerge.ops` beside the best expression in plain torch, in one process, tensor by tensor.

    python benchmarks/ops.py --seconds 3                    # all sizes to 256 MiB, bf16 and fp32
    python benchmarks/ops.py --sizes 64K 1M --ops linear    # some

Both have two threads and give a new tensor of their inputs' type. In each round all expressions run
in turn, ours among them, small tensors many times in a row; torch's is the one with the least
median. A figure is a median over the rounds with the quartiles beside it. Before anything is timed,
ours is compared with float64. The last table is what a call costs besides its kernels: the time of
a call for tensors of 4 Ki entries less that of the bare calls into ``_C``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from merge_model import HERE, commit
from process import machine

from fastmerge import _C, ops
from fastmerge.compute.cpu import cpu
from fastmerge.models.memory import view_of
from fastmerge.selection import MAGNITUDE, Sparsify, keep_count

SIZES = {"64K": 1 << 16, "1M": 1 << 20, "4M": 1 << 22, "16M": 1 << 24, "64M": 1 << 26,
         "256M": 1 << 28, "1G": 1 << 30}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS, T, DENSITY = [0.3, 0.7], 0.3, 0.5
THREADS = 2
BATCH_SECONDS = 2e-3  # how long a round's calls of one expression take together at least

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Ours, torch's candidates, and whether a result is right."""

    ours: Call
    torch: dict[str, Call]
    check: Callable[[torch.Tensor], None]


def near(exact: np.ndarray) -> Callable[[torch.Tensor], None]:
    """Equal to rounding: half a unit in the last place of bf16, more for fp32's sums."""

    def check(made: torch.Tensor) -> None:
        tolerance = 1e-5 if made.dtype == torch.float32 else 2.0**-8
        np.testing.assert_allclose(made.double().numpy(), exact, rtol=tolerance, atol=1e-7)

    return check


def slerp_torch(a: torch.Tensor, b: torch.Tensor, wide: bool) -> torch.Tensor:
    """Shoemake 1985, in three passes of reduction and two of sums."""
    x, y = (a.float(), b.float()) if wide else (a, b)
    norms = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
    angle = torch.acos((torch.dot(x, y) / norms).clamp(-1, 1).double()).item()
    first, second = np.sin((1 - T) * angle) / np.sin(angle), np.sin(T * angle) / np.sin(angle)
    return (x * first).add_(y, alpha=second).to(a.dtype)


def trimmed(delta: torch.Tensor, how: str) -> torch.Tensor:
    """The larger half of a delta's entries, by one of torch's ways to a threshold."""
    size, keep = delta.abs(), int(DENSITY * delta.numel())
    if how == "topk":
        kept = torch.zeros_like(delta)
        places = torch.topk(size, keep, sorted=False).indices
        return kept.scatter_(0, places, delta[places])
    if how == "kthvalue":
        threshold = torch.kthvalue(size, delta.numel() - keep + 1).values
    else:
        threshold = torch.sort(size, descending=True).values[keep - 1]
    return delta * (size >= threshold)


def ties_torch(base: torch.Tensor, tuned: list[torch.Tensor], how: str) -> torch.Tensor:
    """Yadav et al. 2023, in mergekit's words."""
    wide = base.float()
    deltas = torch.stack(
        [w * trimmed(x.float() - wide, how) for w, x in zip(WEIGHTS, tuned, strict=True)]
    )
    agree = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    weights = (agree * torch.tensor(WEIGHTS)[:, None]).sum(0)
    merged = (deltas * agree).sum(0) / torch.where(weights == 0, 1.0, weights)
    return (wide + merged).to(base.dtype)


def dare_torch(base: torch.Tensor, tuned: list[torch.Tensor], how: str) -> torch.Tensor:
    """Yu et al. 2023, with the L1 norm restored as in mergekit."""
    wide = base.float()
    total = wide.clone()
    for weight, x in zip(WEIGHTS, tuned, strict=True):
        delta = x.float() - wide
        if how == "rand":
            kept = delta * (torch.rand_like(delta) < DENSITY)
        else:
            kept = delta * torch.empty_like(delta).bernoulli_(DENSITY)
        total.add_(kept, alpha=weight * float(delta.abs().sum() / kept.abs().sum()))
    return total.to(base.dtype)


def exact_ties(base: np.ndarray, tuned: list[np.ndarray]) -> np.ndarray:
    """Fine where nothing ties at the threshold; the inputs of the check are made so."""
    deltas = []
    for weight, x in zip(WEIGHTS, tuned, strict=True):
        delta = x - base
        keep = int(DENSITY * delta.size)
        threshold = np.partition(np.abs(delta), delta.size - keep)[delta.size - keep]
        deltas.append(weight * delta * (np.abs(delta) >= threshold))
    elected = np.where(sum(deltas) >= 0, 1.0, -1.0)
    agree = [np.sign(delta) == elected for delta in deltas]
    weights = sum(w * own for w, own in zip(WEIGHTS, agree, strict=True))
    summed = sum(delta * own for delta, own in zip(deltas, agree, strict=True))
    return base + summed / np.where(weights == 0, 1.0, weights)


def is_dare(base: np.ndarray, tuned: list[np.ndarray]) -> Callable[[torch.Tensor], None]:
    """Half of each delta is gone, and what is left has the mean of all."""

    def check(made: torch.Tensor) -> None:
        delta = made.double().numpy() - base
        mean = sum(w * (x - base) for w, x in zip(WEIGHTS, tuned, strict=True))
        untouched = float((delta == 0).mean())
        assert abs(untouched - (1 - DENSITY) ** 2) < 0.05 or made.dtype == torch.bfloat16, untouched
        share = float((delta @ mean) / (mean @ mean))
        assert abs(share - 1) < 0.05, share

    return check


def cases(count: int, dtype: torch.dtype) -> dict[str, Case]:
    """Of ``count`` entries: a base and two fine-tunes."""
    made = torch.Generator().manual_seed(count)
    base = (0.02 * torch.randn(count, generator=made)).to(dtype)
    a, b = ((base.float() + 0.01 * torch.randn(count, generator=made)).to(dtype) for _ in range(2))
    x, y = a.double().numpy(), b.double().numpy()
    origin = base.double().numpy()
    angle = np.arccos(x @ y / np.sqrt((x @ x) * (y @ y)))
    on_arc = np.sin((1 - T) * angle) / np.sin(angle) * x + np.sin(T * angle) / np.sin(angle) * y
    ties = near(exact_ties(origin, [x, y])) if dtype == torch.float32 else lambda made: None
    return {
        "linear": Case(
            lambda: ops.linear([a, b], WEIGHTS),
            {
                "lerp": lambda: torch.lerp(a, b, WEIGHTS[1]),
                "mul, add_": lambda: (a * WEIGHTS[0]).add_(b, alpha=WEIGHTS[1]),
            },
            near(WEIGHTS[0] * x + WEIGHTS[1] * y),
        ),
        "slerp": Case(
            lambda: ops.slerp(a, b, T),
            {
                "as they are": lambda: slerp_torch(a, b, False),
                "in fp32": lambda: slerp_torch(a, b, True),
            },
            near(on_arc),
        ),
        "ties": Case(
            lambda: ops.ties(base, [a, b], WEIGHTS, density=DENSITY),
            {how: lambda how=how: ties_torch(base, [a, b], how) for how in
             ("topk", "kthvalue", "sort")},
            ties,
        ),
        "dare_linear": Case(
            lambda: ops.dare_linear(base, [a, b], WEIGHTS, density=DENSITY, seed=1),
            {how: lambda how=how: dare_torch(base, [a, b], how) for how in ("rand", "bernoulli")},
            is_dare(origin, [x, y]),
        ),
    }  # fmt: skip


def timed(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Microseconds a call, of each in each round; at least five rounds."""
    batch: dict[str, int] = {}
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        batch[name] = max(1, round(BATCH_SECONDS / (time.perf_counter() - began)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    while len(found[next(iter(calls))]) < 5 or time.perf_counter() < until:
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(batch[name]):
                call()
            found[name].append((time.perf_counter() - began) / batch[name] * 1e6)
    return found


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high, "best": min(values)}


def bench(size: int, dtype: str, wanted: list[str], seconds: float) -> list[dict]:
    """One row for each op."""
    count = size // DTYPES[dtype].itemsize
    rows = []
    for op, case in cases(count, DTYPES[dtype]).items():
        if op not in wanted:
            continue
        case.check(case.ours())
        found = timed({"ours": case.ours, **case.torch}, seconds)
        best = min(case.torch, key=lambda name: statistics.median(found[name]))
        ratios = [t / o for t, o in zip(found[best], found["ours"], strict=True)]
        rows.append({
            "op": op, "bytes": size, "dtype": dtype, "torch is": best,
            "ours": spread(found["ours"]), "torch": spread(found[best]), "ratio": spread(ratios),
        })  # fmt: skip
    return rows


def own_costs(seconds: float) -> list[dict]:
    """What a call for small tensors takes, and what its kernels do."""
    count = 4096
    base, a, b = (torch.randn(count) for _ in range(3))
    out = torch.empty(count)
    views = [view_of(tensor, "") for tensor in (a, b)]
    origin, sink = view_of(base, ""), _C.MemorySink(view_of(out, "", writable=True), checked=False)
    pool, pair = cpu(THREADS).pool, np.array(WEIGHTS)
    trim = [Sparsify(MAGNITUDE, keep_count(DENSITY, count))] * 2

    def ties() -> None:
        kept = _C.select(pool, views, origin, trim)
        _C.consensus(pool, views, origin, WEIGHTS, kept, sink, elect=True, normalize=True)

    def slerp() -> None:
        _C.gram(pool, views)
        _C.combine(pool, views, pair, sink)

    def combine() -> None:
        _C.combine(pool, views, pair, sink)

    calls = {
        "combine": (lambda: ops.combine([a, b], WEIGHTS), combine),
        "linear": (lambda: ops.linear([a, b], WEIGHTS), combine),
        "slerp": (lambda: ops.slerp(a, b, T), slerp),
        "ties": (lambda: ops.ties(base, [a, b], WEIGHTS, density=DENSITY), ties),
    }
    rows = []
    for op, (whole, kernels) in calls.items():
        found = timed({"call": whole, "kernels": kernels}, seconds)
        own = [c - k for c, k in zip(found["call"], found["kernels"], strict=True)]
        rows.append({"op": op, "own": spread(own)} | {k: spread(v) for k, v in found.items()})
    return rows


def markdown(report: dict) -> str:
    """The report for people."""

    def shown(found: dict[str, float], digits: int = 0) -> str:
        return (
            f"{found['median']:.{digits}f} ({found['low']:.{digits}f}-{found['high']:.{digits}f})"
        )

    names = {number: f"{name[:-1]} {name[-1]}iB" for name, number in SIZES.items()}
    rows = [
        f"| {row['op']} | {row['dtype']} | {names[row['bytes']]} | {shown(row['ours'])} | "
        f"{shown(row['torch'])} | {row['torch is']} | {shown(row['ratio'], 2)} | "
        f"{row['ours']['best']:.0f}, {row['torch']['best']:.0f}: "
        f"{row['torch']['best'] / row['ours']['best']:.2f} |"
        for row in report["result"]
    ]
    costs = [
        f"| {row['op']} | {shown(row['call'], 1)} | {shown(row['kernels'], 1)} | "
        f"{shown(row['own'], 1)} | {row['own']['best']:.1f} |"
        for row in report["own"]
    ]
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    note = (
        f"Medians (quartiles) of rounds for {report['seconds']} s, `least` of all; {THREADS} "
        f"threads; commit {report['commit']}."
    )
    return "\n".join(
        [
            "# Tensors in memory: `fastmerge.ops` beside plain torch",
            "",
            "| op | type | a tensor | ours, us | torch, us | by | times its | least: ours, its |",
            "|---|---|---:|---:|---:|---|---:|---:|",
            *rows,
            "",
            "| call, 4 Ki entries | us | its kernels | its own | least |",
            "|---|---:|---:|---:|---:|",
            *costs,
            "",
            note,
            f"{about}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES][:-1])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--ops", nargs="+", default=["linear", "slerp", "ties", "dare_linear"])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = [
        row
        for dtype in options.dtypes
        for size in options.sizes
        for row in bench(SIZES[size], dtype, options.ops, options.seconds)
    ]
    with tempfile.TemporaryDirectory() as name:
        about = machine(Path(name))
    report = {
        "seconds": options.seconds, "machine": about, "commit": commit(), "result": rows,
        "own": own_costs(options.seconds),
    }  # fmt: skip
    if not options.no_save:
        path = HERE / "results" / "ops.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
