"""`fastmerge.ops` and mergekit 0.1.5 beside float64, entry by entry.

    python benchmarks/exactness.py                          # all; half a minute
    python benchmarks/exactness.py --methods slerp --kinds opposite

The same tensors go through `fastmerge.ops` and through mergekit's own function in its best setting
(``dtype: float32``, ``out_dtype`` the tensors' type: one rounding at the end). Exact is what that
function gives of the same tensors in float64. An error is counted in units in the last place of the
output's type at the exact value, or at 1/256 of the tensor's mean magnitude where that is larger;
an entry is misrounded where it is another number than the exact one rounded to the type. Left out:
methods that draw at random, since each tool has its own draws, and of trimmed entries those whose
magnitude is the threshold's, since any of them may stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.merge_methods.api import merge_tensors
from record import record

from fastmerge import ops
from fastmerge.errors import FastmergeError

SHAPE = (64, 384)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIGITS = {"bf16": 8, "fp16": 11, "fp32": 24}  # of the significand
LEAST = {"bf16": -133, "fp16": -24, "fp32": -149}  # the smallest unit's exponent
FLOOR = 1 / 256

Tensors = list[torch.Tensor]  # a base and three models


@dataclass(frozen=True)
class Case:
    """A method as both tools take it; ``base``: whether the first tensor is its base."""

    method: str
    count: int  # of the models
    base: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    trims: float = 1.0  # the density, where entries are kept by magnitude


CASES = {
    "linear": Case("linear", 3, parameters={"weight": [0.3, 0.7, 0.45]}),
    "passthrough, scaled": Case("passthrough", 1, parameters={"scale": 0.7}),
    "slerp, t 0.3": Case("slerp", 2, parameters={"t": 0.3}),
    "slerp, t 0.5": Case("slerp", 2, parameters={"t": 0.5}),
    "nuslerp": Case("nuslerp", 2, parameters={"weight": [0.3, 0.7]}),
    "nuslerp, equal": Case("nuslerp", 2, parameters={"weight": [1.0, 1.0]}),
    "nuslerp by rows": Case(
        "nuslerp", 2, parameters={"weight": [0.3, 0.7], "nuslerp_flatten": False}
    ),
    "nuslerp by rows, equal": Case(
        "nuslerp", 2, parameters={"weight": [1.0, 1.0], "nuslerp_flatten": False}
    ),
    "nuslerp, base": Case("nuslerp", 2, True, {"weight": [0.3, 0.7]}),
    "nuslerp, base, by rows": Case(
        "nuslerp", 2, True, {"weight": [0.3, 0.7], "nuslerp_flatten": False}
    ),
    "nuslerp, base, by columns": Case(
        "nuslerp", 2, True,
        {"weight": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "multislerp": Case("multislerp", 3, parameters={"weight": [0.3, 0.7, 0.45]}),
    "multislerp, base": Case("multislerp", 3, True, {"weight": [0.3, 0.7, 0.45]}),
    "karcher, 2": Case("karcher", 2),
    "karcher, 3": Case("karcher", 3),
    "model_stock": Case("model_stock", 3, True),
    "model_stock by rows": Case("model_stock", 3, True, {"filter_wise": True}),
    "task_arithmetic": Case("task_arithmetic", 3, True, {"weight": [0.6, 0.35, 0.2]}),
    "ties, all": Case("ties", 3, True, {"weight": [0.6, 0.35, 0.2], "density": 1.0}),
    "ties": Case("ties", 3, True, {"weight": [0.6, 0.35, 0.2], "density": 0.4}, trims=0.4),
    "breadcrumbs, all": Case(
        "breadcrumbs", 3, True, {"weight": [0.6, 0.35, 0.2], "density": 1.0, "gamma": 0.0}
    ),
    "sce": Case("sce", 3, True, {"select_topk": 1.0}),
    "ram": Case("ram", 3, True),
    "nearswap": Case("nearswap", 1, True, {"t": 1e-3}),
}  # fmt: skip


def noise(seed: int, size: float) -> torch.Tensor:
    return size * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def drawn(size: float, delta: float, offset: float = 0.0) -> Tensors:
    base = offset + noise(0, size)
    return [base, *(base + noise(seed, delta) for seed in (1, 2, 3))]


def fine_tunes(_: torch.dtype) -> Tensors:
    """Weights of 0.02 and changes of 0.001, some of them none after rounding."""
    return drawn(0.02, 0.001)


def opposite(dtype: torch.dtype) -> Tensors:
    """Half of the second model's entries are the first's, or its delta's, with the other sign."""
    base = torch.zeros(SHAPE)
    first, second, third = (noise(seed, 0.02) for seed in (1, 2, 3))
    second = torch.where(noise(4, 1.0) > 0, -first.to(dtype).float(), second)
    return [base, first, second, third]


def tiny(dtype: torch.dtype) -> Tensors:
    """Norms below the 1e-8 and 1e-5 that the methods take for zero; in fp16 its least numbers."""
    size = 1e-6 if dtype == torch.float16 else 1e-12
    return [noise(seed, size) for seed in range(4)]


def offset(_: torch.dtype) -> Tensors:
    """Weights about 1, as norms have, with small changes: what all share is far the larger part."""
    return drawn(0.02, 0.02, offset=1.0)


def zeros(_: torch.dtype) -> Tensors:
    """A third of each is 0, rows of the base and one model too; one model is the base."""
    base, first, second, _ = drawn(0.02, 0.005)
    for seed, x in enumerate((base, first, second)):
        x[noise(10 + seed, 1.0) < -0.43] = 0
    base[:8], first[4:12] = 0, 0
    return [base, first, second, base.clone()]


def spread(dtype: torch.dtype) -> Tensors:
    """Magnitudes over six decades."""
    low, high = (-4, 1) if dtype == torch.float16 else (-6, 1)
    base = 10 ** (noise(9, (high - low) / 4) + (low + high) / 2).clamp(low, high)
    return [base * noise(0, 1.0), *(base * noise(seed, 1.0) for seed in (1, 2, 3))]


KINDS: dict[str, Callable[[torch.dtype], Tensors]] = {
    "fine-tunes": fine_tunes, "opposite": opposite, "tiny": tiny, "offset": offset,
    "zeros": zeros, "spread": spread,
}  # fmt: skip


# What is no error of ours, by method and inputs.
EXPLAINED = {
    ("karcher", "tiny"): "where no norm is above tol ours is the mean, mergekit's is 0",
    ("sce", "zeros"): "the same fp32 operations in another order",
}


@dataclass(frozen=True)
class Error:
    mean: float  # units in the last place
    most: float
    misrounded: float  # share of the entries

    def __str__(self) -> str:
        return f"{self.mean:.3g} | {self.most:.3g} | {100 * self.misrounded:.2f} %"


def error(made: torch.Tensor, exact: torch.Tensor, dtype: str, counted: torch.Tensor) -> Error:
    at = torch.maximum(exact.abs(), FLOOR * exact.abs().mean())
    exponent = torch.floor(torch.log2(at.clamp(min=1e-300))) + 1 - DIGITS[dtype]
    unit = torch.exp2(exponent.clamp(min=LEAST[dtype]))
    off = ((made.double() - exact).abs() / unit)[counted]
    wrong = (made != exact.to(DTYPES[dtype]))[counted]
    if not off.numel():
        return Error(0.0, 0.0, 0.0)
    return Error(float(off.mean()), float(off.max()), float(wrong.double().mean()))


def counted(case: Case, tensors: Tensors) -> torch.Tensor:
    """The entries whose fate the method's definition decides."""
    known = torch.ones(SHAPE, dtype=torch.bool)
    if case.trims < 1:
        for x in tensors[1:]:
            size = (x.double() - tensors[0].double()).abs()
            keep = int(case.trims * size.numel())
            known &= size != torch.topk(size.flatten(), keep).values[-1]
    return known


def compared(case: Case, dtype: str, tensors: Tensors) -> tuple[Error, Error]:
    """Ours and mergekit's; raises ValueError where a tool refuses the tensors."""
    given = tensors[: case.count + 1] if case.base else tensors[1 : case.count + 1]
    index = 0 if case.base or case.method == "slerp" else None
    how = {"base_index": index, "parameters": dict(case.parameters)}
    exact = merge_tensors([x.double() for x in given], case.method, **how)
    theirs = merge_tensors(given, case.method, **how, dtype=torch.float32, out_dtype=DTYPES[dtype])
    base = given[0] if case.base else None
    models = given[1:] if case.base else given
    ours = ops.merge(case.method, models, case.parameters, base=base)
    known = counted(case, given) & exact.isfinite()
    return error(ours, exact, dtype, known), error(theirs, exact, dtype, known)


def is_farther(ours: Error, theirs: Error) -> bool:
    """Whether mergekit is nearer: in the mean, by more than a thousandth of a unit, or by more than
    one entry in a thousand.
    """
    return ours.mean > theirs.mean + 1e-3 or ours.misrounded > theirs.misrounded + 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    rows: list[list[object]] = []
    for method in options.methods:
        for dtype in options.dtypes:
            for kind in options.kinds:
                tensors = [x.to(DTYPES[dtype]) for x in KINDS[kind](DTYPES[dtype])]
                try:
                    ours, theirs = compared(CASES[method], dtype, tensors)
                except (FastmergeError, ValueError) as refused:
                    print(f"{method} | {dtype} | {kind} | {refused}")
                    continue
                mark = ""
                if is_farther(ours, theirs):
                    mark = EXPLAINED.get((CASES[method].method, kind), "farther")
                rows.append([method, dtype, kind, str(ours), str(theirs), mark])
                print(" | ".join(map(str, rows[-1])))
    if not options.no_save:
        head = (
            "| method | type | inputs | ours: mean, ulp | most | misrounded "
            "| mergekit's: mean, ulp | most | misrounded | |"
        )
        record("exactness", "Errors against float64, ours and mergekit 0.1.5's", head, rows, {})


if __name__ == "__main__":
    main()
